"""NVFP4: E2M1 in blocks of 16 inputs with a scale in E4M3 each, and one float32 scale for the whole tensor.

value = code x block scale / tensor scale, as compressed-tensors divides (`quantization/utils/helpers.py`,
generate_gparam). The tensor's scale is a power of two here: a block's scale then has the same bits wherever the
tensor's largest lies, so that blocks are solved apart from each other, and its products with codes are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gs_dist.numbers.scales import EPSILON, Float32
from gs_dist.numbers.small_float import SmallFloat

__all__ = ["NVFP4", "BlockScaledFloat"]

_E4M3 = ml_dtypes.float8_e4m3fn
_LARGEST = float(ml_dtypes.finfo(_E4M3).max)
_LEAST = float(ml_dtypes.finfo(_E4M3).smallest_subnormal)
_SIGNIFICANT = 4  # bits of E4M3, the leading one among them
_FURTHEST = 126  # exponent of the tensor's scale


@dataclass(frozen=True, kw_only=True)
class BlockScaledFloat(SmallFloat):
    """Codes of a `SmallFloat`; scales in E4M3, times a power of two that a tensor has once."""

    def symmetric_scale(self, max_abs: npt.ArrayLike, *, scale_dtype: str) -> Float32:
        """max_abs over the largest code, of as many bits as E4M3 has; `EPSILON` where that is 0."""
        wide = np.asarray(max_abs, dtype=np.float64)
        mantissa, exponent = np.frexp(np.where(wide > 0, wide / self.limits[1], EPSILON))
        rounded = np.ldexp(np.rint(np.ldexp(mantissa, _SIGNIFICANT)), np.maximum(exponent, -_FURTHEST) - _SIGNIFICANT)
        return np.asarray(rounded, dtype=np.float32)

    def tensor_scale(self, largest_scale: float) -> np.float32:
        """The power of two with which the largest scale of a tensor comes next to E4M3's largest value."""
        mantissa, exponent = np.frexp(largest_scale * self.unit / _LARGEST)
        power = (1 if mantissa == 0.5 else 0) - int(exponent)
        return np.float32(2.0 ** min(max(power, -_FURTHEST), _FURTHEST))

    def block_scales(self, scale: Float32, tensor_scale: np.float32) -> npt.NDArray[np.generic]:
        """E4M3, as stored; what lies so far below the tensor's largest that E4M3 lacks bits for it is rounded."""
        return np.maximum(scale * np.float32(self.unit) * tensor_scale, np.float32(_LEAST)).astype(_E4M3)

    def scales(self, stored: npt.NDArray[np.generic], tensor_scale: np.float32) -> Float32:
        """Inverse of `block_scales`."""
        return np.asarray(stored.astype(np.float32) / tensor_scale / np.float32(self.unit), dtype=np.float32)


NVFP4 = BlockScaledFloat(
    name="nvfp4",
    title="nvfp4",
    label="WNVFP4",
    bits=4,
    group_sizes=(16,),
    scale_bits=8,
    dtype=ml_dtypes.float4_e2m1fn,
    unit=2.0,
    range_ratios=(1.0, 1.125, 0.9375, 0.875, 0.8125, 0.75, 0.6875, 0.625, 0.5625, 0.5),  # E4M3 has few others
)
