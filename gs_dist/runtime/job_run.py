"""A job from its plan to `done`: what is finished, what is to be chosen and solved, and what is published.

Progress lives on storage alone: a layer is finished when its manifest stands beside its shard. So losing
a worker, the coordinator or the whole job comes to the same thing: what is unfinished is observed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from gs_dist.checkpoint.job_log import JobLog
from gs_dist.checkpoint.manifest import Fingerprints, LayerManifest
from gs_dist.checkpoint.merge import refuse_foreign_weights
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import RunDirectory, locked
from gs_dist.errors import DamagedError
from gs_dist.planning.probe import PROMPT_TOKENS
from gs_dist.planning.surroundings import memory_kills
from gs_dist.progress import Progress
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.sizes import format_bytes
from gs_dist.results.costs import LayerCosts
from gs_dist.results.summary import CalibrationSummary
from gs_dist.runtime.attempt import MakeGroup, OfLayer, run_attempt
from gs_dist.runtime.choice import choose, judged_before
from gs_dist.runtime.job import Job
from gs_dist.runtime.job_watch import JobWatch, watched
from gs_dist.runtime.pace import Pace, solves_per_pass
from gs_dist.runtime.probe import MakeEvaluationGroup, Probe
from gs_dist.runtime.publication import publish
from gs_dist.runtime.retry import retry
from gs_dist.runtime.software import Software
from gs_dist.runtime.stage_times import StageTimes
from gs_dist.runtime.tasks import JUDGE, SOLVE, Task
from gs_dist.wording import counted

__all__ = ["run_job", "run_locked_job", "run_of"]

Outcome = TypeVar("Outcome", bound=OfLayer)


def run_job(
    job: Job,
    reader: CheckpointReader,
    *,
    make_group: MakeGroup,
    make_evaluation_group: MakeEvaluationGroup,
    progress: Progress,
) -> CalibrationSummary:
    """Observes and solves what is unfinished, merges, and probes the result if the recipe says so.

    Args:
        job: recipe and plan.
        reader: of the float checkpoint.
        make_group: makes the workers that observe and solve.
        make_evaluation_group: makes the workers of the probe.
        progress: told what is going on.
    """
    with locked(Path(job.config.output)):
        return run_locked_job(
            job, reader, make_group=make_group, make_evaluation_group=make_evaluation_group, progress=progress
        )


def run_of(config: CalibrationConfig, fingerprints: Fingerprints) -> RunDirectory:
    """The output of a recipe's job."""
    return RunDirectory(
        Path(config.output),
        dialects=config.dialects,
        fingerprints=fingerprints,
        recipe=config.fingerprint_fields(),
        made_with=Software.here().made_with,
    )


def run_locked_job(
    job: Job,
    reader: CheckpointReader,
    *,
    make_group: MakeGroup,
    make_evaluation_group: MakeEvaluationGroup,
    progress: Progress,
) -> CalibrationSummary:
    """`run_job` on an output that is locked."""
    began = time.monotonic()
    run = run_of(job.config, job.fingerprints)
    probe = Probe.open(job, reader)
    num_layers = reader.architecture.num_layers
    finished = run.prepare(num_layers, progress.message, reader)
    if len(finished) < num_layers:
        reader.refuse_damaged_outer()
        for name in job.config.dialects:
            refuse_foreign_weights(run.path, name, num_layers)
    times = StageTimes()
    with watched(_watch(job, progress, len(finished))) as watch:
        if finished:
            watch.message(f"resuming: {len(finished)} of {num_layers} layers are finished")
        # The coordinator has nothing to do while workers start and compute, and embedding and head are gigabytes.
        with ThreadPoolExecutor(1, thread_name_prefix="outer") as pool:
            outer = pool.submit(run.outer, reader)
            solved = _until_nothing_is_damaged(
                lambda: _observe_and_solve(job, reader, finished, make_group, watch, times), num_layers, watch
            )
        return publish(
            solved,
            run,
            reader,
            finished,
            outer.result(),
            times,
            probe,
            make_evaluation_group=make_evaluation_group,
            seconds=time.monotonic() - began,
            progress=watch,
        )


def _watch(job: Job, progress: Progress, layers_done: int) -> JobWatch:
    """Tells of the job from here on, in its output too."""
    config, plan = job.config, job.plan
    probed = 0.0
    if config.max_perplexity_increase is not None:
        models, batch = 1 + len(config.dialects), config.probe_data.samples_per_micro_batch
        longest_stage = max(len(stage.layers) for stage in plan.stages)
        new_tokens = config.probe.max_new_tokens
        generated = new_tokens * (PROMPT_TOKENS + new_tokens) / (plan.micro_batch_size * plan.sequence_length)
        probed = (models * -(-config.probe_data.num_samples // batch) + generated) * longest_stage
    return JobWatch(
        progress,
        JobLog(Path(config.output)),
        Pace(prior=solves_per_pass(plan), probe=probed, began=time.monotonic()),
        layers_done=layers_done,
        num_layers=plan.architecture.num_layers,
    )


def _until_nothing_is_damaged(work: Callable[[], Job], num_layers: int, progress: Progress) -> Job:
    """Works again where something that a layer was to be solved from is damaged: it was deleted then."""
    for _ in range(num_layers):
        try:
            return work()
        except DamagedError as error:
            progress.message(f"{error}: it is made again")
    return work()


def _observe_and_solve(
    job: Job,
    reader: CheckpointReader,
    finished: dict[int, LayerManifest],
    make_group: MakeGroup,
    progress: Progress,
    times: StageTimes,
) -> Job:
    """Fills `finished`; the job as it was solved."""
    if job.config.bits == "auto":
        job = _with_bits(job, reader, finished, make_group, progress, times)
    _finish_layers(job, SOLVE, finished, make_group, progress, times)
    return job


def _with_bits(
    job: Job,
    reader: CheckpointReader,
    finished: dict[int, LayerManifest],
    make_group: MakeGroup,
    progress: Progress,
    times: StageTimes,
) -> Job:
    """Has every layer observed and judged; the job that solves what is chosen."""
    judged: dict[int, LayerCosts] = judged_before(job, finished, reader, progress)
    if len(judged) < job.plan.architecture.num_layers:
        progress.message("finding out what each scheme costs each linear")
        _finish_layers(job, JUDGE, judged, make_group, progress, times)
    return choose(job, judged, progress)


def _finish_layers(
    job: Job,
    task: Task[Outcome],
    finished: dict[int, Outcome],
    make_group: MakeGroup,
    progress: Progress,
    times: StageTimes,
) -> None:
    """Runs passes until the task is done to every layer; `finished` and `times` are filled in."""
    num_layers = job.plan.architecture.num_layers
    killed = memory_kills()

    def on_finished(layer: int) -> None:
        if task is SOLVE:
            progress.layer_finished(layer, len(finished), num_layers)

    retry(
        lambda: run_attempt(job, task, finished, make_group, progress, times, on_finished),
        finished,
        num_layers,
        max_restarts=job.config.parallel.max_restarts,
        giving_up=lambda failures: (
            f"{failures} attempts in a row finished no layer. {len(finished)} of {num_layers} layers are {task.done}: "
            f"submit the same recipe again to go on from there{_if_by_memory(job, memory_kills() - killed)}"
        ),
        going_on=lambda: f"starting the workers again, {num_layers - len(finished)} layers to go",
        tell=progress.message,
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
