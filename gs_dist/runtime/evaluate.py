"""Perplexity of the float model and of the published one, through the same stages."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gs_dist.checkpoint.engines import engine_named
from gs_dist.checkpoint.finished_model import find_models
from gs_dist.checkpoint.provenance import PROVENANCE_FILE, read_provenance
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.dataset import TokenBatch, open_dataset
from gs_dist.errors import CheckpointError, PlanError, UserError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.numbers.token_step import TokenStep
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.probe import choose_groups, evaluation_shape
from gs_dist.planning.spread import ASCEND_MEMORY_PER_WORKER, host_share
from gs_dist.progress import Progress
from gs_dist.recipe.config import base_name
from gs_dist.recipe.sections import CalibrationData
from gs_dist.recipe.sizes import format_bytes
from gs_dist.results.summary import PerplexitySummary
from gs_dist.runtime.cluster import cluster
from gs_dist.runtime.evaluation_worker import Evaluation
from gs_dist.runtime.perplexity import measure
from gs_dist.runtime.ray_workers import evaluation_workers

__all__ = ["Models", "evaluate", "evaluation_of", "models_of"]


def evaluate(
    directory: str,
    data: CalibrationData,
    *,
    dialects: Sequence[str] = (),
    model: str | None = None,
    pipeline_parallel_size: int | None = None,
    memory_per_worker: int | None = None,
    address: str | None = None,
    timeout: float = 600.0,
    engine: str | None = None,
    progress: Progress,
) -> tuple[PerplexitySummary, ...]:
    """Perplexity of a published model in each of its dialects, and how far it is from the float model it was made of.

    Args:
        directory: a job's output, or the model directory within it.
        data: `num_samples` is a limit; fewer are taken where there are no more.
        dialects: those to evaluate; every one that the directory holds where none is named.
        model: directory of the float model, None to leave it out.
        pipeline_parallel_size: stages; one per CPU of the machine, at most two, where None.
        memory_per_worker: bytes that a worker may use; None for its share of the machine, or of a card.
        address: of a Ray cluster to join; None starts one here.
        timeout: seconds without any progress after which the workers count as lost.
        engine: the one whose steps of a token are taken; compared with it are only dialects that it reads. None for
            those of compressed-tensors.
        progress: told of finished micro-batches, and where layers do not all fit at once.

    Raises:
        UserError: a directory or the data cannot be used, or not even one layer fits.
    """
    models = models_of(directory, dialects, model, engine, progress)
    reader = models.reader
    dataset = open_dataset(
        data,
        reader.architecture.vocab_size,
        reader.tokenizer_file,
        eos_token_id=reader.architecture.end_of_text_id,
        fewer_samples=True,
    )
    fingerprint = dataset.fingerprint()
    for note in dataset.notes:
        progress.message(note)
    with evaluation_of(
        models,
        data,
        dataset.num_micro_batches,
        pipeline_parallel_size=pipeline_parallel_size,
        memory_per_worker=memory_per_worker,
        address=address,
        timeout=timeout,
        compares=model is not None,
        progress=progress,
    ) as evaluation:
        group = evaluation_workers(evaluation, timeout)
        try:
            found = measure(group, evaluation, dataset.num_samples, dataset.num_micro_batches, timeout, progress)
        finally:
            group.close()
    return tuple(
        PerplexitySummary(
            format=name,
            perplexity=perplexity,
            float_perplexity=found.float_model,
            num_samples=found.num_samples,
            sequence_length=data.sequence_length,
            num_tokens=found.num_tokens,
            data=tuple(map(base_name, data.data)),
            data_fingerprint=fingerprint,
            comparison=found.comparisons.get(name),
            engine=engine,
        )
        for name, perplexity in found.published.items()
    )


@dataclass(frozen=True, kw_only=True)
class Models:
    """What is evaluated.

    Attributes:
        float_model: directory of the float model, None where it is left out.
        published: format to directory.
        reader: of one of them.
        sources: as of `Evaluation`.
        token_step: likewise.
    """

    float_model: str | None
    published: Mapping[str, Path]
    reader: CheckpointReader
    sources: Mapping[str, str]
    token_step: TokenStep


def models_of(
    directory: str, dialects: Sequence[str], model: str | None, engine: str | None, progress: Progress
) -> Models:
    """The models that a command names; arguments are those of `evaluate`.

    Raises:
        UserError: a directory cannot be used, or the float model is not what the published one was made of.
    """
    published, token_step = find_models(Path(directory), dialects), TokenStep.OVER_127_5
    if engine is not None:
        published, token_step = _read_by(engine, published, dialects), engine_named(engine).token_step
    reader = CheckpointReader(next(iter(published.values())), quantized=True)
    sources: Mapping[str, str] = {}
    if model is not None:
        source = CheckpointReader(Path(model))
        if [layer.tensors for layer in source.architecture.layers] != [
            layer.tensors for layer in reader.architecture.layers
        ]:
            raise CheckpointError(f"--model {model} has other layers than {directory}: give the model it was made of")
        sources = _sources(published, source, progress)
    return Models(float_model=model, published=published, reader=reader, sources=sources, token_step=token_step)


@contextmanager
def evaluation_of(
    models: Models,
    data: CalibrationData,
    num_micro_batches: int,
    *,
    pipeline_parallel_size: int | None,
    memory_per_worker: int | None,
    address: str | None,
    timeout: float,
    compares: bool,
    progress: Progress,
    requests: tuple[TokenBatch, ...] | None = None,
) -> Iterator[Evaluation]:
    """A cluster with what its workers are told, as it fits there; the cluster ends with the block.

    Raises:
        PlanError: not even one layer fits.
    """
    num_layers = models.reader.architecture.num_layers
    threads = ClusterFacts.of_this_machine().num_cpus
    num_stages = pipeline_parallel_size or min(2, threads, num_layers)
    edges = [stage * num_layers // num_stages for stage in range(num_stages + 1)]
    evaluation = Evaluation(
        model=models.float_model,
        published={name: str(path) for name, path in models.published.items()},
        data=data,
        stages=tuple((bounds,) for bounds in itertools.pairwise(edges)),
        max_in_flight=2 * num_stages,
        threads_per_worker=max(1, threads // num_stages),
        sources=models.sources,
        compares=compares,
        token_step=models.token_step,
        requests=requests,
    )
    num_cpus = num_stages * evaluation.threads_per_worker
    with cluster(address, num_cpus, patience=timeout, tell=progress.message) as facts:
        evaluation = _fitted(evaluation, models.reader, num_micro_batches, facts, memory_per_worker)
        count = evaluation.layers_at_a_time
        if count is not None:
            progress.message(f"up to {count} of a stage's layers are in memory at a time, since they do not all fit")
        yield evaluation


def _read_by(engine: str, published: Mapping[str, Path], asked: Sequence[str]) -> dict[str, Path]:
    """Those of the directories that an engine reads.

    Raises:
        UserError: there is none, or one that was asked for is not among them.
    """
    read = engine_named(engine).dialects
    others = [name for name in (asked or published) if name not in read]
    found = {name: path for name, path in published.items() if name in read}
    if not found or (asked and others):
        raise UserError(
            f"--as {engine}: it reads {' and '.join(read)}, and not {', '.join(others)}; leave --as out, or name "
            "another --format"
        )
    return found


def _sources(published: Mapping[str, Path], source: CheckpointReader, progress: Progress) -> Mapping[str, str]:
    """What the float model must be made of, as far as the published ones tell; workers compare it as they load it.

    Raises:
        CheckpointError: there is only a fingerprint, and it is another one.
    """
    sources: dict[str, str] = {}
    for name, directory in published.items():
        told = read_provenance(directory)
        if told is None or told.source is None:
            progress.message(
                f"nothing in {name} tells what model it was made of, so that of --model is taken for it unverified"
            )
            continue
        if not told.sources and told.source != source.fingerprint():
            raise CheckpointError(
                f"--model {source.directory} is not the model that {name} was made of (fingerprint "
                f"{source.fingerprint()[:12]}, and {told.source[:12]} in {PROVENANCE_FILE}): give that one, or leave "
                "--model out"
            )
        sources |= told.sources
    return sources


def _fitted(
    evaluation: Evaluation,
    reader: CheckpointReader,
    num_micro_batches: int,
    facts: ClusterFacts,
    memory_per_worker: int | None,
) -> Evaluation:
    """The same on the cluster's device and cores, with as many of a stage's layers at a time as fit."""
    device = DeviceKind.ASCEND if facts.num_npus else DeviceKind.CPU
    num_stages = len(evaluation.stages)
    threads = facts.threads_share(num_stages, npus=device.npus)
    share = host_share(facts, num_stages, threads=threads, npus=device.npus)
    limit = memory_per_worker or (share if device.on_host else ASCEND_MEMORY_PER_WORKER)
    in_flight = min(evaluation.max_in_flight, num_micro_batches)
    shape = evaluation_shape(reader.architecture, device, evaluation.data, max_in_flight=in_flight)
    stages = []
    for stage, ((first, end),) in enumerate(evaluation.stages):
        groups = choose_groups(
            shape,
            range(first, end),
            embeds=stage == 0,
            last=stage == num_stages - 1,
            num_micro_batches=num_micro_batches,
            limit=limit,
            host_limit=None if device.on_host else share,
            compares=evaluation.compares,
        )
        if not groups.fits:
            needed = groups.memory
            asked = f"{format_bytes(needed.peak)} and a worker has {format_bytes(limit)}"
            if needed.peak <= limit:
                asked = f"{format_bytes(needed.host_peak)} of host memory and a worker has {format_bytes(share)}"
            raise PlanError(
                f"with one layer in memory at a time stage {stage} of {num_stages} needs {asked}: raise "
                "--memory-per-worker, lower --num-samples or --sequence-length, or change --pipeline-parallel-size"
            )
        stages.append(groups.bounds)
    return dataclasses.replace(evaluation, device=device, stages=tuple(stages), threads_per_worker=threads)
