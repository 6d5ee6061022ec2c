"""Perplexity of the float model and of the published one, through the same stages."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gs_dist.calibration.dataset import open_dataset
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import find_model
from gs_dist.config import CalibrationData
from gs_dist.errors import CheckpointError
from gs_dist.progress import Progress
from gs_dist.runtime.coordinator import cluster
from gs_dist.runtime.evaluation_worker import Evaluation, EvaluationWorker
from gs_dist.runtime.pipeline import stream_results
from gs_dist.runtime.worker_group import RayWorkerGroup, WorkerGroup

__all__ = ["Perplexity", "evaluate", "measure"]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity over `num_tokens` predicted tokens of `num_samples` samples; `float_model` None if not asked for."""

    quantized: float
    float_model: float | None
    num_samples: int
    num_tokens: int


def evaluate(
    directory: str,
    data: CalibrationData,
    *,
    model: str | None = None,
    pipeline_parallel_size: int | None = None,
    address: str | None = None,
    timeout: float = 600.0,
    progress: Progress,
) -> Perplexity:
    """Perplexity of a published model, and of the float model it was made of.

    Args:
        directory: a job's output, or the model directory within it.
        data: `num_samples` is a limit; fewer are taken where there are no more.
        model: directory of the float model, None to leave it out.
        pipeline_parallel_size: stages; one per CPU of the machine, at most two, where None.
        address: of a Ray cluster to join; None starts one here.
        timeout: seconds without any progress after which the workers count as lost.
        progress: told of finished micro-batches.

    Raises:
        UserError: a directory or the data cannot be used.
    """
    model_directory, format_name = find_model(Path(directory))
    reader = CheckpointReader(model_directory, quantized=True)
    num_layers = reader.architecture.num_layers
    if model is not None:
        source = CheckpointReader(Path(model))
        if source.architecture.layer_tensors() != reader.architecture.layer_tensors():
            raise CheckpointError(f"--model {model} has other layers than {directory}: give the model it was made of")
    dataset = open_dataset(
        data,
        reader.architecture.vocab_size,
        reader.tokenizer_file,
        eos_token_id=reader.architecture.end_of_text_id,
        fewer_samples=True,
    )
    threads = len(os.sched_getaffinity(0))
    num_stages = pipeline_parallel_size or min(2, threads, num_layers)
    edges = [stage * num_layers // num_stages for stage in range(num_stages + 1)]
    evaluation = Evaluation(
        model=model,
        quantized=str(model_directory),
        format=format_name,
        data=data,
        stages=tuple(itertools.pairwise(edges)),
        threads_per_worker=max(1, threads // num_stages),
    )
    with cluster(address, num_stages * evaluation.threads_per_worker) as facts:
        group = RayWorkerGroup(
            partial(EvaluationWorker, evaluation),
            num_stages=num_stages,
            num_replicas=1,
            min_replicas=1,
            num_threads=evaluation.threads_per_worker,
            npus=1 if facts.num_npus else 0,
            timeout=timeout,
        )
        try:
            return measure(group, evaluation, dataset.num_samples, dataset.num_micro_batches, timeout, progress)
        finally:
            group.close()


def measure(
    group: WorkerGroup,
    evaluation: Evaluation,
    num_samples: int,
    num_micro_batches: int,
    timeout: float,
    progress: Progress,
) -> Perplexity:
    """Runs the float model, if any, then the published one, over all micro-batches."""
    perplexities: dict[str, float] = {}
    num_tokens = 0
    for which in ("float", "quantized") if evaluation.model is not None else ("quantized",):
        losses = stream_results(
            group,
            which,
            [range(num_micro_batches)],
            num_stages=len(evaluation.stages),
            max_in_flight=2 * len(evaluation.stages),
            timeout=timeout,
            progress=progress,
        )
        num_tokens = sum(tokens for _, tokens in losses)
        mean = sum(loss for loss, _ in losses) / max(num_tokens, 1)
        perplexities[which] = math.exp(min(mean, 700.0))  # past this a float64 overflows
    return Perplexity(
        quantized=perplexities["quantized"],
        float_model=perplexities.get("float"),
        num_samples=num_samples,
        num_tokens=num_tokens,
    )
