"""Which files hold a model's tensors, found as transformers and vLLM find them.

`model.safetensors` alone, or the files that the index names; of those, whatever they hold. The index says which
files there are, and no loader asks it for more: a name that it lacks is loaded all the same, one that no file holds
is not missed unless the model has such a tensor. What disagrees harmlessly is noted.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.header import TensorInfo, read_header, read_json
from gs_dist.checkpoint.paths import contained_path
from gs_dist.errors import CheckpointError

__all__ = ["CONFIG_FILE", "INDEX_FILE", "SINGLE_FILE", "WeightFiles", "fingerprint_of", "same_bytes", "some"]

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_EDGE = 64 << 10  # bytes of each end of a file's data that the fingerprint looks at
_LISTED = 3  # names shown of many
_CHUNK = 16 << 20  # bytes compared at a time
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """A model's files and what their headers say.

    Attributes:
        paths: file, relative to the directory, to where it lies.
        headers: file to its header's bytes.
        tensors: name to its header entry, over all files.
        notes: where index and files disagree, and no loader minds.
    """

    paths: Mapping[str, Path]
    headers: Mapping[str, bytes]
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()

    @classmethod
    def find(cls, directory: Path) -> WeightFiles:
        """Reads the index, if there is one, and the header of every file.

        Raises:
            CheckpointError: a file is missing, damaged or leads outside of the directory, or two files hold one
                tensor with different values.
        """
        index_path = contained_path(directory, INDEX_FILE)
        if contained_path(directory, SINGLE_FILE).exists():
            note = f"{SINGLE_FILE} holds the model; {INDEX_FILE} beside it is not read, as loaders do not read it"
            return _of_files(directory, [SINGLE_FILE], None, (note,) if index_path.exists() else ())
        if not index_path.exists():
            raise _no_weights(directory)
        weight_map = _weight_map(index_path)
        files = sorted(set(weight_map.values()))
        for file in files:
            if not os.path.isfile(contained_path(directory, file)):
                raise CheckpointError(f"{file:.200}: is listed in {INDEX_FILE} and missing; complete the download")
        unlisted = sorted(path.name for path in directory.glob("model*.safetensors") if path.name not in files)
        note = f"{some(unlisted)}: left out, since {INDEX_FILE} does not list {'it' if len(unlisted) == 1 else 'them'}"
        return _of_files(directory, files, weight_map, (note,) if unlisted else ())


def _weight_map(path: Path) -> dict[str, str]:
    weight_map: Any = read_json(path, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE}: weight_map must map tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX_FILE}: tensor {name!r:.200} is mapped to {file!r:.200}, which is not a .safetensors file"
            )
    return weight_map


def _of_files(
    directory: Path, files: list[str], weight_map: Mapping[str, str] | None, notes: tuple[str, ...]
) -> WeightFiles:
    paths: dict[str, Path] = {}
    headers: dict[str, bytes] = {}
    tensors: dict[str, TensorInfo] = {}
    twice: list[str] = []
    for file in files:
        paths[file] = contained_path(directory, file)
        held, headers[file] = read_header(paths[file], file)
        for name, info in held.items():
            other = tensors.setdefault(name, info)
            if other is info:
                continue
            if not same_bytes(paths[other.file], other, paths[file], info):
                raise CheckpointError(
                    f"{file}: holds tensor {name!r:.200}, which {other.file} holds with other values; remove the file "
                    f"that is not of this model, and its lines from {INDEX_FILE}"
                )
            twice.append(name)
    if weight_map is None:
        return WeightFiles(paths=paths, headers=headers, tensors=tensors, notes=notes)
    elsewhere = [name for name, info in tensors.items() if name in weight_map and weight_map[name] != info.file]
    facts = (
        ([name for name in tensors if name not in weight_map], "lacks {}: read all the same, as loaders do"),
        ([name for name in weight_map if name not in tensors], "lists {}, which no file holds"),
        ([name for name in elsewhere if name not in twice], "lists {} in another file than holds it: read where it is"),
        (twice, "names files of which two hold {}, with the same values"),
    )
    said = tuple(f"{INDEX_FILE} {fact.format(some(names))}" for names, fact in facts if names)
    ordered = [name for name in weight_map if name in tensors]
    ordered += [name for name in tensors if name not in weight_map]
    return WeightFiles(
        paths=paths, headers=headers, tensors={name: tensors[name] for name in ordered}, notes=notes + said
    )


def fingerprint_of(config: Path, files: WeightFiles) -> str:
    """sha256, hexadecimal, of what tells one checkpoint from another without reading all of it.

    Covers config.json, and of each file in order of name: its name, its header, its size, and the first and last
    64 KiB of its data.
    """
    digest = hashlib.sha256(config.read_bytes())
    for file in sorted(files.paths):
        header = files.headers[file]
        with files.paths[file].open("rb") as stream:
            size = stream.seek(0, 2)
            start = 8 + len(header)
            stream.seek(start)
            first = stream.read(_EDGE)
            stream.seek(max(start, size - _EDGE))
            last = stream.read(_EDGE)
        for part in (file.encode(), header, str(size).encode(), first, last):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def same_bytes(path: Path, info: TensorInfo, other_path: Path, other: TensorInfo) -> bool:
    """Whether two tensors have one dtype, shape and content; the content is read up to the first difference."""
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        return False
    if info.nbytes == 0:
        return True
    with path.open("rb") as file, other_path.open("rb") as other_file:
        first = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        second = mmap.mmap(other_file.fileno(), 0, access=mmap.ACCESS_READ)
        with first, second:
            return all(
                first[info.offset + start : info.offset + min(start + _CHUNK, info.nbytes)]
                == second[other.offset + start : other.offset + min(start + _CHUNK, info.nbytes)]
                for start in range(0, info.nbytes, _CHUNK)
            )


def some(names: list[str]) -> str:
    """The first three of many names, and how many more there are."""
    shown = ", ".join(f"{name!r:.200}" for name in names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def _no_weights(directory: Path) -> CheckpointError:
    names = sorted(path.name for path in directory.iterdir())
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        return CheckpointError(
            f"{pickled[0]}: weights in pickle form are never opened; convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new), then set model to the new directory"
        )
    own = [name for name in names if name.startswith("consolidated") and name.endswith(".safetensors")]
    if own:
        return CheckpointError(
            f"{own[0]}: weights under Mistral's own names; download the Hugging Face form of the model "
            f"({SINGLE_FILE}, or {INDEX_FILE} and its files), or convert them with transformers"
        )
    if any(name.endswith(".safetensors") for name in names):
        return CheckpointError(
            f"{INDEX_FILE}: is missing although there are safetensors files; download it with the other files, or "
            f"name the file {SINGLE_FILE} if it is the only one"
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return CheckpointError(
            f"{gguf[0]}: is a GGUF file, and its weights are quantised in most cases; set model to the Hugging Face "
            "directory that it was made from"
        )
    return CheckpointError(f"{SINGLE_FILE}: neither it nor {INDEX_FILE} is in {directory.name!r}; set model correctly")
