"""MXFP4 experts as gpt-oss stores them: `<name>_blocks` beside `<name>_scales`.

`_blocks` is uint8 (experts, out, in / 32, 16), two E2M1 codes a byte, the lower one first; `_scales` uint8
(experts, out, in / 32) holds exponents of two, plus 127. Source: transformers `integrations/mxfp4.py`,
`convert_moe_packed_tensors`.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import TensorInfo
from gs_dist.checkpoint.sources.directory import TensorBytes
from gs_dist.checkpoint.sources.matrix import Float32, RowReader
from gs_dist.errors import CheckpointError

__all__ = ["Mxfp4Matrix"]

GROUP = 32  # codes that share a scale
_NAN = 255  # the exponent that stands for NaN (OCP Microscaling, section 5.4.1)
_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
# Both values of a byte at once: half as many look-ups.
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=1).view(np.uint64).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Mxfp4Matrix:
    """Expert `index` of `_blocks` and `_scales`.

    `interleaved`: outputs 0, 2, 4 ... come first and 1, 3, 5 ... then, as gpt-oss keeps gate and up.
    """

    info: TensorInfo
    scale: TensorInfo
    index: int
    float_dtype: str
    interleaved: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.info.shape[1], self.info.shape[2] * GROUP

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Codes and scales."""
        return (self.info, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        rows, columns = self.shape
        return rows * columns // 2 + rows * columns // GROUP

    @property
    def working_bytes(self) -> int:
        """The matrix as it is stored: interleaved rows are read once and handed out in two turns."""
        return self.nbytes

    def open(self, files: TensorBytes, block_rows: int) -> RowReader:
        """Reads the expert's codes and scales."""
        return _Mxfp4Reader(self, files)


class _Mxfp4Reader:
    def __init__(self, matrix: Mxfp4Matrix, files: TensorBytes) -> None:
        rows, columns = matrix.shape
        codes = np.empty((rows, columns // 2), dtype=np.uint8)
        scale = np.empty((rows, columns // GROUP), dtype=np.uint8)
        files.read_into(matrix.info, matrix.index * codes.nbytes, codes)
        files.read_into(matrix.scale, matrix.index * scale.nbytes, scale)
        if (scale == _NAN).any():
            raise CheckpointError(
                f"{matrix.scale.file}: tensor {matrix.scale.name!r:.200} holds the exponent {_NAN}, which is NaN; "
                "download the file again"
            )
        order = np.arange(rows)
        self._order = np.concatenate([order[0::2], order[1::2]]) if matrix.interleaved else order
        self._codes, self._scale = codes, scale

    def read(self, start: int, target: Float32) -> None:
        rows = self._order[start : start + len(target)]
        pairs = np.take(_PAIRS, self._codes[rows], mode="clip")
        values: npt.NDArray[np.float32] = pairs.view(np.float32).reshape(len(target), -1, GROUP)
        exponents = self._scale[rows].astype(np.int32) - 127
        np.multiply(
            values, np.ldexp(np.float32(1.0), exponents)[:, :, None], out=target.reshape(len(target), -1, GROUP)
        )
