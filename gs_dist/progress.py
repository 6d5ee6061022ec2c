"""What a running job tells whoever watches it."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "SilentProgress"]


class Progress(Protocol):
    """Told by the coordinator as work is done; `gs_dist.terminal.console` shows it to people."""

    def stage_progress(self, stage: int, done: int, total: int, what: str) -> None:
        """`done` of `total` micro-batches of the pass that `what` names have left a stage."""

    def layer_finished(self, layer: int, done: int, total: int) -> None:
        """A decoder layer is published; `done` of `total` are."""

    def part_finished(self, part: int, done: int, total: int) -> None:
        """A file of a conversion is published; `done` of `total` are."""

    def message(self, text: str) -> None:
        """Something happened that a person may want to know."""


class SilentProgress:
    """Shows nothing."""

    def stage_progress(self, stage: int, done: int, total: int, what: str) -> None:
        """Ignored."""

    def layer_finished(self, layer: int, done: int, total: int) -> None:
        """Ignored."""

    def part_finished(self, part: int, done: int, total: int) -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""
