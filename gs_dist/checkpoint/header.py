"""The header of a safetensors file, read with distrust: nothing is allocated from a size that a file claims.

Format: https://github.com/huggingface/safetensors#format. Eight bytes hold the header's length, little
endian; the header is a JSON object from tensor name to dtype, shape and [begin, end) within the data that
follows; tensors cover the data without gap or overlap.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from gs_dist.errors import CheckpointError

__all__ = ["DTYPES", "SPELLINGS", "TensorInfo", "read_header", "read_json"]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Spelling in a header to NumPy dtype."""

_NAMES: Mapping[str, str] = {spelling: dtype.name for spelling, dtype in DTYPES.items()}  # `name` costs a microsecond

SPELLINGS: Mapping[str, str] = {dtype.name: spelling for spelling, dtype in DTYPES.items()}
"""Name of a NumPy dtype to its spelling in a header."""

_MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones too
_MAX_JSON = 64 << 20  # bytes; the index of a 405B model has 100 kB
_MAX_DIMENSIONS = 8
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor as its file's header describes it.

    `dtype` is NumPy's name ("float32", "bfloat16", "int8" ...), `file` the path relative to the
    checkpoint directory, `offset` the first byte within the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    decoded: bool = False  # what is read is made, not a view of the file


def read_json(path: Path, label: str) -> dict[str, Any]:
    """Content of a JSON file that holds one object; `label` names the file in messages.

    Raises:
        CheckpointError: missing, unreadable, too large, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(
            f"{label}: cannot be read ({error.strerror}); set model to a Hugging Face directory"
        ) from error
    if len(data) > _MAX_JSON:
        raise CheckpointError(f"{label}: has more than {_MAX_JSON} bytes, which no such file needs; replace it")
    try:
        value = json.loads(data, object_pairs_hook=_consistent)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: is not valid JSON ({error!s:.200}); download or write it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{label}: holds a JSON {type(value).__name__} where an object is expected")
    return value


def read_header(path: Path, label: str) -> tuple[dict[str, TensorInfo], bytes]:
    """Tensors of a safetensors file in order of their data, and the header's bytes as stored.

    Args:
        path: the file.
        label: its path relative to the checkpoint directory, for messages and `TensorInfo.file`.

    Raises:
        CheckpointError: the file contradicts itself; the message names file and tensor.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = _read_raw_header(file, size, label)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read ({error.strerror}); mend its permissions") from error
    start = 8 + len(raw)
    tensors = [_tensor(label, name, entry, start) for name, entry in _entries(raw, label)]
    _check_layout(sorted(tensors, key=lambda t: (t.offset, t.nbytes)), start, size, label)
    return {t.name: t for t in tensors}, raw


def _read_raw_header(file: BinaryIO, size: int, label: str) -> bytes:
    first = file.read(8)
    if first == b"version ":
        raise CheckpointError(f"{label}: is a Git LFS pointer, not the weights; run `git lfs pull` in the directory")
    if len(first) < 8:
        raise CheckpointError(f"{label}: has {size} bytes, too few for a safetensors file; download it again")
    (length,) = struct.unpack("<Q", first)
    if length > size - 8:
        raise CheckpointError(
            f"{label}: states a header of {length} bytes and has {size} bytes in all; it is truncated or not a "
            "safetensors file: download it again"
        )
    if length > _MAX_HEADER:
        raise CheckpointError(f"{label}: states a header of {length} bytes; more than {_MAX_HEADER} are not read")
    return file.read(length)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice!r:.200} occurs twice")
    return result


def _consistent(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, a key of which may occur twice with one value: which of two was meant cannot be known."""
    result = dict(pairs)
    if len(result) < len(pairs):
        for key, value in pairs:
            if result[key] != value:
                raise ValueError(f"key {key!r:.200} occurs twice, with different values")
    return result


def _entries(raw: bytes, label: str) -> list[tuple[str, Any]]:
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{label}: its header does not start with '{{'; it is not a safetensors file")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: its header is not valid JSON ({error!s:.200}); download it again") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{label}: __metadata__ of its header must map text to text; write the file again")
    return list(header.items())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(label: str, name: str, entry: Any, start: int) -> TensorInfo:
    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{label}: tensor {name!r:.200}: {what}; the file is damaged, download it again")

    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        raise fault(f"its entry must hold exactly {', '.join(sorted(_ENTRY_KEYS))}")
    spelling, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(spelling, str) or spelling not in DTYPES:
        raise fault(f"dtype {spelling!r:.100} is unknown; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise fault(f"shape {shape!r:.100} is not a list of up to {_MAX_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise fault(f"data_offsets {offsets!r:.100} are not two offsets")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[spelling].itemsize
    if end - begin != nbytes:
        raise fault(f"data_offsets {offsets} span {end - begin} bytes where {spelling} of shape {shape} takes {nbytes}")
    return TensorInfo(
        name=name, dtype=_NAMES[spelling], shape=tuple(shape), file=label, offset=start + begin, nbytes=nbytes
    )


def _check_layout(tensors: list[TensorInfo], start: int, size: int, label: str) -> None:
    """Tensors, sorted by offset, must cover the data exactly."""
    for left, right in itertools.pairwise(tensors):
        end = left.offset + left.nbytes
        if right.offset < end:
            raise CheckpointError(
                f"{label}: tensors {left.name!r:.200} and {right.name!r:.200} overlap in the data; the file is damaged"
            )
        if right.offset > end:
            raise CheckpointError(
                f"{label}: {right.offset - end} bytes before tensor {right.name!r:.200} belong to none; "
                "the file is damaged"
            )
    end = tensors[-1].offset + tensors[-1].nbytes if tensors else start
    if tensors and tensors[0].offset != start:
        raise CheckpointError(
            f"{label}: tensor {tensors[0].name!r:.200} starts {tensors[0].offset - start} bytes into the data "
            "and nothing stands before it; the file is damaged"
        )
    if end > size:
        cut = next(t for t in tensors if t.offset + t.nbytes > size)
        raise CheckpointError(
            f"{label}: tensor {cut.name!r:.200} ends at byte {cut.offset + cut.nbytes} of a file of {size} bytes: "
            "the file is truncated, download it again"
        )
    if end < size:
        raise CheckpointError(f"{label}: {size - end} bytes after the last tensor belong to none; the file is damaged")
