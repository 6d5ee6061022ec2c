"""What a number format tells of itself, so that nobody who rounds, counts, stores or labels has to ask for bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gs_dist.numbers.scales import EPSILON, Float32, round_scale

__all__ = ["Int8", "NumberFormat"]

Int8 = npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True)
class NumberFormat(ABC):
    """A format of numbers that share a scale: value = code * scale, or (code - zero point) * scale.

    Attributes:
        name: as recipes write it.
        title: as people say it.
        label: its part of a linear's label (`W8`, `W4`).
        bits: of a code as stored.
        group_sizes: input channels of a weight that may share a scale; 0 is all of an output channel.
        scale_bits: of a stored scale, None where it has the checkpoint's dtype.
        zero_points: whether ranges may be asymmetric.
        activations: number formats of activations that its products are made with, beside floats.
        unit: a code is a value of the format times this, so that codes of few bits are whole numbers.
        range_ratios: shares of a range worth trying in a search; empty where a method's own list does.
    """

    name: str
    title: str
    label: str
    bits: int
    group_sizes: tuple[int, ...]
    scale_bits: int | None = None
    activations: tuple[str, ...] = ()
    unit: float = 1.0
    range_ratios: tuple[float, ...] = ()
    zero_points: ClassVar[bool] = False

    @property
    @abstractmethod
    def limits(self) -> tuple[float, float]:
        """Smallest and largest code."""

    @abstractmethod
    def snap(self, values: Float32) -> None:
        """Replaces values, in units of their scale, by the nearest codes, in place; ties go to the even one."""

    @abstractmethod
    def symmetric_scale(self, max_abs: npt.ArrayLike, *, scale_dtype: str) -> Float32:
        """Scale of ranges [-max_abs, max_abs]; positive also where they are empty."""

    def range_parameters(
        self, low: npt.ArrayLike, high: npt.ArrayLike, *, symmetric: bool, scale_dtype: str
    ) -> tuple[Float32, Int8 | None]:
        """Scale and zero point (None when symmetric) of ranges [low, high], extended to include 0."""
        bottom = np.minimum(np.asarray(low, dtype=np.float64), 0.0)
        top = np.maximum(np.asarray(high, dtype=np.float64), 0.0)
        if symmetric:
            return self.symmetric_scale(np.maximum(-bottom, top), scale_dtype=scale_dtype), None
        smallest, largest = self.limits
        width = top - bottom
        scale = round_scale(np.where(width > 0, width / (largest - smallest), EPSILON), scale_dtype)
        zero_point = np.clip(np.rint(smallest - bottom / scale), smallest, largest).astype(np.int8)
        return scale, zero_point

    @abstractmethod
    def encode(self, codes: Float32) -> npt.NDArray[Any]:
        """Codes as `snap` leaves them, as they are stored one by one: int8, or the format's bit patterns as uint8."""

    @abstractmethod
    def decode(self, stored: npt.NDArray[Any]) -> Float32:
        """Inverse of `encode`."""
