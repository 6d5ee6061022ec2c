"""Perplexity through the stages of a model, and how far it is from the float model: micro-batches in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gs_dist.errors import DatasetError
from gs_dist.progress import Progress
from gs_dist.results.summary import FloatComparison
from gs_dist.runtime.batch_losses import BatchLosses
from gs_dist.runtime.evaluated_model import EvaluatedModel
from gs_dist.runtime.evaluation_worker import FLOAT, Evaluation, EvaluationWorker
from gs_dist.runtime.workers import WorkerGroup

__all__ = ["Measured", "ModelLosses", "compared", "losses_of", "measure", "perplexity_of"]


@dataclass(frozen=True, kw_only=True)
class ModelLosses:
    """Of one model over all samples."""

    perplexity: float
    batches: Sequence[BatchLosses]

    @property
    def num_tokens(self) -> int:
        """Predicted tokens."""
        return sum(sum(batch.tokens) for batch in self.batches)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found of models over `num_tokens` predicted tokens of `num_samples` samples.

    `published` holds the perplexity of each format, `comparisons` how far each is from the float model; `float_model`
    is that one's perplexity, None where it was not asked for. `comparisons` is empty where nothing is compared.
    """

    published: Mapping[str, float]
    float_model: float | None
    comparisons: Mapping[str, FloatComparison]
    num_samples: int
    num_tokens: int


def measure(
    group: WorkerGroup[EvaluationWorker],
    evaluation: Evaluation,
    num_samples: int,
    num_micro_batches: int,
    timeout: float,
    progress: Progress,
) -> Measured:
    """Runs the float model, if any, then each published one, over all micro-batches."""

    def taken(which: str) -> ModelLosses:
        model = EvaluatedModel(which=which, evaluation=evaluation, group=group, timeout=timeout)
        return losses_of(model, num_micro_batches, progress)

    float_model = None if evaluation.model is None else taken(FLOAT)
    found = {name: taken(name) for name in evaluation.published}
    return Measured(
        published={name: model.perplexity for name, model in found.items()},
        float_model=None if float_model is None else float_model.perplexity,
        comparisons={name: compared(model, float_model) for name, model in found.items()}
        if float_model is not None and evaluation.compares
        else {},
        num_samples=num_samples,
        num_tokens=next(model.num_tokens for model in found.values()),  # the same samples for all
    )


def losses_of(model: EvaluatedModel, num_micro_batches: int, progress: Progress) -> ModelLosses:
    """Losses and perplexity of one model.

    Args:
        model: on its workers.
        num_micro_batches: of the data.
        progress: told of finished micro-batches.

    Raises:
        WorkerLostError: a worker died, or nothing happened for the model's `timeout`.
        DatasetError: the samples hold no token that is predicted from another.
    """
    batches = model.losses(num_micro_batches, progress)
    num_tokens = sum(sum(batch.tokens) for batch in batches)
    if not num_tokens:
        raise DatasetError(
            f"{model.name} predicts nothing on these samples, so there is no perplexity: no sample has a second token. "
            "Give longer samples, or raise the sequence length"
        )
    mean = sum(float(np.sum(batch.losses)) for batch in batches) / num_tokens
    return ModelLosses(perplexity=math.exp(min(mean, 700.0)), batches=batches)  # past this a float64 overflows


def perplexity_of(model: EvaluatedModel, num_micro_batches: int, progress: Progress) -> tuple[float, int]:
    """Perplexity of one model, and the number of predicted tokens; see `losses_of`."""
    found = losses_of(model, num_micro_batches, progress)
    return found.perplexity, found.num_tokens


def compared(published: ModelLosses, float_model: ModelLosses) -> FloatComparison:
    """How far a published model is from the float one, over the same samples in the same order.

    The standard error is that of a ratio of sums over samples (Cochran, Sampling Techniques, 1977, section 2.11),
    since tokens of one sample depend on each other; samples without a predicted token say nothing.
    """
    ours, theirs = (
        np.array([loss for batch in model.batches for loss in batch.losses]) for model in (published, float_model)
    )
    tokens = np.array([count for batch in published.batches for count in batch.tokens])
    increases, tokens = (ours - theirs)[tokens > 0], tokens[tokens > 0]
    mean = float(increases.sum() / tokens.sum())
    error = None
    if tokens.size > 1:
        spread = ((increases - mean * tokens) ** 2).sum() * tokens.size / (tokens.size - 1)
        error = float(np.sqrt(spread) / tokens.sum())
    divergences = [batch.divergences for batch in published.batches if batch.divergences is not None]
    kl = np.concatenate([found.kl for found in divergences]).astype(np.float64)
    return FloatComparison(
        loss_increase=mean,
        standard_error=error,
        mean_kl=float(kl.mean()),
        kl_99th_percentile=float(np.percentile(kl, 99)),
        equal_top1=float(np.concatenate([found.equal for found in divergences]).mean()),
    )
