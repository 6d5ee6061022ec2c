"""Drives streams of micro-batches through the workers: bounded in flight, every wait with a limit.

Knows workers only through the `WorkerGroup` protocol, so that it runs on Ray actors and on workers in
the same process alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

from gs_dist.errors import WorkerLostError
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.progress import Progress, StageLeft, WorkLeft
from gs_dist.runtime.layer_statistics import Payload
from gs_dist.runtime.micro_batches import MicroBatchQueue
from gs_dist.runtime.partial_sums import PartialSums
from gs_dist.runtime.schedule import Stream
from gs_dist.runtime.stage_worker import StageWorker
from gs_dist.runtime.tasks import Task
from gs_dist.runtime.workers import Reference, WorkerGroup, WorkerKey, value_of

__all__ = ["run_streams"]

Outcome = TypeVar("Outcome")


@dataclass
class _Active(Generic[Outcome]):
    """A stream under way, a queue a replica; then what is done to its layers."""

    stream: Stream
    queues: list[MicroBatchQueue[Payload | None]]
    begins: set[Reference[None]]
    tasks: dict[Reference[Outcome], int] = field(default_factory=dict)
    solving: bool = False

    @property
    def done(self) -> int:
        return sum(len(queue.results) for queue in self.queues)

    @property
    def total(self) -> int:
        return sum(queue.total for queue in self.queues)

    @property
    def steps_left(self) -> list[int]:
        """Micro-batches that each replica has still to pass."""
        return [queue.total - len(queue.results) for queue in self.queues]

    @property
    def tasks_left(self) -> Collection[int] | None:
        """Layers whose task is not done; None before any was started."""
        return set(self.tasks.values()) if self.solving else None

    @property
    def ran(self) -> bool:
        return not self.begins and all(queue.finished for queue in self.queues)


def run_streams(
    group: WorkerGroup[StageWorker],
    streams: Sequence[Stream],
    plan: CalibrationPlan,
    deal: Sequence[range],
    task: Task[Outcome],
    *,
    timeout: float,
    progress: Progress,
    on_finished: Callable[[Outcome], None],
    pause: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs all streams; those that share no stage run at the same time.

    Args:
        group: the workers.
        streams: as `schedule.plan_streams` gives them.
        plan: deals layers to owners, and bounds what is in flight.
        deal: micro-batches of each replica.
        task: what is done to each layer behind its stream.
        timeout: seconds without any progress after which the workers count as lost.
        progress: told of finished micro-batches and layers.
        on_finished: called with what the task gave, layer by layer.
        pause: asked whenever streams could be started; once it says so none is started any more, and those
            under way are run and solved to their end.

    Returns:
        Whether all streams ran.

    Raises:
        WorkerLostError: a worker died, or nothing happened for `timeout` seconds.
    """
    waiting = list(streams)
    active: list[_Active[Outcome]] = []
    paused = False
    while active or (waiting and not paused):
        ready = [] if paused else _ready(waiting, active)
        if ready and pause():
            paused, ready = True, []
        for stream in ready:
            waiting.remove(stream)
            active.append(_start(group, stream, deal, plan.max_in_flight))
        references: list[Reference[object]] = []
        for run in active:
            steps = [reference for queue in run.queues for reference in queue.fill()]
            references += [*run.begins, *steps, *run.tasks]  # a step fails for what its begin failed for
        progress.work_left(_work_left(waiting, active, plan, deal, task))
        for reference in _wait(group, references, timeout, active):
            _finish_one(group, active, reference, progress, on_finished)
        for run in list(active):
            if run.tasks or not run.ran:
                continue
            if not run.solving:
                run.solving = True
                run.tasks = _start_tasks(group, run.stream, plan, task)
            if not run.tasks:
                active.remove(run)
    progress.work_left(_work_left(waiting, active, plan, deal, task))
    return not waiting


def _work_left(
    waiting: Sequence[Stream],
    active: Sequence[_Active[Outcome]],
    plan: CalibrationPlan,
    deal: Sequence[range],
    task: Task[Outcome],
) -> WorkLeft:
    """What is ahead of each stage; of its replicas, the one that has most of it."""
    replicas = plan.data_parallel_size
    owned = {stage.stage: -(-len(stage.layers) // replicas) if task.solved_later else 0 for stage in plan.stages}
    passes: dict[int, float] = dict.fromkeys(owned, 0.0)
    solves: dict[int, float] = dict.fromkeys(owned, 0.0) | owned
    steps = 0
    ahead = [(stream, [len(batches) for batches in deal], None) for stream in waiting]
    for stream, left, tasks in [*ahead, *((run.stream, run.steps_left, run.tasks_left) for run in active)]:
        steps += sum(left)
        for wave in stream.waves:
            passes[wave.stage] += max(left, default=0) * (wave.end_layer - wave.first_layer)
            todo = wave.observed if tasks is None else [layer for layer in wave.observed if layer in tasks]
            solves[wave.stage] += max(Counter(map(plan.owner, todo)).values(), default=0)
    tokens = steps * plan.config.calibration.samples_per_micro_batch * plan.config.calibration.sequence_length
    stages = tuple(StageLeft(stage=stage, passes=passes[stage], solves=solves[stage]) for stage in passes)
    return WorkLeft(stages=stages, tokens=tokens)


def _ready(waiting: Sequence[Stream], active: Sequence[_Active[Outcome]]) -> list[Stream]:
    """Streams whose stages are all free."""
    busy = {wave.stage for run in active for wave in run.stream.waves}
    ready = []
    for stream in waiting:
        stages = {wave.stage for wave in stream.waves}
        if not stages & busy:
            ready.append(stream)
        busy |= stages  # later streams of these stages must not overtake
    return ready


def _start(
    group: WorkerGroup[StageWorker], stream: Stream, deal: Sequence[range], max_in_flight: int
) -> _Active[Outcome]:
    begins = {
        group.call(WorkerKey(wave.stage, replica), StageWorker.begin, wave, micro_batches.start, micro_batches.stop)
        for wave in stream.waves
        for replica, micro_batches in enumerate(deal)
    }

    def sends(replica: int) -> Callable[[int], Reference[Payload | None]]:
        def send(micro_batch: int) -> Reference[Payload | None]:
            payload: Payload | None = None
            for wave in stream.waves:
                reference = group.call(WorkerKey(wave.stage, replica), StageWorker.step, micro_batch, payload)
                payload = value_of(reference)
            return reference

        return send

    queues = [MicroBatchQueue(batches, sends(replica), max_in_flight) for replica, batches in enumerate(deal)]
    return _Active(stream=stream, queues=queues, begins=begins)


def _start_tasks(
    group: WorkerGroup[StageWorker], stream: Stream, plan: CalibrationPlan, task: Task[Outcome]
) -> dict[Reference[Outcome], int]:
    """Has the task done to each observed layer by its owner, from the partial sums of all replicas.

    A worker does what it is asked for in order. Each replica owns one layer of a group, and is asked for its partial
    sums of the next group before its own layer of this one: the others would wait for that solve before theirs.
    """
    tasks = {}
    replicas = range(plan.data_parallel_size)
    for wave in stream.waves:
        observed = list(wave.observed)
        groups = [observed[start : start + len(replicas)] for start in range(0, len(observed), len(replicas))]
        sums: dict[int, list[Reference[PartialSums | None]]] = {}
        for ahead in range(len(groups) + 1):
            for layer in groups[ahead] if ahead < len(groups) else ():
                sums[layer] = [
                    group.call(WorkerKey(wave.stage, replica), StageWorker.partial_sums, layer)
                    for replica in replicas
                    if replica != plan.owner(layer)
                ]
            for layer in groups[ahead - 1] if ahead else ():
                owner = WorkerKey(wave.stage, plan.owner(layer))
                tasks[task.start(group, owner, layer, sums.pop(layer))] = layer
    return tasks


def _wait(
    group: WorkerGroup[StageWorker],
    references: Sequence[Reference[object]],
    timeout: float,
    active: Sequence[_Active[Outcome]],
) -> list[Reference[object]]:
    if not references:
        return []
    ready = group.wait(references, timeout)
    if not ready:
        where = "; ".join(
            f"stages {run.stream.waves[0].stage} to {run.stream.waves[-1].stage}: "
            + (f"solving layers {sorted(run.tasks.values())}" if run.solving else f"{run.done} of {run.total} done")
            for run in active
        )
        raise WorkerLostError(
            f"no worker finished anything for {timeout:g} s ({where}); if a micro-batch or a layer really takes "
            "longer than that, raise parallel.timeout"
        )
    return ready


def _finish_one(
    group: WorkerGroup[StageWorker],
    active: Sequence[_Active[Outcome]],
    reference: Reference[object],
    progress: Progress,
    on_finished: Callable[[Outcome], None],
) -> None:
    for run in active:
        if reference in run.begins:
            group.get(reference)
            run.begins.remove(cast("Reference[None]", reference))
            return
        task = cast("Reference[Outcome]", reference)  # it is, where it is found there
        if task in run.tasks:
            on_finished(group.get(task))
            layer = run.tasks.pop(task)
            wave = next(w for w in run.stream.waves if layer in w.observed)
            left = len(set(wave.observed) & set(run.tasks.values()))
            progress.stage_progress(wave.stage, len(wave.observed) - left, len(wave.observed), "solve")
            return
        if any(queue.take(group, reference) for queue in run.queues):
            for wave in run.stream.waves:
                progress.stage_progress(wave.stage, run.done, run.total, _doing(wave.observed))
            return


def _doing(observed: Sequence[int]) -> str:
    return f"observe layers {observed[0]}-{observed[-1]}" if observed else "forward"
