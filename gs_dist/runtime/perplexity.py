"""Perplexity through the stages of a model: micro-batches in, one number a model out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gs_dist.progress import Progress
from gs_dist.runtime.evaluation_worker import FLOAT, Evaluation
from gs_dist.runtime.pipeline import stream_results
from gs_dist.runtime.worker_group import WorkerGroup

__all__ = ["Perplexity", "measure", "perplexity_of"]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity over `num_tokens` predicted tokens of `num_samples` samples; `float_model` None if not asked for."""

    quantized: float
    float_model: float | None
    num_samples: int
    num_tokens: int


def measure(
    group: WorkerGroup,
    evaluation: Evaluation,
    num_samples: int,
    num_micro_batches: int,
    timeout: float,
    progress: Progress,
) -> Perplexity:
    """Runs the float model, if any, then the one published model, over all micro-batches."""
    float_model = None
    if evaluation.model is not None:
        float_model, _ = perplexity_of(FLOAT, group, evaluation, num_micro_batches, timeout, progress)
    (name,) = evaluation.published
    quantized, num_tokens = perplexity_of(name, group, evaluation, num_micro_batches, timeout, progress)
    return Perplexity(quantized=quantized, float_model=float_model, num_samples=num_samples, num_tokens=num_tokens)


def perplexity_of(
    which: str,
    group: WorkerGroup,
    evaluation: Evaluation,
    num_micro_batches: int,
    timeout: float,
    progress: Progress,
) -> tuple[float, int]:
    """Perplexity of one model, which stays loaded, and the number of predicted tokens.

    Args:
        which: `FLOAT`, or a format's name.
        group: workers of the evaluation.
        evaluation: what they were told.
        num_micro_batches: of the data.
        timeout: seconds without any progress after which the workers count as lost.
        progress: told of finished micro-batches.

    Raises:
        WorkerLostError: a worker died, or nothing happened for `timeout` seconds.
    """
    losses = stream_results(
        group,
        which,
        [range(num_micro_batches)],
        num_stages=len(evaluation.stages),
        max_in_flight=evaluation.max_in_flight,
        timeout=timeout,
        progress=progress,
    )
    num_tokens = sum(tokens for _, tokens in losses)
    mean = sum(loss for loss, _ in losses) / max(num_tokens, 1)
    return math.exp(min(mean, 700.0)), num_tokens  # past this a float64 overflows
