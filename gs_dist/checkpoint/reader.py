"""A Hugging Face checkpoint directory: headers on opening, tensors as views of mapped files on demand."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import DTYPES, SPELLINGS, TensorInfo, read_header, read_json
from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.recipe.dialects import description_files

__all__ = ["CheckpointReader", "contained_path"]

Array = npt.NDArray[Any]

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOATS = ("float32", "float16", "bfloat16")
_EDGE = 64 << 10  # bytes of each end of a file's data that the fingerprint looks at
_LISTED = 3  # names shown of many
# Buffers that older transformers saved; rotary frequencies follow from config.json.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def contained_path(directory: Path, name: str) -> Path:
    """The file `name` of a checkpoint directory, links followed.

    A link may lead to another file of the directory, or from a snapshot of the Hugging Face cache to the
    blobs beside it (`models--x/snapshots/<revision>/file -> models--x/blobs/<hash>`).

    Raises:
        CheckpointError: the name is absolute, climbs with `..`, or leads outside.
    """
    root = directory.resolve()
    relative = Path(name)
    outside = CheckpointError(
        f"{name!r:.200} points outside of the checkpoint directory; put the file itself into the directory"
    )
    if not name or "\0" in name or "\\" in name or relative.is_absolute() or ".." in relative.parts:
        raise outside
    try:
        target = (root / relative).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(f"{name!r:.200}: cannot be followed ({error!s:.200})") from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise outside
    return target


class CheckpointReader:
    """Opens a directory by its headers alone and checks them against the architecture.

    Attributes:
        directory: the checkpoint directory.
        config: content of config.json.
        quantization_config: the value under that key, or None.
        architecture: what config.json describes. Where it states no dtype, the embedding's.
        tensors: name to `TensorInfo` of every tensor of the model, in model order.
        ignored: names of tensors on disk that no decoder needs (rotary buffers, the copy of a tied head).
    """

    def __init__(self, directory: Path | str, *, quantized: bool = False) -> None:
        """Reads config.json, the index and every header; no tensor data.

        Args:
            directory: holds config.json and model.safetensors, or an index and the files it names.
            quantized: for reading back what a format wrote: `quantization_config` is accepted, and
                tensors are not compared with the float architecture's; the format does that.

        Raises:
            CheckpointError: a file is missing, damaged, contradictory or leads outside of the directory.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"model: {str(directory)!r} is not a directory; set model to a checkpoint directory")
        self._config_path = contained_path(self.directory, CONFIG_FILE)
        self.config = read_json(self._config_path, CONFIG_FILE)
        self.quantization_config: Any = self.config.get("quantization_config")  # checked by the format that reads it
        described = any((self.directory / name).is_file() for name in description_files())
        if quantized and not described and not isinstance(self.quantization_config, Mapping):
            raise CheckpointError(
                f"{CONFIG_FILE}: quantization_config is missing, and there is no {' or '.join(description_files())}: "
                "the checkpoint is not quantised"
            )
        if described and not quantized:
            (found_name, *_) = (name for name in description_files() if (self.directory / name).is_file())
            raise CheckpointError(
                f"{found_name} describes quantised weights, so this checkpoint is quantised already; set model to the "
                "directory of the float checkpoint it was made from"
            )
        config = {k: v for k, v in self.config.items() if not (quantized and k == "quantization_config")}
        self.architecture = DecoderArchitecture.from_config(config)
        self._paths: dict[str, Path] = {}
        self._headers: dict[str, bytes] = {}
        found = self._read_headers()
        self.ignored: tuple[str, ...] = ()
        if not quantized:
            found, self.ignored = _checked_tensors(found, self.architecture)
        self.tensors: Mapping[str, TensorInfo] = found
        embedding = found.get("model.embed_tokens.weight")
        if embedding and config.get("dtype") is None and config.get("torch_dtype") is None:
            self.architecture = dataclasses.replace(self.architecture, dtype=embedding.dtype)

    @property
    def files(self) -> tuple[str, ...]:
        """The safetensors files, relative to the directory, sorted."""
        return tuple(sorted(self._paths))

    @property
    def tokenizer_file(self) -> Path | None:
        """The directory's tokenizer.json, or None."""
        path = contained_path(self.directory, "tokenizer.json")
        return path if path.is_file() else None

    def layer_tensors(self, layer: int) -> dict[str, TensorInfo]:
        """Name within the layer to `TensorInfo`, for every tensor of a decoder layer."""
        prefix = self.architecture.layer_prefix(layer)
        return {name.removeprefix(prefix): info for name, info in self.tensors.items() if name.startswith(prefix)}

    def read(self, names: Iterable[str]) -> dict[str, Array]:
        """Tensors by name as read-only arrays that view the mapped file; bfloat16 as `ml_dtypes.bfloat16`.

        Opens only the files that hold them. A mapping lives as long as an array that views it. A tensor
        that its file does not align to its item size is copied.

        Raises:
            CheckpointError: a name the checkpoint does not hold, or a file that changed since it was opened.
        """
        names = list(names)
        unknown = [name for name in names if name not in self.tensors]
        if unknown:
            raise CheckpointError(f"tensor {unknown[0]!r} is not in the checkpoint {self.directory.name!r}")
        infos = [self.tensors[name] for name in names]
        maps = {file: self._map(file) for file in sorted({info.file for info in infos})}
        return {info.name: _view(maps[info.file], info) for info in infos}

    def read_layer(self, layer: int) -> dict[str, Array]:
        """`read` of a decoder layer, by name within the layer."""
        infos = self.layer_tensors(layer)
        arrays = self.read(info.name for info in infos.values())
        return {name: arrays[info.name] for name, info in infos.items()}

    def read_outer(self) -> dict[str, Array]:
        """`read` of embedding, final norm and head, by full name."""
        return self.read(self.architecture.outer_tensors())

    def fingerprint(self) -> str:
        """sha256, hexadecimal, of what tells one checkpoint from another without reading all of it.

        Covers config.json, and of each file in order of name: its name, its header, its size, and the
        first and last 64 KiB of its data. A change that touches none of these goes unnoticed.
        """
        digest = hashlib.sha256(self._config_path.read_bytes())
        for file in self.files:
            header = self._headers[file]
            with self._paths[file].open("rb") as stream:
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

    def _map(self, file: str) -> mmap.mmap:
        try:
            with self._paths[file].open("rb") as stream:
                header = stream.read(8 + len(self._headers[file]))[8:]
                view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read any more ({error!s:.200})") from error
        ends = [info.offset + info.nbytes for info in self.tensors.values() if info.file == file]
        if header != self._headers[file] or len(view) < max(ends, default=0):
            raise CheckpointError(
                f"{file}: changed since the checkpoint was opened; leave the model alone during a run"
            )
        return view

    def _read_headers(self) -> dict[str, TensorInfo]:
        if contained_path(self.directory, SINGLE_FILE).exists():
            return self._read_file(SINGLE_FILE)
        index_path = contained_path(self.directory, INDEX_FILE)
        if not index_path.exists():
            raise _no_weights(self.directory)
        weight_map = read_json(index_path, INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{INDEX_FILE}: weight_map must map tensor names to file names")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{INDEX_FILE}: tensor {name!r:.200} is mapped to {file!r:.200}, which is not a .safetensors file"
                )
        files = sorted(set(weight_map.values()))
        for file in files:
            if not os.path.isfile(contained_path(self.directory, file)):
                raise CheckpointError(f"{file:.200}: is listed in {INDEX_FILE} and missing; complete the download")
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in self._read_file(file).items():
                if weight_map.get(name) != file:
                    listed = weight_map.get(name, "nowhere")
                    raise CheckpointError(
                        f"{file}: holds tensor {name!r:.200}, which {INDEX_FILE} lists in {listed!r:.200}; "
                        "the two do not belong together"
                    )
                tensors[name] = info
        missing = [name for name in weight_map if name not in tensors]
        if missing:
            raise CheckpointError(
                f"{weight_map[missing[0]]}: does not hold {_some(missing)}, which {INDEX_FILE} lists there; "
                "the two do not belong together"
            )
        return {name: tensors[name] for name in weight_map}

    def _read_file(self, file: str) -> dict[str, TensorInfo]:
        self._paths[file] = contained_path(self.directory, file)
        tensors, self._headers[file] = read_header(self._paths[file], file)
        return tensors


def _view(mapped: mmap.mmap, info: TensorInfo) -> Array:
    dtype = DTYPES[SPELLINGS[info.dtype]]
    if info.nbytes == 0:
        return np.empty(info.shape, dtype=dtype)
    flat = np.frombuffer(mapped, dtype=dtype, count=math.prod(info.shape), offset=info.offset)
    view = flat.reshape(info.shape)
    if not view.flags.aligned:
        view = view.copy()
        view.flags.writeable = False
    return view


def _some(names: list[str]) -> str:
    shown = ", ".join(f"{name!r:.200}" for name in names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def _no_weights(directory: Path) -> CheckpointError:
    names = sorted(path.name for path in directory.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return CheckpointError(
            f"{pickled[0]}: weights in pickle form are never opened; convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new), then set model to the new directory"
        )
    if any(name.endswith(".safetensors") for name in names):
        return CheckpointError(
            f"{INDEX_FILE}: is missing although there are safetensors files; download it with the other files"
        )
    return CheckpointError(f"{SINGLE_FILE}: neither it nor {INDEX_FILE} is in {directory.name!r}; set model correctly")


def _checked_tensors(
    found: Mapping[str, TensorInfo], architecture: DecoderArchitecture
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """The tensors a decoder of this architecture has, in its order, and the names of harmless others."""
    expected = architecture.outer_tensors()
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        expected.update({prefix + name: shape for name, shape in architecture.layer_tensors().items()})
    missing = [name for name in expected if name not in found]
    if missing:
        hint = "complete the download, or correct config.json"
        if missing == ["lm_head.weight"]:
            hint = "complete the download, or set tie_word_embeddings: true in config.json if the head is tied"
        elif not any(name.startswith("model.layers.") for name in found):
            hint = f"names begin with {next(iter(found), 'nothing')!r:.100} here: save the causal language model itself"
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}, which config.json calls for; {hint}")
    extra = [name for name in found if name not in expected]
    harmful = [name for name in extra if not _is_harmless(name, architecture)]
    if harmful:
        match = _LAYER.match(harmful[0])
        beyond = match is not None and int(match.group(1)) >= architecture.num_layers
        reason = f"num_hidden_layers is {architecture.num_layers}" if beyond else "a decoder of this kind has no such"
        raise CheckpointError(
            f"{found[harmful[0]].file}: holds {_some(harmful)} beyond what config.json describes ({reason}); "
            "correct config.json, or save the model without them"
        )
    for name, shape in expected.items():
        info = found[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has shape {info.shape}, and config.json calls for {shape}"
            )
        if info.dtype not in _FLOATS:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is {info.dtype}; served are {', '.join(_FLOATS)}. "
                "Set model to the float checkpoint"
            )
    return {name: found[name] for name in expected}, tuple(extra)


def _is_harmless(name: str, architecture: DecoderArchitecture) -> bool:
    return _HARMLESS.fullmatch(name) is not None or (name == "lm_head.weight" and architecture.tie_word_embeddings)
