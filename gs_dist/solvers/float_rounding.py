"""FP8 with a scale an output channel or a block, and the microscaling formats MXFP8 and MXFP4.

A microscaling block is 32 input channels with one scale, a power of two stored as its exponent plus 127 (OCP
Microscaling Formats 1.0, section 5). Which power is a matter of rule:

* `floor`: the exponent of the largest magnitude less that of the format's largest value, as the specification has it;
  what lies beyond the format then saturates.
* `ceil`: the smallest power with which nothing saturates.
* `least-error`: of the two, the one with the smaller squared error, block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from gs_dist.numbers.scales import Float32, power_of_two_below
from gs_dist.numbers.small_float import FP8, MXFP4, SmallFloat
from gs_dist.solvers.minifloat import MinifloatEncoder
from gs_dist.solvers.weight_rounding import EXPONENT_BIAS, RoundedRows, Rounder

__all__ = ["MX_BLOCK", "Fp8BlockRounding", "Fp8ChannelRounding", "MicroscalingRounding", "ScaleRule"]

ScaleRule = Literal["floor", "ceil", "least-error"]
MX_BLOCK = 32
# All bits of a float32 but the sign: magnitudes compare as integers do, infinities and NaN above all.
_MAGNITUDE = np.int32(0x7FFFFFFF)


# Value of every code, by bits.
_VALUES = {
    form.bits: np.asarray(form.decode(np.arange(1 << form.bits, dtype=np.uint8)) / np.float32(form.unit))
    for form in (FP8, MXFP4)
}


def _look_up(form: SmallFloat, codes: npt.NDArray[np.uint8], target: Float32) -> None:
    """Fills `target` with the values of codes; no code is beyond the table, which `clip` spares a look at."""
    np.take(_VALUES[form.bits], codes, out=target, mode="clip")


def _refuse_not_finite(largest: Float32) -> None:
    if not np.isfinite(largest).all():
        raise ValueError("a value is not finite")


@dataclass(frozen=True, kw_only=True)
class Fp8ChannelRounding:
    """E4M3 with a scale an output channel: absmax / 448, rounded to the dtype that it is stored in."""

    @property
    def label(self) -> str:
        """See `WeightRounding.label`."""
        return f"{FP8.label}-perchannel"

    @property
    def row_step(self) -> int:
        """Rows are independent."""
        return 1

    @property
    def bytes_per_value(self) -> int:
        """Codes, signs, and the encoder's two arrays and constant."""
        return 14

    def misfit(self, rows: int, columns: int) -> str | None:
        """See `WeightRounding.misfit`."""
        return None

    def rounder(self, block_rows: int, columns: int, scale_dtype: str) -> Rounder:
        """See `WeightRounding.rounder`."""
        return _Fp8ChannelRounder(block_rows, columns, scale_dtype)

    def restore(self, rounded: RoundedRows, target: Float32) -> None:
        """See `WeightRounding.restore`."""
        _look_up(FP8, rounded.codes, target)
        target *= rounded.scale


class _Fp8ChannelRounder:
    def __init__(self, block_rows: int, columns: int, scale_dtype: str) -> None:
        self._scale_dtype = scale_dtype
        self._encoder = MinifloatEncoder(FP8, block_rows * columns)
        self._codes = np.empty((block_rows, columns), dtype=np.uint8)

    def round(self, block: Float32) -> RoundedRows:
        largest = np.maximum(-block.min(axis=1), block.max(axis=1))
        _refuse_not_finite(largest)
        scale = FP8.symmetric_scale(largest, scale_dtype=self._scale_dtype)
        np.divide(block, scale[:, None], out=block)
        codes = self._codes[: len(block)]
        self._encoder.encode(block, codes)
        return RoundedRows(codes=codes, scale=scale[:, None])


@dataclass(frozen=True, kw_only=True)
class Fp8BlockRounding:
    """E4M3 with a scale a block of `size` x `size`; blocks at the edges are cut short."""

    size: int = 128

    @property
    def label(self) -> str:
        """See `WeightRounding.label`."""
        return f"{FP8.label}-perblock"

    @property
    def row_step(self) -> int:
        """The rows of a block."""
        return self.size

    @property
    def bytes_per_value(self) -> int:
        """As `Fp8ChannelRounding`, and the block padded to whole blocks."""
        return 18

    def misfit(self, rows: int, columns: int) -> str | None:
        """See `WeightRounding.misfit`."""
        return None

    def rounder(self, block_rows: int, columns: int, scale_dtype: str) -> Rounder:
        """See `WeightRounding.rounder`."""
        return _Fp8BlockRounder(self.size, block_rows, columns, scale_dtype)

    def restore(self, rounded: RoundedRows, target: Float32) -> None:
        """See `WeightRounding.restore`."""
        _look_up(FP8, rounded.codes, target)
        for number, row in enumerate(range(0, len(target), self.size)):
            target[row : row + self.size] *= np.repeat(rounded.scale[number], self.size)[: target.shape[1]]


class _Fp8BlockRounder:
    def __init__(self, size: int, block_rows: int, columns: int, scale_dtype: str) -> None:
        self._size = size
        self._scale_dtype = scale_dtype
        self._encoder = MinifloatEncoder(FP8, block_rows * columns)
        self._codes = np.empty((block_rows, columns), dtype=np.uint8)

    def round(self, block: Float32) -> RoundedRows:
        rows, columns = block.shape
        starts = np.arange(0, columns, self._size)
        magnitudes = block.view(np.int32) & _MAGNITUDE
        by_column = [magnitudes[row : row + self._size].max(axis=0) for row in range(0, rows, self._size)]
        largest = np.maximum.reduceat(np.stack(by_column), starts, axis=1).view(np.float32)
        _refuse_not_finite(largest)
        scale = FP8.symmetric_scale(largest, scale_dtype=self._scale_dtype)
        for number, row in enumerate(range(0, rows, self._size)):
            spread = np.repeat(scale[number], self._size)[:columns]
            block[row : row + self._size] /= spread
        codes = self._codes[:rows]
        self._encoder.encode(block, codes)
        return RoundedRows(codes=codes, scale=scale)


@dataclass(frozen=True, kw_only=True)
class MicroscalingRounding:
    """E4M3 or E2M1 with a power of two a block of 32 input channels; E2M1 codes a byte each."""

    element: SmallFloat
    rule: ScaleRule = "least-error"

    @property
    def label(self) -> str:
        """See `WeightRounding.label`."""
        return f"{self.element.label}-pergroup"

    @property
    def row_step(self) -> int:
        """Rows are independent."""
        return 1

    @property
    def bytes_per_value(self) -> int:
        """Codes twice, signs, the encoder's arrays, the scaled block, and values and errors of two trials."""
        return 36

    def misfit(self, rows: int, columns: int) -> str | None:
        """See `WeightRounding.misfit`."""
        if columns % MX_BLOCK:
            return (
                f"has {columns} input channels, which do not divide into microscaling blocks of {MX_BLOCK}: give it "
                "another scheme in layer_policies, or null"
            )
        return None

    def rounder(self, block_rows: int, columns: int, scale_dtype: str) -> Rounder:
        """See `WeightRounding.rounder`; the scale's dtype is a byte whatever is asked for."""
        return _MicroscalingRounder(self, block_rows, columns)

    def restore(self, rounded: RoundedRows, target: Float32) -> None:
        """See `WeightRounding.restore`."""
        _look_up(self.element, rounded.codes, target)
        target.reshape(-1, MX_BLOCK)[...] *= rounded.steps().reshape(-1, 1)


class _MicroscalingRounder:
    def __init__(self, form: MicroscalingRounding, block_rows: int, columns: int) -> None:
        self._form = form
        self._columns = columns
        self._encoder = MinifloatEncoder(form.element, block_rows * columns)
        self._values = _VALUES[form.element.bits]
        self._codes = np.empty((block_rows, columns), dtype=np.uint8)
        self._other = np.empty((block_rows, columns), dtype=np.uint8)
        self._scaled = np.empty((block_rows, columns), dtype=np.float32)

    def round(self, block: Float32) -> RoundedRows:
        rows = len(block)
        grouped = block.reshape(-1, MX_BLOCK)
        largest = _largest_of_blocks(block)
        _refuse_not_finite(largest)
        floor, ceil = exponents(largest, self._form.element)
        codes = self._codes[:rows]
        if self._form.rule != "least-error":
            chosen = floor if self._form.rule == "floor" else ceil
            self._encode(grouped, chosen, codes)
            return RoundedRows(codes=codes, scale=_stored(chosen, rows))
        self._encode(grouped, floor, codes)
        differing = np.flatnonzero(ceil != floor)
        if len(differing):
            self._choose(grouped, floor, ceil, differing, codes)
        return RoundedRows(codes=codes, scale=_stored(floor, rows))

    def _encode(self, grouped: Float32, chosen: npt.NDArray[np.int32], codes: npt.NDArray[np.uint8]) -> None:
        scaled = self._scaled.reshape(-1, MX_BLOCK)[: len(grouped)]
        np.multiply(grouped, np.ldexp(np.float32(1), -chosen)[:, None], out=scaled)
        self._encoder.encode(scaled, codes.reshape(-1)[: scaled.size])

    def _choose(
        self,
        grouped: Float32,
        floor: npt.NDArray[np.int32],
        ceil: npt.NDArray[np.int32],
        differing: npt.NDArray[np.intp],
        codes: npt.NDArray[np.uint8],
    ) -> None:
        """Takes `ceil` for the blocks, among those where the two differ, that have the smaller error with it."""
        mine = grouped[differing]
        by_floor = codes.reshape(-1, MX_BLOCK)[differing]
        by_ceil = self._other.reshape(-1, MX_BLOCK)[: len(differing)]
        self._encode(mine, ceil[differing], by_ceil)
        better = self._error(mine, by_ceil, ceil[differing]) < self._error(mine, by_floor, floor[differing])
        taken = differing[better]
        codes.reshape(-1, MX_BLOCK)[taken] = by_ceil[better]
        floor[taken] = ceil[taken]

    def _error(
        self, values: Float32, codes: npt.NDArray[np.uint8], exponent: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float64]:
        decoded = self._values[codes] * np.ldexp(np.float32(1), exponent)[:, None]
        return np.asarray(np.square(values - decoded, dtype=np.float64).sum(axis=1))


def exponents(
    largest: npt.NDArray[np.float32], form: SmallFloat
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Exponents of the scales by `floor` and by `ceil`, within what a byte holds; least where all values are zero."""
    top = form.limits[1] / form.unit
    floor = np.log2(power_of_two_below(np.where(largest > 0, largest, 2.0**-127))) - np.log2(
        power_of_two_below(np.array(top))
    )
    ceil = floor + (largest > top * np.exp2(floor))
    limits = (-EXPONENT_BIAS, EXPONENT_BIAS)
    return np.clip(floor, *limits).astype(np.int32), np.clip(ceil, *limits).astype(np.int32)


def _largest_of_blocks(block: Float32) -> Float32:
    """Largest magnitude of each 32 values; halved five times, since reductions of few values cost more each."""
    magnitudes = (block.view(np.int32) & _MAGNITUDE).reshape(-1)
    while len(magnitudes) * MX_BLOCK > block.size:
        magnitudes = np.maximum(magnitudes[0::2], magnitudes[1::2])
    return magnitudes.view(np.float32)


def _stored(exponent: npt.NDArray[np.int32], rows: int) -> npt.NDArray[np.uint8]:
    return (exponent + EXPONENT_BIAS).astype(np.uint8).reshape(rows, -1)
