"""How the workers of a job spent their time, over all its attempts and phases."""

from __future__ import annotations

from collections.abc import Mapping

from gs_dist.planning.plan import CalibrationPlan
from gs_dist.results.summary import StageSummary
from gs_dist.runtime.stage_worker import StageReport
from gs_dist.runtime.workers import WorkerKey

__all__ = ["StageTimes"]


class StageTimes:
    """Sums by worker; false while no worker ran."""

    def __init__(self) -> None:
        self._summaries: dict[WorkerKey, StageSummary] = {}
        self._wall: dict[WorkerKey, float] = {}

    def __bool__(self) -> bool:
        return bool(self._summaries)

    def add(self, plan: CalibrationPlan, reports: Mapping[WorkerKey, StageReport], seconds: float) -> None:
        """Takes in what workers report of an attempt that took `seconds` of wall time."""
        for key, report in reports.items():
            before = self._summaries.get(key)
            self._wall[key] = self._wall.get(key, 0.0) + seconds
            earlier = before.account if before else {}
            account = {kind: spent + earlier.get(kind, 0.0) for kind, spent in report.seconds.items()}
            busy = sum(account.values())
            peaks = [report.peak_memory, before.peak_memory_measured if before else None]
            stage = plan.stages[report.stage]
            self._summaries[key] = StageSummary(
                stage=report.stage,
                replica=report.replica,
                first_layer=stage.first_layer,
                end_layer=stage.end_layer,
                seconds=busy,
                account=account,
                idle_share=max(0.0, 1.0 - busy / self._wall[key]) if self._wall[key] else 1.0,
                peak_memory_planned=stage.memory.peak,
                peak_memory_measured=max(peak for peak in peaks if peak is not None),
            )

    def summaries(self) -> tuple[StageSummary, ...]:
        """Of all workers, by stage and replica."""
        return tuple(self._summaries[key] for key in sorted(self._summaries))
