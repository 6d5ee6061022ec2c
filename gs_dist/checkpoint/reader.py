"""A Hugging Face checkpoint directory: headers on opening, tensors as views of mapped files on demand."""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.companions import Companions, find_companions
from gs_dist.checkpoint.finite import refuse_not_finite
from gs_dist.checkpoint.header import DTYPES, SPELLINGS, TensorInfo, read_json
from gs_dist.checkpoint.paths import contained_path
from gs_dist.checkpoint.published_config import refuse_unwritable
from gs_dist.checkpoint.source_kind import refuse_adapter, refuse_quantized
from gs_dist.checkpoint.source_tensors import settle_tensors
from gs_dist.checkpoint.source_views import LazyTensors, decode, decodes, view_tensors
from gs_dist.checkpoint.sources.matrix import StoredMatrix
from gs_dist.checkpoint.weight_files import CONFIG_FILE, WeightFiles, fingerprint_of, some
from gs_dist.errors import CheckpointError
from gs_dist.model.families import read_architecture, unknown_keys
from gs_dist.recipe.dialects import description_files

__all__ = ["CheckpointReader"]

Array = npt.NDArray[Any]

_DTYPE_KEYS = ("torch_dtype", "dtype")  # of transformers 4, and of 5


class CheckpointReader:
    """Opens a directory by its headers alone and checks them against the architecture.

    Attributes:
        directory: the checkpoint directory.
        config: content of config.json; of a float checkpoint with `tie_word_embeddings` as its tensors have it.
        quantization_config: the value under that key, or None.
        architecture: what config.json describes. Where it states no dtype, the embedding's.
        tensors: name to `TensorInfo` of every tensor of the model, in model order.
        ignored: names of tensors on disk that no decoder needs (rotary buffers, the copy of a tied head).
        notes: what was read otherwise than it is written, and what was left out, for people.
    """

    def __init__(self, directory: Path | str, *, quantized: bool = False, serving_dtype: str | None = None) -> None:
        """Reads config.json, the index and every header; of tensors only those that two places hold, to compare them.

        Args:
            directory: holds config.json and model.safetensors, or an index and the files it names.
            quantized: for reading back what a format wrote: `quantization_config` is accepted, and
                tensors are not compared with the float architecture's; the format does that.
            serving_dtype: takes the place of the dtype that config.json states; tensors stay what they are.

        Raises:
            CheckpointError: a file is missing, damaged, contradictory or leads outside of the directory, or the
                weights are of no float causal language model.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"model: {str(directory)!r} is not a directory; set model to a checkpoint directory")
        if not quantized:
            refuse_adapter(self.directory)
        self._config_path = contained_path(self.directory, CONFIG_FILE)
        self.config = read_json(self._config_path, CONFIG_FILE)
        refuse_unwritable(self.config)
        self.quantization_config: Any = self.config.get("quantization_config")  # checked by the format that reads it
        if quantized:
            self._refuse_float()
        if serving_dtype is not None:
            stated = [key for key in _DTYPE_KEYS if key in self.config] or _DTYPE_KEYS[:1]
            self.config = {**self.config, **dict.fromkeys(stated, serving_dtype)}
        config = {k: v for k, v in self.config.items() if k != "quantization_config"}
        self.architecture = read_architecture(config)
        self._files = files = WeightFiles.find(self.directory)
        self._paths, self._headers = files.paths, files.headers
        self._encoded: Mapping[str, StoredMatrix] = {}
        self.tensors: Mapping[str, TensorInfo] = files.tensors
        self.ignored: tuple[str, ...] = ()
        self.notes = files.notes
        if not quantized:
            if not decodes(self.config):
                refuse_quantized(self.directory, self.config, files.tensors)
            self._settle(files)
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding and all(config.get(key) is None for key in _DTYPE_KEYS):
            self.architecture = dataclasses.replace(self.architecture, dtype=embedding.dtype)

    def _refuse_float(self) -> None:
        described = any((self.directory / name).is_file() for name in description_files())
        if not described and not isinstance(self.quantization_config, Mapping):
            raise CheckpointError(
                f"{CONFIG_FILE}: quantization_config is missing, and there is no {' or '.join(description_files())}: "
                "the checkpoint is not quantised"
            )

    def _settle(self, files: WeightFiles) -> None:
        views = view_tensors(files, self.config, self.architecture)
        self._encoded = views.encoded
        self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        settled = settle_tensors(dataclasses.replace(files, tensors=views.tensors), self.architecture)
        self.tensors, self.ignored = settled.tensors, settled.ignored
        self.notes = (*_config_notes(self.config), *views.notes, *settled.notes)
        if settled.tied is not self.architecture.tie_word_embeddings:
            self.config = {**self.config, "tie_word_embeddings": settled.tied}
        carried = tuple((name, settled.tensors[name].shape) for name in settled.carried)
        self.architecture = dataclasses.replace(self.architecture, tie_word_embeddings=settled.tied, carried=carried)

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

    def read(self, names: Iterable[str]) -> Mapping[str, Array]:
        """Tensors by name as read-only arrays that view the mapped file; bfloat16 as `ml_dtypes.bfloat16`.

        Opens only the files that hold them. A mapping lives as long as an array that views it. A tensor
        that its file does not align to its item size is copied. Encoded ones are decoded each time they are asked for,
        but for the last few.

        Raises:
            CheckpointError: a name the checkpoint does not hold, or a file that changed since it was opened.
        """
        names = list(names)
        unknown = [name for name in names if name not in self.tensors]
        if unknown:
            raise CheckpointError(f"tensor {unknown[0]!r} is not in the checkpoint {self.directory.name!r}")
        return self._read({name: self.tensors[name] for name in names})

    def _read(self, infos: Mapping[str, TensorInfo]) -> Mapping[str, Array]:
        """Tensors by the names given."""
        maps = {file: self._map(file) for file in sorted({info.file for info in infos.values()})}
        if self._encoded.keys().isdisjoint(info.name for info in infos.values()):
            return {name: _view(maps[info.file], info) for name, info in infos.items()}
        return LazyTensors({name: partial(self._load, maps[info.file], info) for name, info in infos.items()})

    def _load(self, mapped: mmap.mmap, info: TensorInfo) -> Array:
        matrix = self._encoded.get(info.name)
        return _view(mapped, info) if matrix is None else decode(self.directory, self._paths, matrix)

    def read_layer(self, layer: int) -> Mapping[str, Array]:
        """`read` of a decoder layer, by name within the layer."""
        return self._read(self.layer_tensors(layer))

    def read_outer(self) -> Mapping[str, Array]:
        """`read` of embedding, final norm and head, by full name."""
        return self.read(self.architecture.outer_tensors())

    @property
    def outer_part(self) -> tuple[str, ...]:
        """Names of what is published as it is: embedding, final norm, head, and what no decoder runs."""
        return (*self.architecture.outer_tensors(), *(name for name, _ in self.architecture.carried))

    def refuse_damaged_outer(self) -> None:
        """Looks at every value of embedding, final norm and head, most of which no calibration sample ever meets.

        Raises:
            CheckpointError: a value is not finite, or none of the serving dtype; the message names tensor and place.
        """
        outer = self.read_outer()
        files = {name: self.tensors[name].file for name in outer}
        refuse_not_finite(outer, files=files, names=outer, dtype=self.architecture.dtype)

    def companions(self) -> Companions:
        """The files that go along with the weights.

        Raises:
            CheckpointError: one that loaders read cannot be carried over.
        """
        return find_companions(self.directory)

    def fingerprint(self) -> str:
        """sha256, hexadecimal, of what tells one checkpoint from another without reading all of it.

        Covers config.json, and of each file in order of name: its name, its header, its size, and the
        first and last 64 KiB of its data. A change that touches none of these goes unnoticed.
        """
        return fingerprint_of(self._config_path, self._files)

    def _map(self, file: str) -> mmap.mmap:
        try:
            with self._paths[file].open("rb") as stream:
                header = stream.read(8 + len(self._headers[file]))[8:]
                view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read any more ({error!s:.200})") from error
        ends = [info.offset + info.nbytes for info in self._files.tensors.values() if info.file == file]
        if header != self._headers[file] or len(view) < max(ends, default=0):
            raise CheckpointError(
                f"{file}: changed since the checkpoint was opened; leave the model alone during a run"
            )
        return view


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


def _config_notes(config: Mapping[str, Any]) -> list[str]:
    notes = []
    unknown = unknown_keys(config)
    if unknown:
        notes.append(
            f"{CONFIG_FILE}: {some(list(unknown))} decide nothing in transformers' class of {config['model_type']} "
            "models: carried over, and not heeded"
        )
    if config.get("auto_map"):
        notes.append(
            f"{CONFIG_FILE}: auto_map names code of the model's own, which is not run: what transformers itself makes "
            f"of {config['model_type']} models is computed, and published without that code"
        )
    return notes
