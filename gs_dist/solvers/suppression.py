"""Outlier suppression for the linears that share an input, by whichever algorithm their policy names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gs_dist.architecture import LayerInput
from gs_dist.errors import UserError
from gs_dist.policy import AlgoArgs, OutliersSuppressionType, QuantPolicy
from gs_dist.quantized import Float32
from gs_dist.solvers import activation_range, awq, outlier_suppression, output_error
from gs_dist.solvers.activation_range import ActivationRange
from gs_dist.solvers.folding import FoldedTensors, source_index, tie_max
from gs_dist.solvers.rescaling import Rescaling, objective_of
from gs_dist.solvers.smoothquant import smoothing_scale
from gs_dist.statistics import InputStatistics

__all__ = ["input_ranges", "suppress"]

# Rows of each weight that a search over SmoothQuant exponents looks at. Rounding errors of 8-bit rows
# are alike, and all rows of a 28672-wide layer would take hours.
_SEARCH_ROWS = 1024


def suppress(
    layer_input: LayerInput,
    policies: Mapping[str, QuantPolicy | None],
    statistics: InputStatistics | None,
    folded: FoldedTensors,
    scale_dtype: str,
) -> Rescaling:
    """Finds an input's rescaling and folds it into `folded`.

    Args:
        layer_input: the input and the linears that read it.
        policies: of every reader; None for one that stays as it is.
        statistics: of the input as calibrated.
        folded: the layer's tensors; changed.
        scale_dtype: dtype the weights' scales will be stored in.

    Raises:
        UserError: the readers' policies differ, or a Gram matrix is lacking.
    """
    policy = _common_policy(layer_input, policies)
    if policy is None or statistics is None:
        return Rescaling()
    kind = policy.outliers_suppression
    alpha = policy.migration_strength
    if kind is OutliersSuppressionType.SMOOTH and isinstance(alpha, float):
        scale = smoothing_scale(
            tie_max(statistics.max_abs, layer_input),
            tie_max(folded.column_max(layer_input.linears), layer_input),
            alpha,
        )
        return _fold(layer_input, folded, scale)
    if kind is OutliersSuppressionType.AWQ:
        found = awq.search_scale(
            [folded.weight(name) for name in layer_input.linears],
            statistics,
            policy,
            gram=objective_of(statistics),
            scale_dtype=scale_dtype,
            tie=None if layer_input.repeat == 1 else source_index(layer_input),
        )
        if found.alpha is None:
            return Rescaling(notes=("AWQ: no scale of the search was better than plain rounding",))
        return _fold(layer_input, folded, found.scale)
    return _search(layer_input, policy, statistics, folded, scale_dtype)


def _common_policy(layer_input: LayerInput, policies: Mapping[str, QuantPolicy | None]) -> QuantPolicy | None:
    """The one policy of an input's readers if it suppresses outliers, else None."""
    asked = [p for p in policies.values() if p and p.outliers_suppression is not OutliersSuppressionType.NONE]
    if not asked:
        return None
    cache = {"kvcache_quant_dtype": None, "kvcache_quant_granularity": "per_channel"}
    if len({None if p is None else p.model_copy(update=cache) for p in policies.values()}) > 1:
        listed = ", ".join(layer_input.linears)
        raise UserError(
            f"{listed} share the input {layer_input.name}, which {asked[0].outliers_suppression.value} rescales for "
            "all of them, and their policies differ: give them the same policy in layer_policies and "
            "opname_blacklist, or set outliers_suppression: none for all of them"
        )
    return asked[0]


def _fold(layer_input: LayerInput, folded: FoldedTensors, scale: Float32, **rest: Any) -> Rescaling:
    return Rescaling(scale=folded.fold(layer_input, scale), explicit=layer_input.source is None, **rest)


def _search(
    layer_input: LayerInput,
    policy: QuantPolicy,
    statistics: InputStatistics,
    folded: FoldedTensors,
    scale_dtype: str,
) -> Rescaling:
    """SmoothQuant's exponent by search: Outlier Suppression Lite; Plus after a shift where one fits."""
    if statistics.gram is None:
        raise UserError("outlier suppression searches by Gram matrices: set gram: on")
    shift: Float32 | None = None
    notes: tuple[str, ...] = ()
    smooth = policy.outliers_suppression is OutliersSuppressionType.SMOOTH
    alphas = policy.migration_strength if smooth else policy.algo_args.smooth_alpha
    if policy.outliers_suppression is OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS:
        if alphas == AlgoArgs().smooth_alpha:
            alphas = outlier_suppression.PLUS_ALPHAS
        if policy.act_quant_dtype is not None:
            shift, notes = _shift(layer_input, statistics, folded)
    weights = []
    for name in layer_input.linears:
        rows = folded.shape(name)[0]
        weights.append(folded.weight(name, slice(None, None, max(1, -(-rows // _SEARCH_ROWS)))))
    found = outlier_suppression.search_exponent(
        weights,
        tie_max(folded.column_max(layer_input.linears), layer_input),
        statistics,
        policy,
        alphas=(alphas,) if isinstance(alphas, float) else alphas,
        scale_dtype=scale_dtype,
        shift=shift,
        tie=lambda values: tie_max(values, layer_input),
    )
    if shift is not None:
        folded.shift(layer_input, shift)
    return _fold(layer_input, folded, found.scale, shift=shift, notes=notes)


def _shift(
    layer_input: LayerInput, statistics: InputStatistics, folded: FoldedTensors
) -> tuple[Float32 | None, tuple[str, ...]]:
    """Middle of each channel's range if something can absorb it, else None and a note that says why not."""
    source = layer_input.source
    middle = 0.5 * (statistics.maximum + statistics.minimum)
    if source is None:
        return middle, ()
    lacking = [name for name in (source, *layer_input.linears) if not folded.has_bias(name)]
    if lacking:
        return None, (f"outlier-suppression+ without shift: {lacking[0]} has no bias to absorb it",)
    if not folded.passes_shift(layer_input):
        return None, (f"outlier-suppression+ without shift: {source} is not all that makes {layer_input.name}",)
    if layer_input.repeat > 1:
        high = tie_max(statistics.maximum, layer_input)
        low = -tie_max(-statistics.minimum, layer_input)
        middle = 0.5 * (high + low)
    return middle.astype(np.float32), ()


def input_ranges(
    policies: Mapping[str, QuantPolicy],
    statistics: InputStatistics,
    rescaling: Rescaling,
    folded: FoldedTensors,
    scale_dtype: str,
) -> dict[str, ActivationRange]:
    """Static range of an input for each reader that takes one; readers of like settings share it.

    A shared range lets serving engines fuse the readers into one matrix multiplication.

    Raises:
        UserError: a range of least error is asked for and no histogram was taken.
    """
    ranges: dict[str, ActivationRange] = {}
    settings: dict[tuple[str, bool], list[str]] = {}
    for name, policy in policies.items():
        if policy.is_static:
            settings.setdefault((policy.act_range, policy.act_symmetric), []).append(name)
    for (kind, symmetric), names in settings.items():
        if kind == "minmax" or rescaling.shift is not None:
            seen = rescaling.ranges_of(statistics)
            found = activation_range.minmax_range(seen, symmetric=symmetric, scale_dtype=scale_dtype)
        else:
            columns = sum(output_error.column_energy(folded.weight(name)) for name in names)
            profile = activation_range.range_profile(statistics, rescaling.scale, np.asarray(columns), weighting="both")
            found = activation_range.least_error_range(profile, symmetric=symmetric, scale_dtype=scale_dtype)
        ranges.update(dict.fromkeys(names, found))
    return ranges
