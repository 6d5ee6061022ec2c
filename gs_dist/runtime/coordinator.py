"""The job from recipe to published model: plans it once, holds the output's lock and the cluster, has it run."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from gs_dist.checkpoint.manifest import Fingerprints
from gs_dist.checkpoint.output_lock import locked
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.dataset import open_dataset, samples_fingerprint
from gs_dist.model.device_kind import DeviceKind
from gs_dist.progress import Progress
from gs_dist.recipe.config import CalibrationConfig, recipe_fingerprint
from gs_dist.results.summary import CalibrationSummary
from gs_dist.runtime.cluster import cluster, nodes_now
from gs_dist.runtime.job import Job
from gs_dist.runtime.job_output import run_of
from gs_dist.runtime.job_run import run_job, run_locked_job
from gs_dist.runtime.planned import PlannedJob, plan_early, plan_job
from gs_dist.runtime.ray_workers import evaluation_workers, stage_workers
from gs_dist.runtime.replanning import FixedPlan, PlanOfNodes, Replanning
from gs_dist.runtime.statistics_origin import origin_of, software_note

__all__ = ["quantize", "resolve", "run_job"]


def quantize(
    config: CalibrationConfig, *, address: str | None = None, num_nodes: int | None = None, progress: Progress
) -> CalibrationSummary:
    """Runs a recipe: calibrates, quantises and publishes; resumes what an earlier run of it left unfinished.

    Args:
        config: the recipe.
        address: of a Ray cluster to join; None starts one in this machine for as long as the job runs.
        num_nodes: of that cluster to wait for before the job is planned; None for those that are there.
        progress: told what is going on.

    Raises:
        UserError: something in recipe, checkpoint, data, output or cluster must be changed first.
        JobFailure: the run failed; what was finished is kept.
    """
    reader = CheckpointReader(Path(config.model), serving_dtype=config.serving_dtype)
    planned = plan_early(config, reader, address)
    dataset = open_dataset(
        config.calibration,
        reader.architecture.vocab_size,
        reader.tokenizer_file,
        eos_token_id=reader.architecture.end_of_text_id,
    )
    with locked(Path(config.output)) as without_lock:
        if without_lock:
            progress.message(without_lock)
        progress.message("reading the calibration samples")
        samples = dataset.digests()
        fingerprints = Fingerprints(
            recipe=recipe_fingerprint(config),
            source=reader.fingerprint(),
            data=samples_fingerprint(config.calibration.sequence_length, samples),
        )
        for note in dataset.notes:
            progress.message(note)
        return _run_on_ray(
            config, reader, fingerprints, address, planned, progress, num_nodes=num_nodes, samples=samples
        )


def resolve(
    run: str,
    config: CalibrationConfig,
    *,
    address: str | None = None,
    num_nodes: int | None = None,
    progress: Progress,
) -> CalibrationSummary:
    """Solves another recipe from the statistics that a job kept, without a forward pass.

    What is published has the bytes of a full run of that recipe.

    Args:
        run: output of a job that ran with `keep_statistics`.
        config: the recipe; model and calibration settings must be those of that job.
        address: of a Ray cluster to join; None starts one in this machine for as long as the job runs.
        num_nodes: as of `quantize`.
        progress: told what is going on.

    Raises:
        UserError: the kept statistics are of another model or calibration, or do not serve the recipe.
        JobFailure: the run failed.
    """
    reader = CheckpointReader(Path(config.model), serving_dtype=config.serving_dtype)
    source = reader.fingerprint()
    origin = origin_of(run, config, source)
    note = software_note(run, origin)
    if note is not None:
        progress.message(note)
    fingerprints = Fingerprints(recipe=recipe_fingerprint(config), source=source, data=origin.data)
    planned = plan_early(config, reader, address, statistics_at_hand=True)
    with locked(Path(config.output)) as without_lock:
        if without_lock:
            progress.message(without_lock)
        return _run_on_ray(
            config, reader, fingerprints, address, planned, progress, num_nodes=num_nodes, statistics_from=run
        )


def _run_on_ray(
    config: CalibrationConfig,
    reader: CheckpointReader,
    fingerprints: Fingerprints,
    address: str | None,
    planned: PlannedJob | None,
    progress: Progress,
    *,
    num_nodes: int | None,
    samples: tuple[bytes, ...] = (),
    statistics_from: str | None = None,
) -> CalibrationSummary:
    """The job on a cluster; its output is locked."""
    run_of(config, fingerprints).refuse_other_run()
    num_cpus = None if planned is None else planned.plan.num_workers * planned.plan.threads_per_worker
    asked = config.parallel.device
    device = None if asked == "auto" or statistics_from is not None else DeviceKind(asked)
    patience, tell = config.parallel.timeout, progress.message
    with cluster(address, num_cpus, device=device, patience=patience, num_nodes=num_nodes, tell=tell) as facts:
        replanning: Replanning = FixedPlan()
        if planned is None:
            make = partial(plan_job, config, reader, statistics_at_hand=statistics_from is not None)
            replanning = PlanOfNodes(make, nodes_now, facts, asked=device, tell=tell)
            planned = replanning.first(patience)
        plan, notes = planned
        for note in notes:
            progress.message(note)
        lacking = (nodes_now(device) or facts).lacking(
            cpus=plan.num_workers * plan.threads_per_worker, npus=plan.num_workers * plan.device.npus
        )
        if lacking:
            tell(f"the cluster holds {lacking}: waiting up to {patience:g} s for more nodes")
        kept = None if statistics_from is None else os.path.abspath(statistics_from)
        job = Job(config=config.anchored(), plan=plan, fingerprints=fingerprints, samples=samples, statistics_from=kept)
        return run_locked_job(
            job,
            reader,
            make_group=stage_workers,
            make_evaluation_group=evaluation_workers,
            replanning=replanning,
            progress=progress,
        )
