"""Where a worker's layers get their statistics from: a pass over the samples, or what an earlier job kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.kept_statistics import (
    StatisticsRecord,
    forget_statistics,
    read_statistics,
    read_statistics_record,
    write_statistics,
)
from gs_dist.checkpoint.layer_costs import remove_costs
from gs_dist.checkpoint.lineage import Lineage, checksums
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import DamagedError, OutputError
from gs_dist.model.statistics import LayerStatistics
from gs_dist.runtime.job import Job
from gs_dist.runtime.partial_sums import PartialSums
from gs_dist.runtime.schedule import StageWave

__all__ = ["KeptStatistics", "Mask", "MergedStatistics", "Origin", "Payload", "StatisticsSource", "write_kept"]

Mask = npt.NDArray[np.bool_] | None


class Origin(NamedTuple):
    """What a micro-batch's hidden states come from: digests of its samples, and a checksum of what they ran through."""

    samples: tuple[bytes, ...]
    behind: str


class Payload(NamedTuple):
    """What a stage sends to the next: hidden states (batch, sequence, hidden), mask of real tokens, and origin."""

    hidden: npt.NDArray[Any]
    mask: Mask  # None where all are real
    origin: Origin


class MergedStatistics(NamedTuple):
    """All statistics of a layer, and the source tensors that they are of."""

    statistics: LayerStatistics
    lineage: Lineage


class StatisticsSource(Protocol):
    """Gives a worker the statistics of its layers."""

    def begin(self, wave: StageWave, start: int, stop: int) -> None:
        """Gets ready for a pass over micro-batches [start, stop)."""

    def step(self, micro_batch: int, payload: Payload | None) -> Payload | None:
        """Runs a micro-batch through the pass."""

    def partial_sums(self, layer: int) -> PartialSums | None:
        """What this worker has of an observed layer, for the layer's owner; None where the owner has all itself."""

    def merged(self, layer: int, others: Sequence[PartialSums]) -> MergedStatistics:
        """All statistics of a layer that this worker owns, given the partial sums of the other replicas."""

    def leave_for_solve(self, layer: int, merged: MergedStatistics) -> None:
        """Leaves statistics in the job's output for a solve to come, unless that finds them where they come from."""

    def keep(self, layer: int, merged: MergedStatistics) -> None:
        """Leaves statistics in the job's output for other recipes, unless they come from there."""


class KeptStatistics:
    """Those in the output of a job that kept them; no pass is run.

    Args:
        job: recipe and fingerprints, and whose output they are in.
        reader: of the float checkpoint.
    """

    def __init__(self, job: Job, reader: CheckpointReader) -> None:
        assert job.statistics_from is not None
        self._job = job
        self._reader = reader
        self._kept = Path(job.statistics_from)
        self._output = Path(job.config.output)

    def begin(self, wave: StageWave, start: int, stop: int) -> None:
        """Nothing is to be got ready."""

    def step(self, micro_batch: int, payload: Payload | None) -> Payload | None:
        """Never called: there are no micro-batches."""
        raise AssertionError("statistics are at hand, and a micro-batch was sent")

    def partial_sums(self, layer: int) -> None:
        """None: the layer's owner reads all of them itself."""

    def merged(self, layer: int, others: Sequence[PartialSums]) -> MergedStatistics:
        """Reads them.

        Raises:
            DamagedError: they are not what was written; those of the job itself are deleted, so that the layer is
                observed again.
            OutputError: they are of other samples or of another model.
        """
        assert not others
        try:
            record = read_statistics_record(self._kept, layer)
            if (record.layer, record.data) != (layer, self._job.fingerprints.data):
                raise DamagedError(f"statistics kept as those of layer {layer} are of layer {record.layer}, other data")
            self._refuse_other_model(layer, record.lineage)
            return MergedStatistics(read_statistics(self._kept, layer), record.lineage)
        except DamagedError:
            if self._kept == self._output:
                remove_costs(self._output, layer)  # they vouch for the statistics beside them
                forget_statistics(self._output, layer)
            raise

    def _refuse_other_model(self, layer: int, lineage: Lineage) -> None:
        changed = lineage.changed(checksums(self._reader.read_layer(layer)))
        if changed:
            name = self._reader.architecture.layer_prefix(layer) + changed[0]
            raise OutputError(
                f"the statistics kept in {str(self._kept)!r} are of another model: {name} changed since. Restore what "
                "it was, or run `gs-dist quantize` on the recipe"
            )

    def leave_for_solve(self, layer: int, merged: MergedStatistics) -> None:
        """They stay where they come from."""

    def keep(self, layer: int, merged: MergedStatistics) -> None:
        """They are kept where they come from; another output gets a copy."""
        if self._output != self._kept:
            write_kept(self._job, layer, merged)


def write_kept(job: Job, layer: int, merged: MergedStatistics) -> None:
    """Leaves statistics in a job's output, with what they are of."""
    record = StatisticsRecord(layer=layer, data=job.fingerprints.data, lineage=merged.lineage)
    write_statistics(Path(job.config.output), merged.statistics, record)
