"""Outlier Suppression Lite and Plus: SmoothQuant's exponent chosen by the output error it leaves.

Golden-stick tries each exponent with a forward pass of the decoder layer. Here the error of the linears
that share the input is computed from statistics: tr(D G DT) for the rounded weights, and the expected
rounding of the activation times the weights' energy. Plus (Wei et al. 2023) shifts each channel to the
middle of its range first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.model.statistics import InputStatistics
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.integers import row_blocks
from gs_dist.results.quantized import Float32
from gs_dist.solvers import activation_range, affine, output_error
from gs_dist.solvers.activation_range import ActivationRange
from gs_dist.solvers.bias_correction import ChannelMeans
from gs_dist.solvers.objective import told_by
from gs_dist.solvers.rescaling import Rescaling
from gs_dist.solvers.smoothquant import smoothing_scale
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = ["ExponentResult", "search_exponent"]


@dataclass(frozen=True, kw_only=True)
class ExponentResult:
    """`scale` (in,) of the best exponent `alpha`, its `loss`, and the loss of every exponent tried."""

    scale: Float32
    alpha: float
    loss: float
    losses: tuple[float, ...]


def search_exponent(
    weights: Sequence[Float32],
    weight_max: npt.NDArray[Any],
    statistics: InputStatistics,
    policy: QuantPolicy,
    *,
    alphas: Sequence[float],
    scale_dtype: str,
    shift: Float32 | None = None,
    means: ChannelMeans | None = None,
    tie: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = np.asarray,
    threads: Threads = ONE_THREAD,
) -> ExponentResult:
    """Tries SmoothQuant scales for each exponent; the first of equally good ones wins.

    Args:
        weights: (rows, in) float32 of each linear that reads the input: all rows, or an even share.
        weight_max: (in,) largest magnitude of each column over all linears, tied.
        statistics: of the input with its second moments, not rescaled.
        policy: of the linears.
        alphas: exponents to try.
        scale_dtype: dtype the weights' scales will be stored in.
        shift: (in,) subtracted from the input before scaling.
        means: of the input, where the linears' biases take up the shift and the mean error.
        tie: makes channels that must share a scale equal (grouped-query attention).
        threads: take an exponent at a time, and where there are fewer of them, rows.
    """
    activation_max = tie(Rescaling(shift=shift).ranges_of(statistics).max_abs)
    scales = [smoothing_scale(activation_max, weight_max, alpha) for alpha in alphas]
    # A few massive tokens own the plain moments, the others the weighted one: both must be served.
    sides = [False, True] if statistics.weighted_squares is not None else [False]
    energies = {
        by_token: sum(
            Rescaling().weight_error(weight, statistics, by_token=by_token, threads=threads) for weight in weights
        )
        for by_token in sides
    }
    losses = threads.map(
        lambda scale: _loss(
            weights,
            Rescaling(scale=scale, shift=shift, means=means),
            statistics,
            policy,
            scale_dtype,
            energies,
            threads,
        ),
        scales,
    )
    best = min(range(len(losses)), key=losses.__getitem__)
    return ExponentResult(scale=scales[best], alpha=alphas[best], loss=losses[best], losses=tuple(losses))


def _loss(
    weights: Sequence[Float32],
    rescaling: Rescaling,
    statistics: InputStatistics,
    policy: QuantPolicy,
    scale_dtype: str,
    energies: Mapping[bool, float],
    threads: Threads,
) -> float:
    """Sum of relative output errors, with tokens counted alike and, where in `energies`, by 1 / x.x."""
    objectives = {by_token: told_by(statistics, by_token=by_token) for by_token in energies}
    inverse = rescaling.inverse

    def of_rows(part: tuple[Float32, slice]) -> tuple[npt.NDArray[np.float64], dict[bool, tuple[float, float]]]:
        weight, rows = part
        scaled = weight[rows] if rescaling.scale is None else weight[rows] * rescaling.scale
        codes, step, zero_point = affine.quantize_weight(
            scaled,
            form=policy.weight_format,
            group_size=policy.group_size,
            symmetric=policy.weight_symmetric,
            scale_dtype=scale_dtype,
        )
        change = affine.dequantize(codes, step, zero_point)
        columns = output_error.column_energy(change)
        change -= scaled
        taken = {by_token: rescaling.taken_out(change, by_token=by_token) for by_token in energies}
        if inverse is not None:
            change *= inverse
        return columns, {
            by_token: (objective.error(change), taken[by_token]) for by_token, objective in objectives.items()
        }

    errors = dict.fromkeys(energies, 0.0)
    columns = np.zeros(statistics.channels)
    for weight in weights:
        parts = threads.map(of_rows, [(weight, rows) for rows in row_blocks(*weight.shape)])
        for part_columns, _ in parts:
            columns += part_columns
        for by_token in energies:
            error, taken = (sum(found[by_token][which] for _, found in parts) for which in (0, 1))
            errors[by_token] += rescaling.left_of(max(error, 0.0), taken)
    static = _static_range(columns, rescaling, statistics, policy, scale_dtype) if policy.is_static else None
    for by_token in energies:
        rounding = rescaling.rounding(policy, statistics, static, by_token=by_token)
        if rounding is not None:
            errors[by_token] += output_error.activation_term(columns, rounding)
    return sum(errors[by_token] / max(energy, 1e-30) for by_token, energy in energies.items())


def _static_range(
    columns: npt.NDArray[np.float64],
    rescaling: Rescaling,
    statistics: InputStatistics,
    policy: QuantPolicy,
    scale_dtype: str,
) -> ActivationRange:
    if policy.act_range == "mse" and statistics.histogram is not None:
        profile = activation_range.range_profile(
            statistics, rescaling.scale, columns, weighting="both", shift=rescaling.shift
        )
        return activation_range.least_error_range(profile, symmetric=policy.act_symmetric, scale_dtype=scale_dtype)
    seen = rescaling.ranges_of(statistics)
    return activation_range.minmax_range(seen, symmetric=policy.act_symmetric, scale_dtype=scale_dtype)
