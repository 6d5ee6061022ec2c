"""Floating-point operations of a layer's solve, for comparing recipes and for saying how long solves will take.

What is counted are the products with second moments, which a wide layer's solve consists of, and what searches do
that no product does, at one operation for each number made: an elementwise operation takes longer than one of a
product, so a solve that is mostly a range search takes longer than its count says.
"""

from __future__ import annotations

from collections.abc import Mapping

from gs_dist.methods.activation_range import RATIOS
from gs_dist.methods.method import Work, error_operations
from gs_dist.model.decoder import LayerSpec
from gs_dist.model.statistics import HISTOGRAM_BINS, StatisticsSettings
from gs_dist.recipe.policy import QuantPolicy

__all__ = ["solver_operations"]

# A search of a static range: ranges shrunk at both ends in turn where they have a zero point, each judged by what lies
# between some 4000 magnitudes of either sign; and before, all channels' histograms brought onto one axis.
_ASYMMETRIC_ROUNDS, _MAGNITUDES, _PER_MAGNITUDE = 5, 2 * 4000, 10
# Numbers made for each count of a histogram: what it is worth, and what rounding costs the values there.
_PER_COUNT = 24


def solver_operations(
    layer: LayerSpec,
    policies: Mapping[str, QuantPolicy | None],
    settings: Mapping[str, StatisticsSettings],
    schemes: Mapping[str, Mapping[str, QuantPolicy]] | None = None,
) -> int:
    """Operations of one layer's solve: 0 for linears of whose input no second moments are taken.

    Args:
        layer: what it is made of.
        policies: by linear within the layer.
        settings: what is taken of each input.
        schemes: by linear within the layer, those that are judged before.
    """
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in layer.linears}
    total = 0
    for layer_input in layer.inputs:
        taken = settings[layer_input.name]
        if not (taken.gram or taken.weighted_gram or taken.blended_gram):
            continue
        searched: QuantPolicy | None = None
        for name in layer_input.linears:
            policy, (rows, channels) = policies.get(name), shapes[name]
            judged = (schemes or {}).get(name)
            if judged is not None:
                total += (1 + len(judged)) * error_operations(rows, channels, taken)
            if policy is None or not policy.quantizes_linear:
                continue
            searched = policy if policy.is_static else searched
            total += 2 * error_operations(rows, channels, taken)  # of the weight, and of its change
            work = Work(rows=rows, channels=channels, taken=taken, rescaled=policy.suppression.rescales)
            total += sum(method.operations(policy, work) for method in policy.methods)
        if searched is not None:
            # Linears of one input share its range; so does each scale that is tried.
            total += (1 + searched.suppression.range_searches(searched)) * _static_range(searched, layer_input.channels)
    return total


def _static_range(policy: QuantPolicy, channels: int) -> int:
    if policy.act_range != "mse":
        return 0
    rounds = 1 if policy.act_symmetric else _ASYMMETRIC_ROUNDS
    return len(RATIOS) * rounds * _MAGNITUDES * _PER_MAGNITUDE + channels * 2 * HISTOGRAM_BINS * _PER_COUNT
