"""The text that comes with the package, for who has none of their own at hand.

Passages of novels by Jane Austen (1811 to 1817), in the public domain everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["SHIPPED_TEXT", "is_shipped", "shipped_note"]

SHIPPED_TEXT = Path(__file__).with_name("austen-calibration.parquet")


def is_shipped(data: Sequence[str]) -> bool:
    """Whether samples come from this text, and from nothing else."""
    return [Path(entry).name for entry in data] == [SHIPPED_TEXT.name]


def shipped_note(data: Sequence[str]) -> tuple[str, ...]:
    """What a person should know of a model that was calibrated on it; nothing where it was not."""
    if not is_shipped(data):
        return ()
    return (
        "calibrated on the English novels that come with gs_dist, which are not your domain: name text of your own "
        "with --data or calibration.data",
    )
