"""How converted weights are written for serving engines, one dialect a file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gs_dist.conversion.dialects.ascend import AscendWriter
from gs_dist.conversion.dialects.base import DialectWriter
from gs_dist.conversion.dialects.compressed_tensors import CompressedTensorsWriter

__all__ = ["WRITERS", "DialectWriter"]

WRITERS: Mapping[str, DialectWriter] = MappingProxyType(
    {dialect.name: dialect for dialect in (CompressedTensorsWriter(), AscendWriter())}
)
"""Name in a recipe's `format` to the dialect."""
