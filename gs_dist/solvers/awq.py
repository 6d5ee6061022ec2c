"""AWQ: input channels that matter are enlarged before rounding and the activation is reduced to match.

Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration"
(2024), section 3.2; the formula is golden-stick's `AWQSmoother`, with `duo_scaling` from AutoAWQ. The
search needs no forward pass: with the second moments G of the shared input the output error of a candidate
is tr(D G DT), D = Q(W s) / s - W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gs_dist.methods.awq import TILE_ROWS
from gs_dist.model.statistics import InputStatistics
from gs_dist.numbers.groups import num_groups
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import Float32
from gs_dist.solvers.objective import Objective
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = ["AWQResult", "candidate_scale", "search_scale", "weight_importance"]


@dataclass(frozen=True, kw_only=True)
class AWQResult:
    """`scale` (in,) float32 > 0: weights are to be multiplied by it, the activation divided.

    `alpha` is the exponent that gave it, None where plain rounding was as good as every candidate of a
    search: then `scale` is 1. `losses` holds the loss of each exponent in the order searched,
    `loss_before` that of plain rounding, `loss` that of the scale returned.
    """

    scale: Float32
    alpha: float | None
    loss: float
    losses: tuple[float, ...]
    loss_before: float


def weight_importance(
    weights: Sequence[Float32], group_size: int, *, threads: Threads = ONE_THREAD
) -> npt.NDArray[np.float64]:
    """AWQ's w_mean (in,): mean over all output channels of |w| as a share of the largest in its group."""
    columns = weights[0].shape[1]
    groups = num_groups(columns, group_size)

    def shares(tile: tuple[Float32, int]) -> npt.NDArray[np.float64]:
        weight, start = tile
        magnitude = np.abs(weight[start : start + TILE_ROWS]).reshape(-1, groups, columns // groups)
        magnitude /= magnitude.max(axis=2, keepdims=True) + np.float32(1e-6)
        return np.asarray(magnitude.reshape(-1, columns).sum(axis=0, dtype=np.float64))

    total = np.zeros(columns)
    for part in threads.map(shares, _tiles(weights)):
        total += part
    return total / sum(len(weight) for weight in weights)


def _tiles(weights: Sequence[Float32]) -> list[tuple[Float32, int]]:
    """Each weight with the first row of each of its tiles."""
    return [(weight, start) for weight in weights for start in range(0, len(weight), TILE_ROWS)]


def candidate_scale(
    x_mean: npt.NDArray[np.float64], w_mean: npt.NDArray[np.float64], alpha: float, *, duo_scaling: bool
) -> Float32:
    """The scale for one exponent: x^alpha / (w^(1 - alpha) + 1e-4), or x^alpha, around a middle of 1."""
    scale = x_mean**alpha
    if duo_scaling:
        scale = scale / (w_mean ** (1.0 - alpha) + 1e-4)
    scale = np.maximum(scale, 1e-4)
    scale = scale / np.sqrt(scale.max() * scale.min())
    silent = (x_mean == 0) | (w_mean == 0) | ~np.isfinite(scale)
    return np.where(silent, 1.0, scale).astype(np.float32)


def search_scale(
    weights: Sequence[Float32],
    statistics: InputStatistics,
    policy: QuantPolicy,
    *,
    objective: Objective,
    scale_dtype: str,
    tie: npt.NDArray[np.intp] | None = None,
    threads: Threads = ONE_THREAD,
) -> AWQResult:
    """Finds the exponent whose scale leaves the least output error, over all linears that share the input.

    Args:
        weights: (out, in) float32 each.
        statistics: of the shared input; its mean magnitudes enter the formula.
        policy: number format, group_size, weight_symmetric; `algo_args.smooth_alpha` is a tuple to search (the
            first of equals wins) or a float to use as it is; `algo_args.duo_scaling`.
        objective: of the input, not rescaled.
        scale_dtype: dtype the weights' quantisation scales will be stored in.
        tie: (in,) index; channels with the same index get the same scale. For the attention output
            under grouped-query attention: the value channel that each channel is made of. The larger
            x_mean and the mean w_mean count.
        threads: take a tile of rows under one candidate at a time.

    Raises:
        UserError: the input channels do not divide into groups.
    """
    args = policy.algo_args
    x_mean, w_mean = statistics.mean_abs, weight_importance(weights, policy.group_size, threads=threads)
    if tie is not None:
        x_mean, w_mean = _tied(x_mean, w_mean, tie)
    alphas = (policy.exponents,) if isinstance(policy.exponents, float) else policy.exponents
    scales = [candidate_scale(x_mean, w_mean, alpha, duo_scaling=args.duo_scaling) for alpha in alphas]
    candidates = [np.ones_like(scales[0]), *scales]
    before, *losses = _losses(weights, candidates, policy, objective, scale_dtype, threads)
    best = min(range(len(losses)), key=losses.__getitem__)
    searched = not isinstance(policy.exponents, float)
    if searched and not losses[best] < before:
        return AWQResult(scale=candidates[0], alpha=None, loss=before, losses=tuple(losses), loss_before=before)
    return AWQResult(
        scale=scales[best], alpha=alphas[best], loss=losses[best], losses=tuple(losses), loss_before=before
    )


def _tied(
    x_mean: npt.NDArray[np.float64], w_mean: npt.NDArray[np.float64], tie: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    count = np.bincount(tie)
    largest = np.zeros(len(count))
    np.maximum.at(largest, tie, x_mean)
    mean = np.bincount(tie, weights=w_mean) / np.maximum(count, 1)
    return largest[tie], mean[tie]


def _losses(
    weights: Sequence[Float32],
    scales: Sequence[Float32],
    policy: QuantPolicy,
    objective: Objective,
    scale_dtype: str,
    threads: Threads,
) -> list[float]:
    def loss(part: tuple[Float32, int, Float32]) -> float:
        weight, start, scale = part
        rows = np.ascontiguousarray(weight[start : start + TILE_ROWS], dtype=np.float32)
        delta = _rounding_change(rows, scale, policy, scale_dtype)
        return float(objective.row_errors(delta).sum())

    found = threads.map(loss, [(*tile, scale) for tile in _tiles(weights) for scale in scales])
    losses = [0.0] * len(scales)
    for index, part in enumerate(found):
        losses[index % len(scales)] += part
    return losses


def _rounding_change(rows: Float32, scale: Float32, policy: QuantPolicy, scale_dtype: str) -> Float32:
    """Q(W s) / s - W for some rows of W."""
    count, columns = rows.shape
    groups = num_groups(columns, policy.group_size)
    scaled = (rows * scale).reshape(count, groups, columns // groups)
    form = policy.weight_format
    step, zero = form.range_parameters(
        scaled.min(axis=2), scaled.max(axis=2), symmetric=policy.weight_symmetric, scale_dtype=scale_dtype
    )
    scaled /= step[:, :, None]
    if zero is not None:
        offset = zero.astype(np.float32)[:, :, None]
        scaled += offset
        form.snap(scaled)
        scaled -= offset
    else:
        form.snap(scaled)
    scaled *= step[:, :, None]
    change = scaled.reshape(count, columns)
    change /= scale
    change -= rows
    return np.asarray(change)
