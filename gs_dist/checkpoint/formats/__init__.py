"""Checkpoint dialects of serving engines."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gs_dist.checkpoint.formats.ascend import AscendFormat
from gs_dist.checkpoint.formats.base import CheckpointFormat
from gs_dist.checkpoint.formats.compressed_tensors import CompressedTensorsFormat
from gs_dist.checkpoint.formats.golden_stick import GoldenStickFormat

__all__ = ["FORMATS", "CheckpointFormat"]

FORMATS: Mapping[str, CheckpointFormat] = MappingProxyType(
    {dialect.name: dialect for dialect in (CompressedTensorsFormat(), AscendFormat(), GoldenStickFormat())}
)
"""Name in a recipe's `format` to the dialect."""
