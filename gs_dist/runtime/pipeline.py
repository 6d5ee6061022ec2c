"""Drives streams of micro-batches through the workers: bounded in flight, every wait with a limit.

Knows workers only through the `WorkerGroup` protocol, so that it runs on Ray actors and on workers in
the same process alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gs_dist.errors import WorkerLostError
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.progress import Progress
from gs_dist.runtime.schedule import Stream
from gs_dist.runtime.worker_group import WorkerGroup, WorkerKey

__all__ = ["run_streams"]


@dataclass
class _Lane:
    """One replica's way through a stream: its micro-batches still to submit, and those in flight."""

    replica: int
    micro_batches: list[int]
    in_flight: dict[Any, int] = field(default_factory=dict)


@dataclass
class _Active:
    """A stream under way, then its solves."""

    stream: Stream
    lanes: list[_Lane]
    begins: set[Any]
    done: int = 0
    solves: dict[Any, int] = field(default_factory=dict)
    solving: bool = False

    @property
    def total(self) -> int:
        return sum(len(lane.micro_batches) + len(lane.in_flight) for lane in self.lanes) + self.done


def run_streams(
    group: WorkerGroup,
    streams: Sequence[Stream],
    plan: CalibrationPlan,
    deal: Sequence[range],
    *,
    timeout: float,
    progress: Progress,
    on_solved: Callable[[Any], None],
    pause: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs all streams; those that share no stage run at the same time.

    Args:
        group: the workers.
        streams: as `schedule.plan_streams` gives them.
        plan: deals layers to owners, and bounds what is in flight.
        deal: micro-batches of each replica.
        timeout: seconds without any progress after which the workers count as lost.
        progress: told of finished micro-batches and layers.
        on_solved: called with what `StageWorker.solve` gave, layer by layer.
        pause: asked whenever streams could be started; once it says so none is started any more, and those
            under way are run and solved to their end.

    Returns:
        Whether all streams ran.

    Raises:
        WorkerLostError: a worker died, or nothing happened for `timeout` seconds.
    """
    waiting = list(streams)
    active: list[_Active] = []
    paused = False
    while active or (waiting and not paused):
        ready = [] if paused else _ready(waiting, active)
        if ready and pause():
            paused, ready = True, []
        for stream in ready:
            waiting.remove(stream)
            active.append(_start(group, stream, deal))
        for run in active:
            _submit(group, run, plan.max_in_flight)
        references = [r for run in active for lane in run.lanes for r in lane.in_flight]
        references += [r for run in active for r in (*run.begins, *run.solves)]
        for reference in _wait(group, references, timeout, active):
            _finish_one(group, active, reference, progress, on_solved)
        for run in list(active):
            if any(lane.micro_batches or lane.in_flight for lane in run.lanes) or run.solves or run.begins:
                continue
            if run.solving:
                active.remove(run)
            else:
                run.solving = True
                run.solves = _solve(group, run.stream, plan)
                if not run.solves:
                    active.remove(run)
    return not waiting


def _ready(waiting: Sequence[Stream], active: Sequence[_Active]) -> list[Stream]:
    """Streams whose stages are all free."""
    busy = {wave.stage for run in active for wave in run.stream.waves}
    ready = []
    for stream in waiting:
        stages = {wave.stage for wave in stream.waves}
        if not stages & busy:
            ready.append(stream)
        busy |= stages  # later streams of these stages must not overtake
    return ready


def _start(group: WorkerGroup, stream: Stream, deal: Sequence[range]) -> _Active:
    begins = {
        group.call(WorkerKey(wave.stage, replica), "begin", wave, micro_batches.start, micro_batches.stop)
        for wave in stream.waves
        for replica, micro_batches in enumerate(deal)
    }
    lanes = [_Lane(replica, list(batches)) for replica, batches in enumerate(deal)]
    return _Active(stream=stream, lanes=lanes, begins=begins)


def _submit(group: WorkerGroup, run: _Active, max_in_flight: int) -> None:
    for lane in run.lanes:
        while lane.micro_batches and len(lane.in_flight) < max_in_flight:
            micro_batch = lane.micro_batches.pop(0)
            reference: Any = None
            for wave in run.stream.waves:
                reference = group.call(WorkerKey(wave.stage, lane.replica), "step", micro_batch, reference)
            lane.in_flight[reference] = micro_batch


def _solve(group: WorkerGroup, stream: Stream, plan: CalibrationPlan) -> dict[Any, int]:
    """Has each observed layer solved by its owner, from the partial sums of all replicas."""
    solves = {}
    for wave in stream.waves:
        for layer in wave.observed:
            owner = plan.owner(layer)
            others = [
                group.call(WorkerKey(wave.stage, replica), "partial_sums", layer)
                for replica in range(plan.data_parallel_size)
                if replica != owner
            ]
            solves[group.call(WorkerKey(wave.stage, owner), "solve", layer, *others)] = layer
    return solves


def _wait(group: WorkerGroup, references: Sequence[Any], timeout: float, active: Sequence[_Active]) -> list[Any]:
    if not references:
        return []
    ready = group.wait(references, timeout)
    if not ready:
        where = "; ".join(
            f"stages {run.stream.waves[0].stage} to {run.stream.waves[-1].stage}: "
            + (f"solving layers {sorted(run.solves.values())}" if run.solving else f"{run.done} of {run.total} done")
            for run in active
        )
        raise WorkerLostError(
            f"no worker finished anything for {timeout:g} s ({where}); if a micro-batch or a layer really takes "
            "longer than that, raise parallel.timeout"
        )
    return ready


def _finish_one(
    group: WorkerGroup,
    active: Sequence[_Active],
    reference: Any,
    progress: Progress,
    on_solved: Callable[[Any], None],
) -> None:
    for run in active:
        if reference in run.begins:
            group.get(reference)
            run.begins.remove(reference)
            return
        if reference in run.solves:
            on_solved(group.get(reference))
            layer = run.solves.pop(reference)
            wave = next(w for w in run.stream.waves if layer in w.observed)
            left = len(set(wave.observed) & set(run.solves.values()))
            progress.stage_progress(wave.stage, len(wave.observed) - left, len(wave.observed), "solve")
            return
        for lane in run.lanes:
            if reference not in lane.in_flight:
                continue
            group.get(reference)
            del lane.in_flight[reference]
            run.done += 1
            for wave in run.stream.waves:
                progress.stage_progress(wave.stage, run.done, run.total, _doing(wave.observed))
            return


def _doing(observed: Sequence[int]) -> str:
    return f"observe layers {observed[0]}-{observed[-1]}" if observed else "forward"
