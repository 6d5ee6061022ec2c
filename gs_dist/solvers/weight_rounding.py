"""What a weight's codes and scales are: the interface of number formats that weights are rounded to without data.

A format rounds a block of whole rows at a time, into arrays of its own that the next block overwrites, so that memory
does not grow with the weight and every temporary stays in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from gs_dist.results.quantized import Float32, Int8

__all__ = ["WeightRounding", "RoundedRows", "Rounder"]


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
        row_step: rows that are rounded together; a block holds a multiple of it, unless it is the last.
        bytes_per_value: what a rounder holds for each value of a block, beside the block.
    """

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
