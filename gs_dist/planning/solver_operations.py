"""Floating-point operations of a layer's solve, for comparing recipes and for saying how long solves will take.

What is counted are the products with Gram matrices, which a wide layer's solve consists of, and what searches do
that no product does, at one operation for each number made: an elementwise operation takes longer than one of a
product, so a solve that is mostly a range search takes longer than its count says.
"""

from __future__ import annotations

from collections.abc import Mapping

from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.statistics import HISTOGRAM_BINS, StatisticsSettings
from gs_dist.recipe.policy import OutliersSuppressionType, PrecisionRecovery, QuantPolicy

__all__ = ["solver_operations"]

# Rows of each weight that a search over SmoothQuant's exponents looks at.
_SEARCH_ROWS = 1024
# Numbers made for a weight that is rounded under some range: divided, rounded, clipped, multiplied, subtracted.
_ROUNDED = 8
# A search of a static range: some 190 ranges, shrunk at both ends in turn where they have a zero point, each judged by
# what lies between some 4000 magnitudes of either sign; and before, all channels' histograms brought onto one axis.
_RANGES, _ASYMMETRIC_ROUNDS, _MAGNITUDES, _PER_MAGNITUDE = 190, 5, 2 * 4000, 10
# Numbers made for each count of a histogram: what it is worth, and what rounding costs the values there.
_PER_COUNT = 24


def solver_operations(
    architecture: DecoderArchitecture,
    policies: Mapping[str, QuantPolicy | None],
    settings: Mapping[str, StatisticsSettings],
    schemes: Mapping[str, Mapping[str, QuantPolicy]] | None = None,
) -> int:
    """Operations of one layer's solve: 0 for linears of whose input no Gram matrix is taken.

    Args:
        architecture: of the model.
        policies: by linear within the layer.
        settings: what is taken of each input.
        schemes: by linear within the layer, those that are judged before.
    """
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in architecture.linears}
    total = 0
    for layer_input in architecture.inputs:
        taken = settings[layer_input.name]
        if not (taken.gram or taken.weighted_gram):
            continue
        searched: QuantPolicy | None = None
        for name in layer_input.linears:
            policy, (rows, channels) = policies.get(name), shapes[name]
            judged = (schemes or {}).get(name)
            if judged is not None:
                total += (1 + len(judged)) * _judged(rows, channels)
            if policy is None or not policy.quantises_linear:
                continue
            searched = policy if policy.is_static else searched
            total += 2 * _judged(rows, channels)  # of the weight, and of its change
            total += _suppression(policy, taken, rows, channels) + _rounding(policy, rows, channels)
        if searched is not None:
            # Linears of one input share its range; so does each exponent's trial.
            total += (1 + _exponent_trials(searched)) * _static_range(searched, layer_input.channels)
    return total


def _judged(rows: int, channels: int) -> int:
    """tr(D G DT): two operations an entry, of half of the symmetric matrix."""
    return rows * channels * channels


def _exponent_trials(policy: QuantPolicy) -> int:
    """SmoothQuant scales tried for an input; the shifts of Outlier Suppression Plus are tried with every fourth."""
    kind = policy.outliers_suppression
    if kind in (OutliersSuppressionType.NONE, OutliersSuppressionType.AWQ):
        return 0
    tried = policy.migration_strength if kind is OutliersSuppressionType.SMOOTH else policy.exponents
    if isinstance(tried, float):
        return 0 if kind is OutliersSuppressionType.SMOOTH else 1
    shifts = 2 if kind is OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS and policy.act_quant_dtype else 0
    return len(tried) + shifts * -(-len(tried) // 4)


def _suppression(policy: QuantPolicy, taken: StatisticsSettings, rows: int, channels: int) -> int:
    if policy.outliers_suppression is OutliersSuppressionType.AWQ:
        exponents = 1 if isinstance(policy.exponents, float) else len(policy.exponents)
        return (1 + exponents) * (_judged(rows, channels) + _ROUNDED * rows * channels)  # and plain rounding
    trials = _exponent_trials(policy)
    seen = -(-rows // max(1, -(-rows // _SEARCH_ROWS)))
    sides = 1 + int(taken.weighted_gram)
    energies = sides * _judged(seen, channels) if trials else 0
    return energies + trials * (sides * _judged(seen, channels) + _ROUNDED * seen * channels)


def _static_range(policy: QuantPolicy, channels: int) -> int:
    if policy.act_range != "mse":
        return 0
    rounds = 1 if policy.act_symmetric else _ASYMMETRIC_ROUNDS
    return _RANGES * rounds * _MAGNITUDES * _PER_MAGNITUDE + channels * 2 * HISTOGRAM_BINS * _PER_COUNT


def _rounding(policy: QuantPolicy, rows: int, channels: int) -> int:
    """Clipping, and GPTQ's factorisation and updates, once more where ranges are found before a second pass."""
    size = policy.group_size or channels
    ratios = len(policy.clip_ratios)
    by_gptq = policy.precision_recovery is PrecisionRecovery.GPTQ
    finds_on_the_way = by_gptq and policy.group_size > 0
    total = 0
    if policy.clips_weights and not finds_on_the_way:
        total += (1 + ratios) * rows * channels * (2 * size + _ROUNDED)  # the whole of each diagonal block
    if not by_gptq:
        return total
    one_pass = channels**3 // 3 + rows * channels * (channels + _ROUNDED)
    total += one_pass
    if finds_on_the_way and policy.clips_weights:
        total += (ratios - 1) * rows * channels * (size + _ROUNDED)  # each ratio rounds a group anew
        total += one_pass if policy.algo_args.desc_act and policy.algo_args.static_groups else 0
    return total
