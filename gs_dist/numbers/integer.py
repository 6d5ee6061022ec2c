"""Signed integers, from -2^(bits-1) to 2^(bits-1) - 1.

A symmetric scale is absmax/127.5 (int8) or absmax/7.5 (int4), as in golden-stick `cal_quantization_params` and
compressed-tensors `calculate_qparams`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gs_dist.numbers.number_format import NumberFormat
from gs_dist.numbers.scales import EPSILON, Float32, round_scale

__all__ = ["INT4", "INT8", "Integer"]


@dataclass(frozen=True, kw_only=True)
class Integer(NumberFormat):
    """Integers of `bits`."""

    zero_points: ClassVar[bool] = True

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def snap(self, values: Float32) -> None:
        """See `NumberFormat.snap`."""
        np.rint(values, out=values)
        np.clip(values, *self.limits, out=values)

    def symmetric_scale(self, max_abs: npt.ArrayLike, *, scale_dtype: str) -> Float32:
        """2 max_abs / (2^bits - 1), `EPSILON` where that is 0."""
        wide = np.asarray(max_abs, dtype=np.float64)
        return round_scale(np.where(wide > 0, 2.0 * wide / ((1 << self.bits) - 1), EPSILON), scale_dtype)

    def encode(self, codes: Float32) -> npt.NDArray[Any]:
        """int8 of the same shape."""
        return codes.astype(np.int8)

    def decode(self, stored: npt.NDArray[Any]) -> Float32:
        """float32 of the same shape."""
        return stored.astype(np.float32)


_GROUPS = (0, 64, 128, 256)

INT8 = Integer(name="int8", title="int8", label="W8", bits=8, group_sizes=_GROUPS, activations=("int8",))
INT4 = Integer(name="qint4x2", title="int4", label="W4", bits=4, group_sizes=_GROUPS, activations=("int8",))
