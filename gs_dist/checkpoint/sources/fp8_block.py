"""FP8 weights with a scale a block: DeepSeek-V3, Qwen3-FP8 and others, `weight` beside `weight_scale_inv`.

`weight` is E4M3 (out, in), `weight_scale_inv` (ceil(out / b), ceil(in / b)) is what a block is multiplied by, b being
`quantization_config.weight_block_size`, 128 as a rule; blocks at the edges are cut short. Sources: DeepSeek-V3
`inference/fp8_cast_bf16.py`, transformers `integrations/finegrained_fp8.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import TensorInfo
from gs_dist.checkpoint.sources.directory import TensorBytes
from gs_dist.checkpoint.sources.matrix import Float32, RowReader, numpy_dtype
from gs_dist.errors import CheckpointError

__all__ = ["Fp8BlockMatrix", "decode_e4m3"]

_REBIAS = np.float32(2.0**120)  # between the exponents' biases, 127 and 7


def decode_e4m3(codes: npt.NDArray[np.uint8], scratch: npt.NDArray[np.int32], target: Float32) -> None:
    """E4M3 bytes to float32, exactly, subnormals included; NaN codes are the caller's to look for.

    A code's seven lower bits, moved to where a float32 keeps exponent and mantissa, are the value over 2^120.
    """
    np.copyto(scratch, codes.view(np.int8))  # the sign spreads over the upper bits
    np.left_shift(scratch, 20, out=scratch)
    np.bitwise_and(scratch, np.int32(-0x78100000), out=scratch)  # 0x87F00000: sign, four of exponent, three of mantissa
    np.multiply(scratch.view(np.float32), _REBIAS, out=target)


@dataclass(frozen=True, kw_only=True)
class Fp8BlockMatrix:
    """E4M3 (out, in), or expert `index` of (experts, out, in), and its scales, a block each."""

    info: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]
    float_dtype: str
    index: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.info.shape[-2], self.info.shape[-1]

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Scales that the blocks call for, those cut short included."""
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Codes and scales."""
        return (self.info, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.shape[0] * self.shape[1] + self._scale_bytes

    @property
    def _scale_bytes(self) -> int:
        return self.scale_shape[0] * self.scale_shape[1] * numpy_dtype(self.scale.dtype).itemsize

    @property
    def working_bytes(self) -> int:
        """The scales, and those of a row spread over its columns."""
        return self._scale_bytes + 4 * self.scale_shape[0] * self.scale_shape[1] + 4 * self.shape[1]

    def open(self, files: TensorBytes, block_rows: int) -> RowReader:
        """Reads the scales, and codes as they are asked for."""
        return _Fp8Reader(self, files, block_rows)


class _Fp8Reader:
    def __init__(self, matrix: Fp8BlockMatrix, files: TensorBytes, block_rows: int) -> None:
        self._matrix = matrix
        self._files = files
        stored = np.empty(matrix.scale_shape, dtype=numpy_dtype(matrix.scale.dtype))
        files.read_into(matrix.scale, matrix.index * stored.nbytes, stored)
        self._scale = stored.astype(np.float32)
        if not (np.isfinite(self._scale).all() and (self._scale >= 0).all()):
            raise CheckpointError(
                f"{matrix.scale.file}: tensor {matrix.scale.name!r:.200} holds scales that are negative or not finite; "
                "download the file again"
            )
        self._codes = np.empty((block_rows, matrix.shape[1]), dtype=np.uint8)
        self._scratch = np.empty((block_rows, matrix.shape[1]), dtype=np.int32)

    def read(self, start: int, target: Float32) -> None:
        matrix, count = self._matrix, len(target)
        rows, columns = matrix.block
        codes = self._codes[:count]
        self._files.read_into(matrix.info, (matrix.index * matrix.shape[0] + start) * matrix.shape[1], codes)
        decode_e4m3(codes, self._scratch[:count], target)
        if (codes & 0x7F).max() == 0x7F:
            raise CheckpointError(f"{matrix.info.file}: tensor {matrix.info.name!r:.200} holds NaN; download it again")
        done = 0
        while done < count:
            block = (start + done) // rows
            stop = min(count, (block + 1) * rows - start)
            spread = np.repeat(self._scale[block], columns)[: matrix.shape[1]]
            target[done:stop] *= spread
            done = stop
