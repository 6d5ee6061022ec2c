"""One attempt at a job's unfinished layers: workers up, streams run, reports collected, workers down."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from gs_dist.checkpoint.output_lock import token_in
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.progress import Progress
from gs_dist.runtime.job import Job
from gs_dist.runtime.pipeline import run_streams
from gs_dist.runtime.replanning import Replanning
from gs_dist.runtime.schedule import Stream, plan_solves, plan_streams
from gs_dist.runtime.sight import check_sights
from gs_dist.runtime.software import Software, check_sources, check_versions, kernel_note
from gs_dist.runtime.stage_times import StageTimes
from gs_dist.runtime.stage_worker import StageWorker
from gs_dist.runtime.tasks import Task
from gs_dist.runtime.workers import NodesChanged, WorkerGroup, WorkerKey, as_they_come
from gs_dist.wording import counted

__all__ = ["MakeGroup", "OfLayer", "run_attempt"]

P = ParamSpec("P")
T = TypeVar("T")

_LOOK_INTERVAL = 2.0  # seconds between two looks for room

MakeGroup = Callable[[Job, int], WorkerGroup[StageWorker]]
"""Makes the workers of a job; the number says how many replicas suffice."""


class OfLayer(Protocol):
    """What a task gives."""

    @property
    def layer(self) -> int | None:
        """Of which layer."""


Outcome = TypeVar("Outcome", bound=OfLayer)


def run_attempt(
    job: Job,
    task: Task[Outcome],
    finished: dict[int, Outcome],
    make_group: MakeGroup,
    replanning: Replanning,
    progress: Progress,
    times: StageTimes,
    on_finished: Callable[[int], None],
) -> None:
    """Does a task to the layers that are not in `finished`; fills `finished` as it goes, `times` at the end.

    Where fewer replicas run than planned and room for more appears, or nodes on which the job would have more workers,
    the attempt ends after the passes under way: the next one has them. It has finished a layer by then, or is ended for
    a larger cluster than any before, so that attempts cannot go on for ever.

    Args:
        job: recipe and plan.
        task: what is done to each layer.
        finished: what it gave, by layer.
        make_group: makes the workers.
        replanning: keeps the plan up with the nodes.
        progress: told what is going on.
        times: how workers spent their time.
        on_finished: called with each layer that was added.

    Raises:
        WorkerLostError: a worker died or stopped answering; what was done before stays in `finished`.
        ClusterError: a worker runs on other versions than this process.
        CheckpointError: a worker reads another checkpoint than this process.
    """
    config = job.config
    job = replanning.renewed(job, begun=bool(finished))
    progress.phase(f"starting {counted(job.plan.num_workers, 'worker')}")
    try:
        group = make_group(job, min(config.parallel.min_data_parallel_size, job.plan.data_parallel_size))
    except NodesChanged:
        return  # the next attempt is planned for those that there are
    try:
        plan = job.plan
        if group.num_replicas != plan.data_parallel_size:
            progress.message(f"the cluster has room for {group.num_replicas} of {plan.data_parallel_size} replicas")
            plan = dataclasses.replace(plan, data_parallel_size=group.num_replicas)
        _compare_workers(job, group, plan, progress)
        if replanning.outgrown(job, begun=bool(finished)):
            progress.message("more nodes have come while the workers started")
            return
        began = time.monotonic()
        room = _Room(group, job, replanning)
        before = len(finished)

        def add(outcome: Outcome) -> None:
            assert outcome.layer is not None
            finished[outcome.layer] = outcome
            on_finished(outcome.layer)

        streams, deal = _work(job, plan, finished)
        complete = run_streams(
            group,
            streams,
            plan,
            deal,
            task,
            timeout=config.parallel.timeout,
            progress=progress,
            on_finished=add,
            pause=lambda: len(finished) > before and room.appeared(),
        )
        if not complete:
            progress.message(f"room for {room.found}, joining from the next wave on")
        seconds = time.monotonic() - began
        times.add(plan, _ask_all(group, plan, StageWorker.report, config.parallel.timeout), seconds)
    finally:
        group.close()


def _compare_workers(job: Job, group: WorkerGroup[StageWorker], plan: CalibrationPlan, progress: Progress) -> None:
    """Has every worker tell what it runs on and reads, before anything runs."""
    timeout = job.config.parallel.timeout
    software = _ask_all(group, plan, StageWorker.software, timeout)  # told once a worker is up
    check_versions(Software.here(), software)
    check_sources(job.fingerprints.source, _ask_all(group, plan, StageWorker.source, timeout), software)
    output = Path(job.config.output)
    with token_in(output) as (name, token):
        sights = _ask_all(group, plan, StageWorker.sight, timeout, name)
    check_sights(job, token, sights)
    note = kernel_note(software)
    if note:
        progress.message(note)


class _Room:
    """Looks, not too often, whether the cluster has room for replicas that are missing, or for a larger plan."""

    def __init__(self, group: WorkerGroup[StageWorker], job: Job, replanning: Replanning) -> None:
        self._group = group
        self._missing = job.plan.data_parallel_size - group.num_replicas
        self._outgrown = partial(replanning.outgrown, job, begun=True)
        self._looked = float("-inf")
        self.found = ""

    def appeared(self) -> bool:
        now = time.monotonic()
        if self.found or now - self._looked < _LOOK_INTERVAL:
            return bool(self.found)
        self._looked = now
        replicas = self._group.room_for(self._missing) if self._missing else 0
        if replicas:
            self.found = counted(replicas, "more replica")
        elif self._outgrown():
            self.found = "more workers"
        return bool(self.found)


def _work(job: Job, plan: CalibrationPlan, finished: Collection[int]) -> tuple[list[Stream], list[range]]:
    """Streams, and the micro-batches of each replica."""
    if job.statistics_from is not None:
        return plan_solves(plan.stages, set(finished)), [range(0)] * plan.data_parallel_size
    quantized = job.config.propagation == "quantized"
    streams = plan_streams(plan.stages, set(finished), propagate_quantized=quantized)
    return streams, [plan.micro_batches_of(replica) for replica in range(plan.data_parallel_size)]


def _ask_all(
    group: WorkerGroup[StageWorker],
    plan: CalibrationPlan,
    method: Callable[Concatenate[StageWorker, P], T],
    timeout: float,
    *args: P.args,
    **kwargs: P.kwargs,
) -> dict[WorkerKey, T]:
    """What `method` says on every worker."""
    keys = [WorkerKey(stage.stage, r) for r in range(plan.data_parallel_size) for stage in plan.stages]
    calls = {group.call(key, method, *args, **kwargs): key for key in keys}
    answers = dict(as_they_come(group, calls, timeout, lambda silent: f"{silent[0]} did not answer for {timeout:g} s"))
    return {key: answers[key] for key in keys}
