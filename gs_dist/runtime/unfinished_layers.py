"""The layers of a job that are not finished: judged where bits are chosen, and solved, by attempts that lead on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from gs_dist.checkpoint.manifest import LayerManifest
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import DamagedError
from gs_dist.planning.surroundings import memory_kills
from gs_dist.progress import Progress
from gs_dist.recipe.sizes import format_bytes
from gs_dist.results.costs import LayerCosts
from gs_dist.runtime.attempt import MakeGroup, OfLayer, run_attempt
from gs_dist.runtime.choice import choose, judged_before
from gs_dist.runtime.job import Job
from gs_dist.runtime.replanning import Replanning
from gs_dist.runtime.retry import retry
from gs_dist.runtime.stage_times import StageTimes
from gs_dist.runtime.tasks import JUDGE, SOLVE, Task
from gs_dist.wording import counted

__all__ = ["solve_layers"]

Outcome = TypeVar("Outcome", bound=OfLayer)


def solve_layers(
    job: Job,
    reader: CheckpointReader,
    finished: dict[int, LayerManifest],
    make_group: MakeGroup,
    replanning: Replanning,
    progress: Progress,
    times: StageTimes,
) -> Job:
    """Observes and solves all layers that are not in `finished`, after choosing their bits if these are left open.

    Args:
        job: recipe and plan.
        reader: of the float checkpoint.
        finished: layers that are published; filled in.
        make_group: makes the workers.
        replanning: keeps the plan up with the nodes, from one start of workers to the next.
        progress: told what is going on.
        times: of the stages; filled in.

    Returns:
        The job as it was solved.
    """
    work = _Work(reader=reader, make_group=make_group, replanning=replanning, progress=progress, times=times)
    return _until_nothing_is_damaged(
        lambda: work.observe_and_solve(job, finished), job.plan.architecture.num_layers, progress
    )


def _until_nothing_is_damaged(work: Callable[[], Job], num_layers: int, progress: Progress) -> Job:
    """Works again where something that a layer was to be solved from is damaged: it was deleted then."""
    for _ in range(num_layers):
        try:
            return work()
        except DamagedError as error:
            progress.message(f"{error}: it is made again")
    return work()


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What every pass over the layers is done with; arguments of `solve_layers`."""

    reader: CheckpointReader
    make_group: MakeGroup
    replanning: Replanning
    progress: Progress
    times: StageTimes

    def observe_and_solve(self, job: Job, finished: dict[int, LayerManifest]) -> Job:
        """Fills `finished`; the job as it was solved."""
        if job.config.bits == "auto":
            job = self._with_bits(job, finished)
        self._finish_layers(job, SOLVE, finished)
        return job

    def _with_bits(self, job: Job, finished: dict[int, LayerManifest]) -> Job:
        """Has every layer observed and judged; the job that solves what is chosen."""
        judged: dict[int, LayerCosts] = judged_before(job, finished, self.reader, self.progress)
        if len(judged) < job.plan.architecture.num_layers:
            self.progress.message("finding out what each scheme costs each linear")
            self._finish_layers(job, JUDGE, judged)
        return choose(job, judged, self.progress)

    def _finish_layers(self, job: Job, task: Task[Outcome], finished: dict[int, Outcome]) -> None:
        """Runs passes until the task is done to every layer; `finished` and `times` are filled in."""
        num_layers = job.plan.architecture.num_layers
        killed = memory_kills()

        def on_finished(layer: int) -> None:
            if task is SOLVE:
                self.progress.layer_finished(layer, len(finished), num_layers)

        def attempt() -> None:
            run_attempt(job, task, finished, self.make_group, self.replanning, self.progress, self.times, on_finished)

        retry(
            attempt,
            finished,
            num_layers,
            max_restarts=job.config.parallel.max_restarts,
            giving_up=lambda failures: (
                f"{failures} attempts in a row finished no layer. {len(finished)} of {num_layers} layers are "
                f"{task.done}: submit the same recipe again to go on from there"
                f"{_if_by_memory(job, memory_kills() - killed)}"
            ),
            going_on=lambda: f"starting the workers again, {num_layers - len(finished)} layers to go",
            tell=self.progress.message,
        )


def _if_by_memory(job: Job, killed: int) -> str:
    """What to change where workers died of memory, which is known of this machine alone."""
    planned = f"each was planned with {format_bytes(job.plan.host_peak)} of host memory"
    cure = f"{planned}: set parallel.memory_per_worker to less, or take fewer workers a node"
    if not job.plan.device.on_host:
        cure = f"{planned}: lower calibration.sequence_length, or take fewer workers a node"
    if killed > 0:
        return f". The kernel has ended {counted(killed, 'process')} here for lack of memory; {cure}"
    return f". If they were ended for lack of memory (OOMKilled, or `Out of memory` in dmesg), {cure}"
