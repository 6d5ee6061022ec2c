"""A source's tensors as a decoder has them: one by one and in floats, whatever form the files keep them in.

Experts that one tensor holds become a tensor each, which is a part of that one; weights in FP8 blocks, MXFP4 or packed
integers become floats, decoded when they are read (DeepSeek-V3 `inference/fp8_cast_bf16.py` does the same). No value is
read here.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import DTYPES, SPELLINGS, TensorInfo
from gs_dist.checkpoint.sources.directory import FileStamp, TensorBytes
from gs_dist.checkpoint.sources.encoded import EncodedSource, find_encoding, is_decoded
from gs_dist.checkpoint.sources.matrix import PlainMatrix, RowsOfMatrix, StoredMatrix, TransposedMatrix
from gs_dist.checkpoint.weight_files import WeightFiles, some
from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture, MixtureOfExperts
from gs_dist.recipe.sizes import DECODED_HELD

__all__ = ["LazyTensors", "SourceViews", "decode", "decodes", "view_tensors"]

Array = npt.NDArray[Any]

_BLOCK_ROWS = 256  # decoded at a time


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
    encoding = find_encoding(config, tensors, architecture.dtype) if decodes(config) else EncodedSource()
    coded = {encoding.module_of(name): name for name in tensors if encoding.encodes(name)}
    parts = _expert_parts(tensors, encoding, coded, architecture)
    for module, name in coded.items():
        info = tensors.pop(name)
        if name not in parts.wholes:
            matrix = encoded[f"{module}.weight"] = encoding.matrix(name)
            tensors[f"{module}.weight"] = _as_floats(f"{module}.weight", info, matrix)
    for name in encoding.auxiliary:
        del tensors[name]
    if coded:
        stay = ", and what stays in float is published so"
        notes.append(
            f"{len(coded)} weights are in {encoding.name}: they are decoded to {encoding.float_dtype} as they are "
            f"read{stay}"
        )
    elif decodes(config):
        notes.append(
            f"config.json: quantization_config speaks of weights in {encoding.name}, and every tensor is in float, as "
            "where they were decoded before: they are taken as they are"
        )
    if parts.wholes:
        fused = sorted(name for name in parts.wholes if ".experts." in name)
        tensors = {name: info for name, info in tensors.items() if name not in parts.wholes} | parts.tensors
        encoded |= parts.encoded
        notes.append(f"{some(fused)}: experts in one tensor are read a slice at a time and published one by one")
    return SourceViews(tensors=tensors, encoded=encoded, notes=tuple(notes))


def decodes(config: Mapping[str, Any]) -> bool:
    """Whether config.json names an encoding that is decoded while a model is calibrated.

    That is FP8 with a scale a block, MXFP4, or compressed-tensors' packed integers.
    """
    return is_decoded(config.get("quantization_config"))


def _as_floats(name: str, info: TensorInfo, matrix: StoredMatrix) -> TensorInfo:
    # Not by `dataclasses.replace`, which takes three times as long: DeepSeek-V3 has 45,808 of them.
    return TensorInfo(
        name=name,
        dtype=matrix.float_dtype,
        shape=matrix.shape,
        file=info.file,
        offset=info.offset,
        nbytes=math.prod(matrix.shape) * DTYPES[SPELLINGS[matrix.float_dtype]].itemsize,
        decoded=True,
    )


@dataclass(frozen=True)
class _ExpertParts:
    """Weights that fused tensors hold: by name, which of them have to be turned or decoded, and the fused ones."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    encoded: dict[str, StoredMatrix] = field(default_factory=dict)
    wholes: set[str] = field(default_factory=set)


def _expert_parts(
    tensors: Mapping[str, TensorInfo],
    encoding: EncodedSource,
    coded: Mapping[str, str],
    architecture: DecoderArchitecture,
) -> _ExpertParts:
    """Each expert's weights in fused tensors.

    transformers 5 keeps `experts.gate_up_proj` (E, 2 m, h), gates before ups, and `experts.down_proj` (E, h, m), for
    some families with inputs before outputs.
    """
    found = _ExpertParts()
    for layer, spec in enumerate(architecture.layers):
        if not isinstance(spec.mlp, MixtureOfExperts):
            continue
        prefix = architecture.layer_prefix(layer)
        experts, hidden, size = spec.mlp.num_experts, spec.mlp.hidden_size, spec.mlp.intermediate_size
        for place in spec.mlp.fused_places:
            names = [f"{prefix}{place}.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
            held = [coded.get(name, name) for name in names]
            if not all(name in tensors for name in held):
                continue
            shapes = ((2 * size, hidden), (hidden, size))
            wholes = [
                _fused(tensors[name], encoding, (experts, *shape)) for name, shape in zip(held, shapes, strict=True)
            ]
            found.wholes.update(held)
            router = f"{prefix}{place.removesuffix('.experts')}.gate.weight"
            if router in tensors and not place.startswith(f"{spec.mlp.prefix}."):
                name = f"{prefix}{spec.mlp.router.name}.weight"
                found.wholes.add(router)
                found.tensors[name] = dataclasses.replace(tensors[router], name=name)
            for number, (gate, up, down) in enumerate(spec.mlp.experts):
                for linear, whole, start in ((gate, wholes[0], 0), (up, wholes[0], size), (down, wholes[1], 0)):
                    name = f"{prefix}{linear.name}.weight"
                    part = RowsOfMatrix(matrix=whole[number], start=start, rows=linear.out_features)
                    found.tensors[name] = _place(name, part)
                    if not isinstance(part.matrix, PlainMatrix):
                        found.encoded[name] = part
    return found


def _fused(info: TensorInfo, encoding: EncodedSource, wanted: tuple[int, ...]) -> Sequence[StoredMatrix]:
    """The matrices (out, in) of all experts; with inputs before outputs only where their sizes tell so."""
    found: Sequence[StoredMatrix]
    if encoding.encodes(info.name):
        found = encoding.expert_matrices(info.name, interleaved=False)
    elif info.shape == (wanted[0], wanted[2], wanted[1]) != wanted:
        found = [TransposedMatrix(info=info, index=index) for index in range(wanted[0])]
    else:
        found = [PlainMatrix(info=info, index=index) for index in range(wanted[0])] if len(info.shape) == 3 else []
    if len(found) != wanted[0] or found[0].shape != wanted[1:] or info.shape[0] != wanted[0]:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r:.200} has shape {info.shape}, and experts of this config.json in one "
            f"tensor have {wanted}"
        )
    return found


def _place(name: str, part: RowsOfMatrix) -> TensorInfo:
    """Where plain rows lie in the file; what has to be turned or decoded has its whole tensor's place."""
    whole = part.matrix.tensors[0]
    made = _as_floats(name, whole, part)
    if not isinstance(part.matrix, PlainMatrix):
        return made
    row_bytes = made.nbytes // part.rows
    offset = whole.offset + (part.matrix.index * part.matrix.shape[0] + part.start) * row_bytes
    return dataclasses.replace(made, offset=offset, decoded=False)


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
            while len(self._held) > DECODED_HELD:
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
