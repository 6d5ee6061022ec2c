"""Where a worker's layers get their statistics from: a pass over the samples, or what an earlier job kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.run_directory import read_statistics, write_statistics
from gs_dist.model.statistics import LayerStatistics
from gs_dist.runtime.partial_sums import PartialSums
from gs_dist.runtime.schedule import StageWave

__all__ = ["KeptStatistics", "Mask", "Payload", "StatisticsSource"]

Mask = npt.NDArray[np.bool_] | None


class Payload(NamedTuple):
    """What a stage sends to the next: hidden states (batch, sequence, hidden), and the mask of real tokens."""

    hidden: npt.NDArray[Any]
    mask: Mask  # None where all are real


class StatisticsSource(Protocol):
    """Gives a worker the statistics of its layers."""

    def begin(self, wave: StageWave, start: int, stop: int) -> None:
        """Gets ready for a pass over micro-batches [start, stop)."""

    def step(self, micro_batch: int, payload: Payload | None) -> Payload | None:
        """Runs a micro-batch through the pass."""

    def partial_sums(self, layer: int) -> PartialSums | None:
        """What this worker has of an observed layer, for the layer's owner; None where the owner has all itself."""

    def merged(self, layer: int, others: Sequence[PartialSums]) -> LayerStatistics:
        """All statistics of a layer that this worker owns, given the partial sums of the other replicas."""

    def leave_for_solve(self, output: Path, layer: int, statistics: LayerStatistics) -> None:
        """Leaves statistics in an output for a solve to come, unless that finds them where they come from."""

    def keep(self, output: Path, layer: int, statistics: LayerStatistics) -> None:
        """Leaves statistics in an output for other recipes, unless it is where they come from."""


class KeptStatistics:
    """Those in the output of a job that kept them; no pass is run.

    Args:
        output: of that job.
    """

    def __init__(self, output: Path) -> None:
        self._output = output

    def begin(self, wave: StageWave, start: int, stop: int) -> None:
        """Nothing is to be got ready."""

    def step(self, micro_batch: int, payload: Payload | None) -> Payload | None:
        """Never called: there are no micro-batches."""
        raise AssertionError("statistics are at hand, and a micro-batch was sent")

    def partial_sums(self, layer: int) -> None:
        """None: the layer's owner reads all of them itself."""

    def merged(self, layer: int, others: Sequence[PartialSums]) -> LayerStatistics:
        """Reads them."""
        assert not others
        return read_statistics(self._output, layer)

    def leave_for_solve(self, output: Path, layer: int, statistics: LayerStatistics) -> None:
        """They stay where they come from."""

    def keep(self, output: Path, layer: int, statistics: LayerStatistics) -> None:
        """They are kept where they come from; another output gets a copy."""
        if output != self._output:
            write_statistics(output, layer, statistics)
