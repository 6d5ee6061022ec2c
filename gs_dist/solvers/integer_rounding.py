"""int8 and int4 with a scale an output channel or group: `affine`'s rule, a block of rows at a time.

The codes and scales are those of `affine.quantize_weight`, bit for bit, in a third of the passes over memory.

Symmetric ranges can be searched, each by itself and the same however rows are cut into blocks:

* `least-error`: the whole range and shares of it down to a half; that of least squared error, the widest of equals.
* `ssz`: from the whole range on, the scale that fits the codes best in least squares, w . q / q . q, then new codes,
  for as long as it gets better (msmodelslim, `quantizer/impl/ssz.py`, `ssz_calculate_qparam`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from gs_dist.numbers.integer import INT4, INT8, Integer
from gs_dist.numbers.scales import round_scale
from gs_dist.results.quantized import Float32
from gs_dist.solvers.weight_rounding import RoundedRows, Rounder

__all__ = ["IntegerRounding", "RangeRule"]

RangeRule = Literal["min-max", "least-error", "ssz"]
NUMBERS = {8: INT8, 4: INT4}
_SHARES = tuple(1 - step / 40 for step in range(1, 21))  # of a range, tried beside the whole
_MOST_STEPS = 50  # of ssz, as upstream has it


@dataclass(frozen=True, kw_only=True)
class IntegerRounding:
    """Signed integers of `bits` (8 or 4); `group_size` input channels share a scale, all of a channel with 0.

    `ranges` says how symmetric ranges are found.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    ranges: RangeRule = "min-max"

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
        """The codes, and what a search tries."""
        return 1 if self.ranges == "min-max" else 5

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
        searches = form.symmetric and form.ranges != "min-max"
        self._search = _Search(form.ranges, self._numbers, block_rows * columns, scale_dtype) if searches else None

    def round(self, block: Float32) -> RoundedRows:
        rows, columns = block.shape
        grouped = block.reshape(-1, self._size)
        low, high = grouped.min(axis=1), grouped.max(axis=1)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("a value is not finite")
        scale, zero_point = self._numbers.range_parameters(
            low, high, symmetric=self._form.symmetric, scale_dtype=self._scale_dtype
        )
        if self._search is not None:
            scale = self._search.find(grouped, scale)
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


class _Search:
    """Looks for scales of less squared error than those of whole ranges."""

    def __init__(self, rule: RangeRule, numbers: Integer, size: int, scale_dtype: str) -> None:
        self._rule = rule
        self._limits = numbers.limits
        self._scale_dtype = scale_dtype
        self._tried = np.empty(size, dtype=np.float32)

    def find(self, grouped: Float32, whole: Float32) -> Float32:
        """Scales (groups,) for values (groups, size), given those of whole ranges; each the best that was tried."""
        tried = self._tried[: grouped.size].reshape(grouped.shape)
        best = whole.copy()
        least = self._error(grouped, best, tried)
        if self._rule == "ssz":
            self._refine(grouped, best, least, tried)
            return best
        for share in _SHARES:
            scale = round_scale(whole.astype(np.float64) * share, self._scale_dtype)
            self._keep_better(best, least, scale, self._error(grouped, scale, tried))
        return best

    def _refine(self, grouped: Float32, best: Float32, least: Float32, tried: Float32) -> None:
        scale = best
        for _ in range(_MOST_STEPS):
            self._round(grouped, scale, tried)
            products = np.einsum("ij,ij->i", grouped, tried, dtype=np.float64)
            squares = np.einsum("ij,ij->i", tried, tried, dtype=np.float64)
            fitted = np.where(squares > 0, products / np.maximum(squares, 1.0), scale)
            scale = round_scale(fitted, self._scale_dtype)
            if not self._keep_better(best, least, scale, self._error(grouped, scale, tried)):
                return

    @staticmethod
    def _keep_better(best: Float32, least: Float32, scale: Float32, errors: Float32) -> bool:
        """Takes scales of less error over; whether there was one."""
        better = errors < least
        np.copyto(best, scale, where=better)
        np.copyto(least, errors, where=better)
        return bool(better.any())

    def _error(self, grouped: Float32, scale: Float32, tried: Float32) -> Float32:
        """Squared error of each group; leaves the errors in `tried`."""
        self._round(grouped, scale, tried)
        tried *= scale[:, None]
        tried -= grouped
        errors: npt.NDArray[np.float32] = np.einsum("ij,ij->i", tried, tried)
        return errors

    def _round(self, grouped: Float32, scale: Float32, codes: Float32) -> None:
        np.divide(grouped, scale[:, None], out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, *self._limits, out=codes)
