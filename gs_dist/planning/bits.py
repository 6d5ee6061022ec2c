"""`bits: auto`: the schemes each linear may be stored as, and what all of them may take together.

A linear is left in float, or becomes W8 or W4, so that all linears of the decoder layers fit into `size_budget`;
`sensitivity: true` only reports what W8 and W4 would cost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from gs_dist.errors import PlanError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.recipe.sizes import stored_bytes
from gs_dist.results.costs import W4, W8

__all__ = ["budget_bytes", "least_bytes", "override_of", "schemes_of"]

_GROUP_SIZES = (128, 64)  # of W4 where the recipe does not say, the first that divides


def schemes_of(ptq: QuantPolicy, in_features: int) -> dict[str, QuantPolicy]:
    """W8 and W4 of a linear: bits, groups and symmetry alone, since only these decide what rounding costs.

    W4 is grouped as `ptq` says if that is int4, else by 128, or 64 where 128 does not divide the input channels.
    """
    asked = (ptq.group_size,) if ptq.weight_quant_dtype == "qint4x2" else _GROUP_SIZES
    if ptq.weight_quant_dtype == "qint4x2" and ptq.group_size and in_features % ptq.group_size:
        asked = _GROUP_SIZES
    size = next((s for s in asked if s and in_features % s == 0), 0)
    return {
        W8: QuantPolicy(weight_quant_dtype="int8", weight_symmetric=ptq.weight_symmetric),
        W4: QuantPolicy(
            weight_quant_dtype="qint4x2",
            weight_quant_granularity="per_group" if size else "per_channel",
            group_size=size,
            weight_symmetric=ptq.weight_symmetric,
        ),
    }


def override_of(scheme: QuantPolicy | None) -> dict[str, Any] | None:
    """A scheme as an entry of `layer_policies`, to be laid over the recipe's `ptq`; None for float."""
    if scheme is None:
        return None
    return {
        "weight_quant_dtype": scheme.weight_quant_dtype,
        "weight_quant_granularity": scheme.weight_quant_granularity,
        "group_size": scheme.group_size,
    }


def least_bytes(
    architecture: DecoderArchitecture, schemes: Mapping[str, Mapping[str, QuantPolicy]], fixed: Collection[str] = ()
) -> int:
    """Bytes of all linears of the decoder layers, each as its smallest scheme.

    Args:
        architecture: of the model.
        schemes: by name within the layer; without entries, what all linears take in float.
        fixed: full names of linears that stay in float.
    """
    total = 0
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        for linear in architecture.linears(layer):
            choices = {} if prefix + linear.name in fixed else schemes.get(linear.name, {})
            shape = (linear.out_features, linear.in_features)
            total += min(stored_bytes(policy, shape, architecture.dtype) for policy in (None, *choices.values()))
    return total


def budget_bytes(
    size_budget: float,
    architecture: DecoderArchitecture,
    schemes: Mapping[str, Mapping[str, QuantPolicy]],
    fixed: Collection[str],
) -> int:
    """The recipe's `size_budget` in bytes; a share is one of what all linears of the decoder layers take in float.

    Raises:
        PlanError: less than the smallest choice takes, or enough for leaving every linear as it is.
    """
    full, least = least_bytes(architecture, {}), least_bytes(architecture, schemes, fixed)
    is_share = isinstance(size_budget, float)
    budget = int(size_budget * full) if is_share else int(size_budget)
    if budget < least:
        share = math.ceil(1e4 * least / full) / 1e4
        asked = f"{size_budget} ({budget} bytes)" if is_share else f"{budget} bytes"
        raise PlanError(
            f"size_budget is {asked}, and the linears take {least} bytes with the fewest bits everywhere: set it to "
            f"{share if is_share else least} or more, or keep fewer linears in float"
        )
    if budget >= full:
        raise PlanError(
            f"size_budget is {budget} bytes, and all linears take {full} bytes as they are: set it to a share of that, "
            "such as 0.30"
        )
    return budget
