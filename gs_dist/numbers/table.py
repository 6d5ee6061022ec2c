"""The number formats that recipes name. To add one, see `docs/extending.md`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from gs_dist.numbers.integer import INT4, INT8
from gs_dist.numbers.number_format import NumberFormat
from gs_dist.numbers.nvfp4 import NVFP4
from gs_dist.numbers.small_float import FP8, MXFP4, MXFP8

__all__ = ["NUMBER_FORMATS", "WEIGHT_FORMATS", "WeightFormatName"]

WeightFormatName = Literal["int8", "qint4x2", "mxfp4", "nvfp4"]

WEIGHT_FORMATS: Mapping[WeightFormatName, NumberFormat] = MappingProxyType(
    {"int8": INT8, "qint4x2": INT4, "mxfp4": MXFP4, "nvfp4": NVFP4}
)

NUMBER_FORMATS: tuple[NumberFormat, ...] = (*WEIGHT_FORMATS.values(), FP8, MXFP8)
"""Those of `WEIGHT_FORMATS`, and those that weights are converted to without data alone."""
