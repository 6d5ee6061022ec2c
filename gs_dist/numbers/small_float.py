"""Floating point of 8 and 4 bits, with a scale of any value or, in blocks of 32, a power of two.

FP8 is E4M3 without infinities (OCP 8-bit Floating Point, section 5). Blocks of 32 with a scale in E8M0 (the exponent
plus 127 in a byte) are MXFP8 and MXFP4 of OCP Microscaling Formats 1.0, section 5; section 6.3 gives the scale's rule:
the exponent of the block's largest magnitude less that of the format's largest value, whatever lies beyond saturating.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gs_dist.numbers.number_format import NumberFormat
from gs_dist.numbers.scales import EPSILON, Float32, power_of_two_below, round_scale

__all__ = ["FP8", "MXFP4", "MXFP8", "SmallFloat"]

_E8M0_BIAS = 127
_EXPONENT = np.int32(0x7F800000)  # of a float32


@dataclass(frozen=True, kw_only=True)
class SmallFloat(NumberFormat):
    """Values of a NumPy dtype.

    Attributes:
        dtype: of ml_dtypes, whose bit patterns are what is stored.
    """

    dtype: npt.DTypeLike

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest code."""
        largest = float(ml_dtypes.finfo(self.dtype).max) * self.unit
        return -largest, largest

    def snap(self, values: Float32) -> None:
        """See `NumberFormat.snap`."""
        np.clip(values, *self.limits, out=values)
        found = ml_dtypes.finfo(self.dtype)
        # The octave of each magnitude, by its exponent's bits, and the distance of codes within it.
        step = (values.view(np.int32) & _EXPONENT).view(np.float32)
        np.maximum(step, np.float32(float(found.smallest_normal) * self.unit), out=step)
        step *= np.float32(2.0**-found.nmant)
        values /= step
        np.rint(values, out=values)
        values *= step

    def symmetric_scale(self, max_abs: npt.ArrayLike, *, scale_dtype: str) -> Float32:
        """max_abs over the largest code, `EPSILON` where that is 0; a power of two where scales are."""
        wide, largest = np.asarray(max_abs, dtype=np.float64), self.limits[1]
        if self.scale_bits is None:
            return round_scale(np.where(wide > 0, wide / largest, EPSILON), scale_dtype)
        exact = power_of_two_below(np.where(wide > 0, wide, EPSILON)) / power_of_two_below(np.array(largest))
        return np.maximum(exact, 2.0**-126).astype(np.float32)

    def encode(self, codes: Float32) -> npt.NDArray[Any]:
        """Bit patterns, uint8 of the same shape; 4 bits are in the lower half of each byte."""
        exact = codes if self.unit == 1.0 else codes * np.float32(1.0 / self.unit)
        return exact.astype(self.dtype).view(np.uint8)

    def decode(self, stored: npt.NDArray[Any]) -> Float32:
        """float32 of the same shape."""
        values = stored.view(self.dtype).astype(np.float32)
        return values if self.unit == 1.0 else values * np.float32(self.unit)

    def encode_scale(self, scale: Float32) -> npt.NDArray[np.uint8]:
        """Scales that are powers of two, as their exponents plus 127; a code's `unit` is the scale's when stored."""
        _, exponent = np.frexp(scale * np.float32(self.unit))
        return np.asarray(exponent - 1 + _E8M0_BIAS, dtype=np.uint8)

    def decode_scale(self, stored: npt.NDArray[np.uint8]) -> Float32:
        """Inverse of `encode_scale`."""
        exponent = stored.astype(np.int32) - _E8M0_BIAS
        return np.asarray(np.ldexp(np.float32(1.0 / self.unit), exponent), dtype=np.float32)


_E4M3 = ml_dtypes.float8_e4m3fn
FP8 = SmallFloat(name="fp8_e4m3", title="fp8", label="WFP8", bits=8, group_sizes=(0,), dtype=_E4M3)
MXFP8 = SmallFloat(name="mxfp8", title="mxfp8", label="WMXFP8", bits=8, group_sizes=(32,), scale_bits=8, dtype=_E4M3)
# Twice E2M1's values, 0, 1, 2, 3, 4, 6, 8 and 12 of either sign, are whole numbers, which a code in int8 can hold.
MXFP4 = SmallFloat(
    name="mxfp4",
    title="mxfp4",
    label="WMXFP4",
    bits=4,
    group_sizes=(32,),
    scale_bits=8,
    dtype=ml_dtypes.float4_e2m1fn,
    unit=2.0,
    range_ratios=(1.0, 2.0, 0.5),  # a scale that is a power of two has no others
)
