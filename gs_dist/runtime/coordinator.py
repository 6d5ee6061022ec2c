"""The job from recipe to published model: plans, holds the workers, retries, merges.

Progress lives on storage alone: a layer is finished when its manifest stands beside its shard. So losing
a worker, the coordinator or the whole job comes to the same thing: what is unfinished is observed again.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gs_dist import __version__
from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.layer_costs import read_costs
from gs_dist.checkpoint.manifest import Fingerprints, LayerManifest
from gs_dist.checkpoint.merge import refuse_foreign_weights
from gs_dist.checkpoint.model_card import CARD, write_model_card
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import (
    LAYER_POLICIES,
    RunDirectory,
    StatisticsOrigin,
    holds_statistics,
    locked,
    remove_statistics,
    write_origin,
)
from gs_dist.checkpoint.writer import write_bytes
from gs_dist.data.dataset import open_dataset
from gs_dist.errors import ClusterError, JobFailure, WorkerLostError
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.planning.workload import make_workload
from gs_dist.progress import Progress
from gs_dist.recipe.config import CalibrationConfig, published_recipe, recipe_fingerprint
from gs_dist.results.costs import LayerCosts
from gs_dist.results.summary import CalibrationSummary, StageSummary, write_summary
from gs_dist.runtime.account import RECIPE, as_told_before, summarise, versions
from gs_dist.runtime.attempt import MakeGroup, run_attempt
from gs_dist.runtime.choice import chosen_policies, render_layer_policies
from gs_dist.runtime.cluster import cluster
from gs_dist.runtime.evaluation_worker import Evaluation, EvaluationWorker
from gs_dist.runtime.probe import MakeEvaluationGroup, Probe
from gs_dist.runtime.software import Software
from gs_dist.runtime.solving_plan import origin_of, plan_job, software_note
from gs_dist.runtime.stage_worker import Job, StageWorker
from gs_dist.runtime.worker_group import RayWorkerGroup, WorkerGroup, WorkerKey
from gs_dist.wording import counted

__all__ = ["evaluation_workers", "quantize", "resolve", "run_job"]


def quantize(config: CalibrationConfig, *, address: str | None = None, progress: Progress) -> CalibrationSummary:
    """Runs a recipe: calibrates, quantises and publishes; resumes what an earlier run of it left unfinished.

    Args:
        config: the recipe.
        address: of a Ray cluster to join; None starts one in this machine for as long as the job runs.
        progress: told what is going on.

    Raises:
        UserError: something in recipe, checkpoint, data, output or cluster must be changed first.
        JobFailure: the run failed; what was finished is kept.
    """
    reader = CheckpointReader(Path(config.model))
    num_cpus = _refuse_early(config, reader, address)
    dataset = open_dataset(
        config.calibration,
        reader.architecture.vocab_size,
        reader.tokenizer_file,
        eos_token_id=reader.architecture.end_of_text_id,
    )
    with locked(Path(config.output)):
        progress.message("reading the calibration samples")
        fingerprints = Fingerprints(
            recipe=recipe_fingerprint(config), source=reader.fingerprint(), data=dataset.fingerprint()
        )
        return _run_on_ray(config, reader, fingerprints, address, num_cpus, progress)


def resolve(
    run: str, config: CalibrationConfig, *, address: str | None = None, progress: Progress
) -> CalibrationSummary:
    """Solves another recipe from the statistics that a job kept, without a forward pass.

    What is published has the bytes of a full run of that recipe.

    Args:
        run: output of a job that ran with `keep_statistics`.
        config: the recipe; model and calibration settings must be those of that job.
        address: of a Ray cluster to join; None starts one in this machine for as long as the job runs.
        progress: told what is going on.

    Raises:
        UserError: the kept statistics are of another model or calibration, or do not serve the recipe.
        JobFailure: the run failed.
    """
    reader = CheckpointReader(Path(config.model))
    source = reader.fingerprint()
    origin = origin_of(run, config, source)
    note = software_note(run, origin)
    if note is not None:
        progress.message(note)
    fingerprints = Fingerprints(recipe=recipe_fingerprint(config), source=source, data=origin.data)
    num_cpus = _refuse_early(config, reader, address, solves_only=True)
    with locked(Path(config.output)):
        return _run_on_ray(config, reader, fingerprints, address, num_cpus, progress, statistics_from=run)


def _refuse_early(
    config: CalibrationConfig, reader: CheckpointReader, address: str | None, *, solves_only: bool = False
) -> int | None:
    """Refuses what can be refused before a sample is read; CPUs that a cluster of this machine is to have.

    Whether the job fits a cluster at `address` is known once that is joined.
    """
    reader.companions()  # refuses what could not be carried over in the end
    if address is not None:
        make_workload(config, reader.architecture, reader.tensors)
        return None
    facts = ClusterFacts.of_this_machine()
    runs_model = not solves_only or config.max_perplexity_increase is not None
    if config.parallel.device == "ascend" and not facts.num_npus and runs_model:
        raise ClusterError(
            "parallel.device is ascend, and this machine has no Ascend card: set it to cpu or auto, or join a "
            "cluster that has some with --address"
        )
    here = plan_job(config, reader, facts, solves_only=solves_only)
    _notes(config, reader, here)
    return here.num_workers * here.threads_per_worker


def _run_on_ray(
    config: CalibrationConfig,
    reader: CheckpointReader,
    fingerprints: Fingerprints,
    address: str | None,
    num_cpus: int | None,
    progress: Progress,
    statistics_from: str | None = None,
) -> CalibrationSummary:
    """The job on a cluster; its output is locked."""
    _run_directory(config, fingerprints).refuse_other_run()
    with cluster(address, num_cpus) as facts:
        plan = plan_job(config, reader, facts, solves_only=statistics_from is not None)
        for note in _notes(config, reader, plan):
            progress.message(note)
        lacking = facts.lacking(
            cpus=plan.num_workers * plan.threads_per_worker, npus=plan.num_workers if plan.device == "ascend" else 0
        )
        if lacking:
            progress.message(f"the cluster holds {lacking}: waiting up to {config.parallel.timeout:g} s for more nodes")
        kept = None if statistics_from is None else os.path.abspath(statistics_from)
        job = Job(config=config.anchored(), plan=plan, fingerprints=fingerprints, statistics_from=kept)
        return _run_locked(
            job, reader, make_group=_ray_workers, make_evaluation_group=evaluation_workers, progress=progress
        )


def _notes(config: CalibrationConfig, reader: CheckpointReader, plan: CalibrationPlan) -> list[str]:
    """What model and formats have to say about the plan; they refuse what they cannot carry over or hold."""
    notes = [*reader.notes, *reader.companions().notes]
    notes += [
        note
        for name in config.dialects
        for policies in plan.policy_sets
        for note in codec_of(name).check_policies(policies, reader.architecture)
    ]
    return list(dict.fromkeys(notes))


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
        return _run_locked(
            job, reader, make_group=make_group, make_evaluation_group=make_evaluation_group, progress=progress
        )


def _run_directory(config: CalibrationConfig, fingerprints: Fingerprints) -> RunDirectory:
    return RunDirectory(
        Path(config.output),
        dialects=config.dialects,
        fingerprints=fingerprints,
        recipe=config.fingerprint_fields(),
        made_with=Software.here().made_with,
    )


def _run_locked(
    job: Job,
    reader: CheckpointReader,
    *,
    make_group: MakeGroup,
    make_evaluation_group: MakeEvaluationGroup,
    progress: Progress,
) -> CalibrationSummary:
    """`run_job` on an output that is locked."""
    began = time.monotonic()
    config = job.config
    run = _run_directory(config, job.fingerprints)
    probe = Probe.open(job, reader)
    finished = run.prepare(reader.architecture.num_layers)
    if finished:
        progress.message(f"resuming: {len(finished)} of {reader.architecture.num_layers} layers are finished")
    if len(finished) < reader.architecture.num_layers:
        reader.refuse_damaged_outer()
        for name in config.dialects:
            refuse_foreign_weights(run.path, name, reader.architecture.num_layers)
    stages: dict[WorkerKey, StageSummary] = {}
    if config.bits == "auto":
        job = _choose_bits(job, finished, make_group, progress, stages)
    _calibrate(job, finished, make_group, progress, stages)
    progress.message("merging")
    run.merge(reader, finished, job.plan.policies, recipe=config.fingerprint_fields(), versions=versions())
    _check_published(run, config)
    summary, recipe = summarise(job, reader, finished, stages, time.monotonic() - began), config
    if stages:
        for note in summary.notes:
            progress.message(note)
    else:
        summary, recipe = as_told_before(run.path, summary, config)
    write_bytes(run.path / RECIPE, published_recipe(recipe).encode())
    write_summary(run.path, summary)  # of use where the probe fails, too
    if config.keep_statistics and all(holds_statistics(run.path, layer) for layer in finished):
        calibration, made_with = config.fingerprint_fields()["calibration"], Software.here().made_with
        write_origin(run.path, StatisticsOrigin.of(job.fingerprints, calibration, made_with.versions))
    elif config.keep_statistics:
        progress.message(
            "statistics are not kept: layers were published before keep_statistics was set. To have them, run the "
            "recipe into another output"
        )
    elif config.bits == "auto":
        remove_statistics(run.path)
    if probe is not None:
        for name in config.dialects:  # cards of a model that is not judged yet
            (run.path / name / CARD).unlink(missing_ok=True)
        summary = probe.run(summary, make_evaluation_group, progress)
        write_summary(run.path, summary)
    for name in config.dialects:
        write_model_card(run.path / name, recipe, summary, reader.architecture)
    run.finish({"gs-dist": __version__, "layers": len(finished), "formats": list(config.dialects)})
    return summary


def _choose_bits(
    job: Job,
    finished: Mapping[int, LayerManifest],
    make_group: MakeGroup,
    progress: Progress,
    stages: dict[WorkerKey, StageSummary],
) -> Job:
    """Has every layer observed and judged, and chooses under the budget; the job that solves the choice.

    What was judged before a crash counts, unless the layer is still to be solved and its statistics are gone.
    """
    output = Path(job.config.output)
    num_layers = job.plan.architecture.num_layers
    judged: dict[int, LayerCosts] = {}
    for layer in range(num_layers):
        costs = read_costs(output, layer, job.fingerprints)
        solvable = layer in finished or job.statistics_from is not None or holds_statistics(output, layer)
        if costs is not None and solvable:
            judged[layer] = costs
    if len(judged) < num_layers:
        progress.message("finding out what each scheme costs each linear")
        _calibrate(dataclasses.replace(job, judges=True), judged, make_group, progress, stages)
    plan, layer_policies = chosen_policies(job.config, job.plan, judged)
    write_bytes(output / LAYER_POLICIES, render_layer_policies(layer_policies, job.fingerprints.recipe).encode())
    counts = Counter(
        policy.weight_bits if policy else 16 for name, policy in plan.policies.items() if name != "lm_head"
    )
    progress.message(f"chosen: {counted(counts[4], 'linear')} of 4 bits, {counts[8]} of 8, {counts[16]} in float")
    return dataclasses.replace(job, plan=plan, statistics_from=job.statistics_from or job.config.output)


def _check_published(run: RunDirectory, config: CalibrationConfig) -> None:
    """Nothing counts as done that a look at the files alone would refuse."""
    for name in config.dialects:
        report = check(run.path / name)
        if not report.clean:
            raise JobFailure(f"{name}: what was published breaks the rules of its format:\n{report.render()}")


def _calibrate(
    job: Job,
    finished: dict[int, Any],
    make_group: MakeGroup,
    progress: Progress,
    stages: dict[WorkerKey, StageSummary],
) -> None:
    """Runs passes until every layer is finished; `finished` and `stages` are filled in."""
    what = "judged" if job.judges else "published"
    config, num_layers = job.config, job.plan.architecture.num_layers
    failures = 0
    while len(finished) < num_layers:
        before = len(finished)
        try:
            run_attempt(job, finished, make_group, progress, stages)
        except WorkerLostError as error:
            # Progress between two losses shows that the job can be done; without it, a fault repeats.
            failures = 0 if len(finished) > before else failures + 1
            if failures > config.parallel.max_restarts:
                raise WorkerLostError(
                    f"{error}; {failures} attempts in a row finished no layer. {len(finished)} of {num_layers} layers "
                    f"are {what}: submit the same recipe again to go on from there"
                ) from error
            progress.message(f"{error}; starting the workers again, {num_layers - len(finished)} layers to go")
        else:
            failures = 0  # all is done, or layers were finished and more replicas go on from there


def _ray_workers(job: Job, min_replicas: int) -> WorkerGroup:
    return RayWorkerGroup(
        partial(StageWorker, job),
        num_stages=job.plan.pipeline_parallel_size,
        num_replicas=job.plan.data_parallel_size,
        min_replicas=min_replicas,
        num_threads=job.plan.threads_per_worker,
        npus=1 if job.plan.device == "ascend" else 0,
        timeout=job.config.parallel.timeout,
    )


def evaluation_workers(evaluation: Evaluation, timeout: float) -> WorkerGroup:
    """One replica of an evaluation's stages, on Ray.

    Raises:
        ClusterError: there is no room for it.
    """
    return RayWorkerGroup(
        partial(EvaluationWorker, evaluation),
        num_stages=len(evaluation.stages),
        num_replicas=1,
        min_replicas=1,
        num_threads=evaluation.threads_per_worker,
        npus=1 if evaluation.device == "ascend" else 0,
        timeout=timeout,
    )
