"""Perplexity through the stages of a model: micro-batches in, one number a model out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gs_dist.errors import DatasetError
from gs_dist.progress import Progress
from gs_dist.runtime.evaluated_model import EvaluatedModel
from gs_dist.runtime.evaluation_worker import FLOAT, Evaluation, EvaluationWorker
from gs_dist.runtime.workers import WorkerGroup

__all__ = ["Perplexity", "measure", "perplexity_of"]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity over `num_tokens` predicted tokens of `num_samples` samples.

    `published` holds that of each format; `float_model` is None where it was not asked for.
    """

    published: Mapping[str, float]
    float_model: float | None
    num_samples: int
    num_tokens: int


def measure(
    group: WorkerGroup[EvaluationWorker],
    evaluation: Evaluation,
    num_samples: int,
    num_micro_batches: int,
    timeout: float,
    progress: Progress,
) -> Perplexity:
    """Runs the float model, if any, then each published one, over all micro-batches."""

    def taken(which: str) -> tuple[float, int]:
        model = EvaluatedModel(which=which, evaluation=evaluation, group=group, timeout=timeout)
        return perplexity_of(model, num_micro_batches, progress)

    float_model = None if evaluation.model is None else taken(FLOAT)[0]
    found = {name: taken(name) for name in evaluation.published}
    return Perplexity(
        published={name: perplexity for name, (perplexity, _) in found.items()},
        float_model=float_model,
        num_samples=num_samples,
        num_tokens=next(num_tokens for _, num_tokens in found.values()),  # the same samples for all
    )


def perplexity_of(model: EvaluatedModel, num_micro_batches: int, progress: Progress) -> tuple[float, int]:
    """Perplexity of one model, and the number of predicted tokens.

    Args:
        model: on its workers.
        num_micro_batches: of the data.
        progress: told of finished micro-batches.

    Raises:
        WorkerLostError: a worker died, or nothing happened for the model's `timeout`.
        DatasetError: the samples hold no token that is predicted from another.
    """
    losses = model.losses(num_micro_batches, progress)
    num_tokens = sum(tokens for _, tokens in losses)
    if not num_tokens:
        raise DatasetError(
            f"{model.name} predicts nothing on these samples, so there is no perplexity: no sample has a second token. "
            "Give longer samples, or raise the sequence length"
        )
    mean = sum(loss for loss, _ in losses) / num_tokens
    return math.exp(min(mean, 700.0)), num_tokens  # past this a float64 overflows
