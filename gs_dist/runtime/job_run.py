"""A job from its plan to `done`: what is finished, what is to be chosen and solved, and what is published.

Progress lives on storage alone: a layer is finished when its manifest stands beside its shard. So losing
a worker, the coordinator or the whole job comes to the same thing: what is unfinished is observed again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gs_dist.checkpoint.manifest import LayerManifest
from gs_dist.checkpoint.merge import refuse_foreign_weights
from gs_dist.checkpoint.output_lock import locked
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import RunDirectory
from gs_dist.errors import RefusedError
from gs_dist.progress import Progress
from gs_dist.results.summary import CalibrationSummary
from gs_dist.runtime.attempt import MakeGroup
from gs_dist.runtime.job import Job
from gs_dist.runtime.job_output import run_of
from gs_dist.runtime.job_watch import JobWatch, watch_of, watched
from gs_dist.runtime.probe import MakeEvaluationGroup, Probe
from gs_dist.runtime.publication import publish
from gs_dist.runtime.replanning import FixedPlan, Replanning
from gs_dist.runtime.stage_times import StageTimes
from gs_dist.runtime.unfinished_layers import solve_layers

__all__ = ["run_job", "run_locked_job"]

_FIXED = FixedPlan()


def run_job(
    job: Job,
    reader: CheckpointReader,
    *,
    make_group: MakeGroup,
    make_evaluation_group: MakeEvaluationGroup,
    replanning: Replanning = _FIXED,
    progress: Progress,
) -> CalibrationSummary:
    """Observes and solves what is unfinished, merges, and probes the result if the recipe says so.

    Args:
        job: recipe and plan.
        reader: of the float checkpoint.
        make_group: makes the workers that observe and solve.
        make_evaluation_group: makes the workers of the probe.
        replanning: keeps the plan up with the nodes.
        progress: told what is going on.
    """
    with locked(Path(job.config.output)):
        return run_locked_job(
            job,
            reader,
            make_group=make_group,
            make_evaluation_group=make_evaluation_group,
            replanning=replanning,
            progress=progress,
        )


def run_locked_job(
    job: Job,
    reader: CheckpointReader,
    *,
    make_group: MakeGroup,
    make_evaluation_group: MakeEvaluationGroup,
    replanning: Replanning = _FIXED,
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
    with _refusals_noted(run), watched(watch_of(job, progress, len(finished))) as watch:
        if finished:
            watch.message(f"resuming: {len(finished)} of {num_layers} layers are finished")
        solved, outer = _solve_beside_outer(job, run, reader, finished, make_group, replanning, watch, times)
        return publish(
            solved,
            run,
            reader,
            finished,
            outer,
            times,
            probe,
            make_evaluation_group=make_evaluation_group,
            seconds=time.monotonic() - began,
            progress=watch,
        )


@contextmanager
def _refusals_noted(run: RunDirectory) -> Iterator[None]:
    """What refuses a job's outcome stands in its output, too."""
    try:
        yield
    except RefusedError as error:
        run.refuse(str(error))
        raise


def _solve_beside_outer(
    job: Job,
    run: RunDirectory,
    reader: CheckpointReader,
    finished: dict[int, LayerManifest],
    make_group: MakeGroup,
    replanning: Replanning,
    watch: JobWatch,
    times: StageTimes,
) -> tuple[Job, LayerManifest]:
    """Solves layers, fills `finished`, and carries over what stands outside them meanwhile.

    The coordinator has nothing to do while workers start and compute, and embedding and head are gigabytes.
    """
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="outer") as pool:
            outer = pool.submit(run.outer, reader)
            outer.add_done_callback(partial(_tell_failure, watch))
            solved = solve_layers(job, reader, finished, make_group, replanning, watch, times)
        return solved, outer.result()
    except BaseException:
        if not finished:
            run.withdraw_outer()
        raise


def _tell_failure(watch: JobWatch, outer: Future[LayerManifest]) -> None:
    """At once: it ends the job only when all layers are solved, which may be hours later."""
    error = outer.exception()
    if error is not None:
        watch.message(f"what stands outside the layers is not carried over, for which the job will fail: {error}")
