"""Integers of 4 or 8 bits as compressed-tensors stores them: `weight_packed` (and `weight`) beside `weight_scale`.

`weight_packed` is int32 (out, ceil(in / per word)), `weight_scale` (out, groups), `weight_zero_point` int32
(ceil(out / per word), groups) where weights are asymmetric, `weight_shape` (2,). The value is (code - zero point) x
scale. Kimi-K2's experts are of this form. Source: compressed_tensors
`compressors/pack_quantized/base.py`, `quantization/lifecycle/forward.py`, `dequantize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import TensorInfo
from gs_dist.checkpoint.sources.directory import TensorBytes
from gs_dist.checkpoint.sources.matrix import Float32, RowReader, numpy_dtype

__all__ = ["PackedIntMatrix"]


@dataclass(frozen=True, kw_only=True)
class PackedIntMatrix:
    """Codes of `bits` (4 or 8) in int32 words along the inputs, scales a channel or group, and zero points if any."""

    info: TensorInfo
    scale: TensorInfo
    zero_point: TensorInfo | None
    stored_shape: TensorInfo | None
    bits: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.info.shape[0], self.columns

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Codes, scales, zero points and shape."""
        parts = (self.info, self.scale, self.zero_point, self.stored_shape)
        return tuple(info for info in parts if info is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self.tensors)

    @property
    def working_bytes(self) -> int:
        """Scales and zero points of the whole weight."""
        rows, groups = self.scale.shape
        return rows * groups * 12

    @property
    def float_dtype(self) -> str:
        """The scale's."""
        return self.scale.dtype

    def open(self, files: TensorBytes, block_rows: int) -> RowReader:
        """Reads scales and zero points, and codes as they are asked for."""
        return _PackedReader(self, files)


class _PackedReader:
    def __init__(self, matrix: PackedIntMatrix, files: TensorBytes) -> None:
        self._matrix = matrix
        self._files = files
        stored = np.empty(matrix.scale.shape, dtype=numpy_dtype(matrix.scale.dtype))
        files.read_into(matrix.scale, 0, stored)
        self._scale = stored.astype(np.float32)
        self._zero = np.zeros(matrix.scale.shape, dtype=np.float32)
        if matrix.zero_point is not None:
            words = np.empty(matrix.zero_point.shape, dtype=np.int32)
            files.read_into(matrix.zero_point, 0, words)
            self._zero += _unpack(words.T, matrix.bits, matrix.shape[0]).T

    def read(self, start: int, target: Float32) -> None:
        matrix, count = self._matrix, len(target)
        words = np.empty((count, matrix.info.shape[1]), dtype=np.int32)
        self._files.read_into(matrix.info, start * matrix.info.shape[1] * 4, words)
        groups = self._scale.shape[1]
        grouped = target.reshape(count, groups, -1)
        np.copyto(target, _unpack(words, matrix.bits, matrix.columns))
        if matrix.zero_point is not None:
            grouped -= self._zero[start : start + count, :, None]
        grouped *= self._scale[start : start + count, :, None]


def _unpack(words: npt.NDArray[Any], bits: int, columns: int) -> npt.NDArray[Any]:
    from gs_dist.checkpoint.dialects.compressed_tensors.packing import unpack_int32

    return unpack_int32(words, bits, columns)
