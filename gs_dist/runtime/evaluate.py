"""Perplexity of the float model and of the published one, through the same stages."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

from gs_dist.calibration.dataset import open_dataset
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import find_model
from gs_dist.config import CalibrationData
from gs_dist.errors import CheckpointError
from gs_dist.progress import Progress
from gs_dist.runtime.coordinator import cluster, evaluation_workers
from gs_dist.runtime.evaluation_worker import Evaluation
from gs_dist.runtime.perplexity import Perplexity, measure

__all__ = ["Perplexity", "evaluate"]


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
        published={format_name: str(model_directory)},
        data=data,
        stages=tuple((bounds,) for bounds in itertools.pairwise(edges)),
        max_in_flight=2 * num_stages,
        threads_per_worker=max(1, threads // num_stages),
    )
    with cluster(address, num_stages * evaluation.threads_per_worker) as facts:
        if facts.num_npus:
            evaluation = dataclasses.replace(evaluation, device="ascend")
        group = evaluation_workers(evaluation, timeout)
        try:
            return measure(group, evaluation, dataset.num_samples, dataset.num_micro_batches, timeout, progress)
        finally:
            group.close()
