"""int8 and int4 with a scale an output channel or group: `affine`'s rule, a block of rows at a time.

The codes and scales are those of `affine.quantise_weight`, bit for bit, in a third of the passes over memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gs_dist.numbers.integer import INT4, INT8
from gs_dist.results.quantized import Float32
from gs_dist.solvers.weight_rounding import RoundedRows, Rounder

__all__ = ["IntegerRounding"]

NUMBERS = {8: INT8, 4: INT4}


@dataclass(frozen=True, kw_only=True)
class IntegerRounding:
    """Signed integers of `bits` (8 or 4); `group_size` input channels share a scale, all of a channel with 0."""

    bits: int
    group_size: int = 0
    symmetric: bool = True

    @property
    def label(self) -> str:
        """See `WeightRounding.label`."""
        return f"{NUMBERS[self.bits].label}-{'pergroup' if self.group_size else 'perchannel'}"

    @property
    def row_step(self) -> int:
        """Rows are independent."""
        return 1

    @property
    def bytes_per_value(self) -> int:
        """The codes."""
        return 1

    def misfit(self, rows: int, columns: int) -> str | None:
        """See `WeightRounding.misfit`."""
        if self.group_size and columns % self.group_size:
            return (
                f"has {columns} input channels, which do not divide into groups of {self.group_size}: choose another "
                "group_size, or give it another scheme in layer_policies"
            )
        return None

    def rounder(self, block_rows: int, columns: int, scale_dtype: str) -> Rounder:
        """See `WeightRounding.rounder`."""
        return _IntegerRounder(self, block_rows, columns, scale_dtype)

    def restore(self, rounded: RoundedRows, target: Float32) -> None:
        """See `WeightRounding.restore`."""
        np.copyto(target, rounded.codes)
        grouped = target.reshape(*rounded.scale.shape, -1)
        if rounded.zero_point is not None:
            grouped -= rounded.zero_point[:, :, None].astype(np.float32)
        grouped *= rounded.scale[:, :, None]


class _IntegerRounder:
    def __init__(self, form: IntegerRounding, block_rows: int, columns: int, scale_dtype: str) -> None:
        self._form = form
        self._scale_dtype = scale_dtype
        self._size = form.group_size or columns
        self._numbers = NUMBERS[form.bits]
        self._limits = self._numbers.limits
        self._codes = np.empty((block_rows, columns), dtype=np.int8)
        self._reach = 0.0  # the largest code that the block calls for

    def round(self, block: Float32) -> RoundedRows:
        rows, columns = block.shape
        grouped = block.reshape(-1, self._size)
        low, high = grouped.min(axis=1), grouped.max(axis=1)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("a value is not finite")
        scale, zero_point = self._numbers.range_parameters(
            low, high, symmetric=self._form.symmetric, scale_dtype=self._scale_dtype
        )
        self._reach = float(np.rint(np.maximum(-low, high) / scale).max(initial=0.0))
        np.divide(grouped, scale[:, None], out=grouped)
        if zero_point is not None:
            grouped += zero_point[:, None].astype(np.float32)
        np.rint(grouped, out=grouped)
        self._clip(grouped)
        codes = self._codes[:rows]
        np.copyto(codes, block, casting="unsafe")
        groups = columns // self._size
        return RoundedRows(
            codes=codes,
            scale=scale.reshape(rows, groups),
            zero_point=None if zero_point is None else zero_point.reshape(rows, groups),
        )

    def _clip(self, grouped: Float32) -> None:
        """Only the side that something lies beyond: a scale rounded down takes the largest weight past the top code."""
        bottom, top = self._limits
        if self._form.symmetric and self._reach > top:
            np.minimum(grouped, np.float32(top), out=grouped)
        if not self._form.symmetric or self._reach >= -bottom + 1:
            np.clip(grouped, bottom, top, out=grouped)
