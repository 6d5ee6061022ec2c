"""One attempt at a job's unfinished layers: workers up, streams run, reports collected, workers down."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

from gs_dist.checkpoint.manifest import LayerManifest
from gs_dist.errors import WorkerLostError
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.progress import Progress
from gs_dist.results.costs import LayerCosts
from gs_dist.results.summary import StageSummary
from gs_dist.runtime.pipeline import run_streams
from gs_dist.runtime.schedule import Stream, plan_solves, plan_streams
from gs_dist.runtime.software import Software, check_sources, check_versions, kernel_note
from gs_dist.runtime.stage_worker import Job, StageReport
from gs_dist.runtime.worker_group import WorkerGroup, WorkerKey
from gs_dist.wording import counted

__all__ = ["MakeGroup", "run_attempt"]

T = TypeVar("T")

_LOOK_INTERVAL = 2.0  # seconds between two looks for room

MakeGroup = Callable[[Job, int], WorkerGroup]
"""Makes the workers of a job; the number says how many replicas suffice."""


def run_attempt(
    job: Job,
    finished: dict[int, Any],
    make_group: MakeGroup,
    progress: Progress,
    stages: dict[WorkerKey, StageSummary],
) -> None:
    """Observes and solves what is not in `finished`; fills `finished` as layers are published, `stages` at the end.

    Of a job that judges, `finished` holds the `LayerCosts` of layers, otherwise their `LayerManifest`. Where fewer
    replicas run than planned and room for more appears, the attempt ends after the passes under way: the next
    one has them. It has finished a layer by then, so that attempts cannot go on for ever.

    Raises:
        WorkerLostError: a worker died or stopped answering; what was published before stays in `finished`.
        ClusterError: a worker runs on other versions than this process.
        CheckpointError: a worker reads another checkpoint than this process.
    """
    config = job.config
    progress.message(f"starting {counted(job.plan.num_workers, 'worker')}")
    group = make_group(job, min(config.parallel.min_data_parallel_size, job.plan.data_parallel_size))
    try:
        plan = job.plan
        if group.num_replicas != plan.data_parallel_size:
            progress.message(f"the cluster has room for {group.num_replicas} of {plan.data_parallel_size} replicas")
            plan = dataclasses.replace(plan, data_parallel_size=group.num_replicas)
        software = _ask_all(group, plan, "software", Software, config.parallel.timeout)  # told once a worker is up
        check_versions(Software.here(), software)
        sources = _ask_all(group, plan, "source", str, config.parallel.timeout)
        check_sources(job.fingerprints.source, sources, software)
        note = kernel_note(software)
        if note:
            progress.message(note)
        began = time.monotonic()
        room = _Room(group, job.plan.data_parallel_size - group.num_replicas)
        before = len(finished)

        def on_solved(outcome: LayerManifest | LayerCosts) -> None:
            assert outcome.layer is not None
            finished[outcome.layer] = outcome
            if not job.judges:
                progress.layer_finished(outcome.layer, len(finished), plan.architecture.num_layers)

        streams, deal = _work(job, plan, finished)
        complete = run_streams(
            group,
            streams,
            plan,
            deal,
            timeout=config.parallel.timeout,
            progress=progress,
            on_solved=on_solved,
            pause=lambda: len(finished) > before and room.appeared(),
        )
        if not complete:
            progress.message(f"room for {counted(room.found, 'more replica')}, joining from the next wave on")
        seconds = time.monotonic() - began
        for key, report in _ask_all(group, plan, "report", StageReport, config.parallel.timeout).items():
            stages[key] = _together(stages.get(key), _stage_summary(plan, report, seconds))
    finally:
        group.close()


class _Room:
    """Looks, not too often, whether the cluster has room for replicas that are missing."""

    def __init__(self, group: WorkerGroup, missing: int) -> None:
        self._group = group
        self._missing = missing
        self._looked = float("-inf")
        self.found = 0

    def appeared(self) -> bool:
        now = time.monotonic()
        if not self._missing or now - self._looked < _LOOK_INTERVAL:
            return False
        self._looked = now
        self.found = self._group.room_for(self._missing)
        return self.found > 0


def _work(job: Job, plan: CalibrationPlan, finished: dict[int, Any]) -> tuple[list[Stream], list[range]]:
    """Streams, and the micro-batches of each replica."""
    if job.statistics_from is not None:
        return plan_solves(plan.stages, set(finished)), [range(0)] * plan.data_parallel_size
    quantised = job.config.propagation == "quantized"
    streams = plan_streams(plan.stages, set(finished), propagate_quantised=quantised)
    return streams, [plan.micro_batches_of(replica) for replica in range(plan.data_parallel_size)]


def _ask_all(
    group: WorkerGroup, plan: CalibrationPlan, method: str, kind: type[T], timeout: float
) -> dict[WorkerKey, T]:
    """What `method`, which gives a `kind`, says on every worker."""
    keys = [WorkerKey(stage.stage, r) for r in range(plan.data_parallel_size) for stage in plan.stages]
    references: dict[Any, WorkerKey] = {group.call(key, method): key for key in keys}
    answers: dict[WorkerKey, T] = {}
    while references:
        ready = group.wait(list(references), timeout)
        if not ready:
            raise WorkerLostError(f"{next(iter(references.values()))} did not answer for {timeout:g} s")
        for reference in ready:
            answer = group.get(reference)
            assert isinstance(answer, kind)
            answers[references.pop(reference)] = answer
    return {key: answers[key] for key in keys}


def _stage_summary(plan: CalibrationPlan, report: StageReport, seconds: float) -> StageSummary:
    stage = plan.stages[report.stage]
    return StageSummary(
        stage=report.stage,
        replica=report.replica,
        first_layer=stage.first_layer,
        end_layer=stage.end_layer,
        seconds=report.busy_seconds,
        idle_share=max(0.0, 1.0 - report.busy_seconds / seconds),
        peak_memory_planned=stage.memory.peak,
        peak_memory_measured=report.peak_memory,
    )


def _together(before: StageSummary | None, now: StageSummary) -> StageSummary:
    """A worker's summary over phases that followed each other, such as judging and solving."""
    if before is None:
        return now
    wall = sum(s.seconds / max(1.0 - s.idle_share, 1e-9) for s in (before, now))
    seconds = before.seconds + now.seconds
    measured = [s.peak_memory_measured for s in (before, now) if s.peak_memory_measured is not None]
    return dataclasses.replace(
        now,
        seconds=seconds,
        idle_share=max(0.0, 1.0 - seconds / wall),
        peak_memory_measured=max(measured, default=None),
    )
