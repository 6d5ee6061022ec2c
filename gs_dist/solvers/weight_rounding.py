"""What a weight's codes and scales are: the interface of number formats that weights are rounded to without data.

A format rounds a block of whole rows at a time, into arrays of its own that the next block overwrites, so that memory
does not grow with the weight and every temporary stays in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gs_dist.results.quantized import Float32, Int8

__all__ = ["EXPONENT_BIAS", "RoundedRows", "Rounder", "WeightRounding"]

EXPONENT_BIAS = 127  # of a scale that is a power of two in a byte (OCP Microscaling Formats 1.0, section 5)


@dataclass(frozen=True, kw_only=True)
class RoundedRows:
    """A block of rows after rounding.

    Attributes:
        codes: (rows, columns); int8 for integers, the bytes of FP8 or one E2M1 code a byte as uint8.
        scale: (rows, groups) float32, rounded to the dtype that it is stored in; or uint8, exponents of two plus 127;
            or (row blocks, column blocks) float32.
        zero_point: (rows, groups) int8, None where ranges are symmetric.
    """

    codes: npt.NDArray[Any]
    scale: npt.NDArray[Any]
    zero_point: Int8 | None = None

    def steps(self) -> Float32:
        """Scales as float32, exponents turned into the powers of two that they stand for."""
        if self.scale.dtype == np.uint8:
            return np.ldexp(np.float32(1), self.scale.astype(np.int32) - EXPONENT_BIAS)
        return np.asarray(self.scale)

    def scale_range(self) -> tuple[float, float]:
        """The smallest and the largest of `steps`."""
        low, high = self.scale.min(), self.scale.max()
        if self.scale.dtype == np.uint8:
            return 2.0 ** (int(low) - EXPONENT_BIAS), 2.0 ** (int(high) - EXPONENT_BIAS)
        return float(low), float(high)


class Rounder(Protocol):
    """Rounds blocks of one weight."""

    def round(self, block: Float32) -> RoundedRows:
        """Rounds (rows, columns), which is overwritten; the result is valid until the next call.

        Raises:
            ValueError: a value that is not finite.
        """


class WeightRounding(Protocol):
    """A format of weights.

    Attributes:
        label: its part of a linear's label in a summary (`W8-perchannel`).
        row_step: rows that are rounded together; a block holds a multiple of it, unless it is the last.
        bytes_per_value: what a rounder holds for each value of a block, beside the block.
    """

    @property
    def label(self) -> str:
        """Its part of a label."""

    @property
    def row_step(self) -> int:
        """Rows that are rounded together."""

    @property
    def bytes_per_value(self) -> int:
        """What a rounder holds for a value."""

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a weight of that shape cannot be rounded to this format, and what to do; None if it can."""

    def rounder(self, block_rows: int, columns: int, scale_dtype: str) -> Rounder:
        """What rounds a weight's blocks of up to `block_rows` rows."""

    def restore(self, rounded: RoundedRows, target: Float32) -> None:
        """Fills `target` (rows, columns) with what codes and scales stand for."""
