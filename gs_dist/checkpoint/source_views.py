"""A source's tensors as a decoder has them: one by one and in floats, whatever form the files keep them in.

Experts that one tensor holds become a tensor each, which is a part of that one; weights in FP8 blocks become floats of
the model's dtype, decoded when they are read (DeepSeek-V3 `inference/fp8_cast_bf16.py` does the same). No value is read
here.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import DTYPES, SPELLINGS, TensorInfo
from gs_dist.checkpoint.sources.directory import FileStamp, TensorBytes
from gs_dist.checkpoint.sources.encoded import find_encoding
from gs_dist.checkpoint.sources.matrix import StoredMatrix
from gs_dist.checkpoint.weight_files import WeightFiles, some
from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture, MixtureOfExperts

__all__ = ["LazyTensors", "SourceViews", "decode", "decodes", "view_tensors"]

Array = npt.NDArray[Any]

_BLOCK_ROWS = 256  # decoded at a time
_HELD = 4  # decoded tensors that a mapping keeps: a solver reads some weights in turns, a block of rows at a time


@dataclass(frozen=True, kw_only=True)
class SourceViews:
    """Tensors as a decoder has them.

    Attributes:
        tensors: by name, as if the files held them so. The bytes of an encoded one are elsewhere and fewer.
        encoded: name to what decodes it.
        notes: what was taken apart or is decoded, for people.
    """

    tensors: Mapping[str, TensorInfo]
    encoded: Mapping[str, StoredMatrix] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def view_tensors(files: WeightFiles, config: Mapping[str, Any], architecture: DecoderArchitecture) -> SourceViews:
    """What the files hold, seen as floats one by one.

    Raises:
        CheckpointError: codes without their scales, or fused experts of another shape than config.json calls for.
    """
    tensors, encoded, notes = dict(files.tensors), {}, []
    if decodes(config):
        encoding = find_encoding(config, tensors, architecture.dtype)
        for name in [name for name in tensors if encoding.encodes(name)]:
            encoded[name] = encoding.matrix(name)
            tensors[name] = _as_floats(tensors[name], architecture.dtype)
        for name in encoding.auxiliary:
            del tensors[name]
        if encoded:
            notes.append(
                f"{len(encoded)} weights are in {encoding.name}: they are decoded to {architecture.dtype} as they are "
                "read, and what stays in float is published so"
            )
    parts = _expert_parts(tensors, architecture)
    fused = sorted({whole for whole, _ in parts.values()})
    if fused:
        if any(name in encoded for name in fused):
            raise CheckpointError(f"{some(fused)}: fused experts in FP8 are not taken apart: convert them to bfloat16")
        tensors = {name: info for name, info in tensors.items() if name not in fused}
        tensors |= {name: info for name, (_, info) in parts.items()}
        notes.append(f"{some(fused)}: experts in one tensor are read a slice at a time and published one by one")
    return SourceViews(tensors=tensors, encoded=encoded, notes=tuple(notes))


def decodes(config: Mapping[str, Any]) -> bool:
    """Whether config.json names an encoding that is decoded while a model is calibrated: FP8 with a scale a block."""
    stated = config.get("quantization_config")
    if not isinstance(stated, Mapping):
        return False
    return stated.get("quant_method") == "fp8" and stated.get("weight_block_size") is not None


def _as_floats(info: TensorInfo, dtype: str) -> TensorInfo:
    size = DTYPES[SPELLINGS[dtype]].itemsize
    # Not by `dataclasses.replace`, which takes three times as long: DeepSeek-V3 has 45,808 of them.
    return TensorInfo(
        name=info.name,
        dtype=dtype,
        shape=info.shape,
        file=info.file,
        offset=info.offset,
        nbytes=math.prod(info.shape) * size,
    )


def _expert_parts(
    tensors: Mapping[str, TensorInfo], architecture: DecoderArchitecture
) -> dict[str, tuple[str, TensorInfo]]:
    """Name of each expert's weight to the fused tensor that holds it, and to its place there.

    transformers 5 keeps `experts.gate_up_proj` (E, 2 m, h), gates before ups, and `experts.down_proj` (E, h, m).
    """
    found: dict[str, tuple[str, TensorInfo]] = {}
    for layer, spec in enumerate(architecture.layers):
        if not isinstance(spec.mlp, MixtureOfExperts):
            continue
        prefix = architecture.layer_prefix(layer)
        together = f"{prefix}{spec.mlp.prefix}.experts"
        up, down = tensors.get(f"{together}.gate_up_proj"), tensors.get(f"{together}.down_proj")
        if up is None or down is None:
            continue
        experts, hidden, size = spec.mlp.num_experts, spec.mlp.hidden_size, spec.mlp.intermediate_size
        _refuse_shape(up, (experts, 2 * size, hidden))
        _refuse_shape(down, (experts, hidden, size))
        for number, (gate_linear, up_linear, down_linear) in enumerate(spec.mlp.experts):
            parts = ((gate_linear, up, 2 * number), (up_linear, up, 2 * number + 1), (down_linear, down, number))
            for linear, whole, place in parts:
                name = f"{prefix}{linear.name}.weight"
                shape = (linear.out_features, linear.in_features)
                nbytes = math.prod(shape) * DTYPES[SPELLINGS[whole.dtype]].itemsize
                offset = whole.offset + place * nbytes
                part = dataclasses.replace(whole, name=name, shape=shape, offset=offset, nbytes=nbytes)
                found[name] = (whole.name, part)
    return found


def _refuse_shape(info: TensorInfo, wanted: tuple[int, ...]) -> None:
    if info.shape != wanted:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r:.200} has shape {info.shape}, and experts of this config.json in one "
            f"tensor have {wanted}"
        )


class LazyTensors(Mapping[str, Array]):
    """Tensors by name, decoded or viewed when they are asked for; a few are kept.

    None exists twice: threads that ask for one at a time wait for the first, and get its array for as long as anyone
    holds it.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Array]]) -> None:
        self._loaders = loaders
        self._held: OrderedDict[str, Array] = OrderedDict()
        self._alive: WeakValueDictionary[str, Array] = WeakValueDictionary()
        self._lock = Lock()
        self._turns = {name: Lock() for name in loaders}

    def __getitem__(self, name: str) -> Array:
        with self._turns[name]:
            with self._lock:
                array = self._alive.get(name)
            if array is None:
                array = self._loaders[name]()
            self._keep(name, array)
        return array

    def _keep(self, name: str, array: Array) -> None:
        with self._lock:
            self._alive[name] = self._held[name] = array
            self._held.move_to_end(name)
            while len(self._held) > _HELD:
                self._held.popitem(last=False)

    def __contains__(self, name: object) -> bool:
        return name in self._loaders  # a mapping's own way would decode it

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


def decode(directory: Path, paths: Mapping[str, Path], matrix: StoredMatrix) -> Array:
    """A weight (out, in) in its float dtype, read-only; a block of rows is in float32 at a time."""
    stamps = {info.file: FileStamp.of(paths[info.file].stat()) for info in matrix.tensors}
    rows, columns = matrix.shape
    made = np.empty(matrix.shape, DTYPES[SPELLINGS[matrix.float_dtype]])
    block = np.empty((min(_BLOCK_ROWS, rows), columns), np.float32)
    with TensorBytes(directory, stamps) as files:
        reader = matrix.open(files, len(block))
        for start in range(0, rows, len(block)):
            target = block[: rows - start]
            reader.read(start, target)
            made[start : start + len(target)] = target
    made.flags.writeable = False
    return made
