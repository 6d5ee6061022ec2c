"""The number formats that recipes name. To add one, see `docs/extending.md`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from gs_dist.numbers.integer import INT4, INT8
from gs_dist.numbers.number_format import NumberFormat
from gs_dist.numbers.small_float import MXFP4

__all__ = ["WEIGHT_FORMATS", "WeightFormatName"]

WeightFormatName = Literal["int8", "qint4x2", "mxfp4"]

WEIGHT_FORMATS: Mapping[WeightFormatName, NumberFormat] = MappingProxyType(
    {"int8": INT8, "qint4x2": INT4, "mxfp4": MXFP4}
)
