"""What a linear's weight may be stored as, what that takes on storage, and what it was found to cost.

`bits: auto` chooses for each linear among float, W8 and W4 so that all linears of the decoder layers fit
into `size_budget`; `sensitivity: true` only reports what W8 and W4 would cost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gs_dist.architecture import DecoderArchitecture
from gs_dist.errors import PlanError
from gs_dist.policy import QuantPolicy

__all__ = [
    "FLOAT",
    "W4",
    "W8",
    "LayerCosts",
    "SchemeCost",
    "budget_bytes",
    "contradictions",
    "least_bytes",
    "override_of",
    "schemes_of",
    "stored_bytes",
]

FLOAT, W8, W4 = "float", "W8", "W4"

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_GROUP_SIZES = (128, 64)  # of W4 where the recipe does not say, the first that divides


@dataclass(frozen=True, kw_only=True)
class SchemeCost:
    """What one scheme does to one linear.

    Attributes:
        name: full dotted name of the linear.
        group: names the linears that read one input; serving engines fuse them, so they share a scheme.
        scheme: key of the scheme, `FLOAT` for leaving the linear as it is.
        num_bytes: what the linear takes on storage, scales included.
        error: tr(D G DT), the squared output error over all tokens.
        relative_error: that as a share of the squared output.
    """

    name: str
    group: str
    scheme: str
    num_bytes: int
    error: float
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Costs of every scheme for each linear of a decoder layer, in the layer's order."""

    layer: int
    costs: tuple[SchemeCost, ...]


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


def stored_bytes(policy: QuantPolicy | None, shape: tuple[int, int], scale_dtype: str) -> int:
    """Bytes of a weight (out, in) with its scales and zero points; `None` is the weight in `scale_dtype`."""
    rows, columns = shape
    if policy is None or not policy.quantises_linear:
        return rows * columns * _DTYPE_BYTES[scale_dtype]
    groups = columns // policy.group_size if policy.group_size else 1
    zero_bits = 0 if policy.weight_symmetric else policy.weight_bits
    bits = rows * columns * policy.weight_bits + rows * groups * (zero_bits + 8 * _DTYPE_BYTES[scale_dtype])
    return -(-bits // 8)


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
        for linear in architecture.linears:
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


def contradictions(
    ptq: QuantPolicy, *, size_budget: float | None, pinned: Sequence[str], propagation: str, on_bad_layer: str
) -> list[str]:
    """What in a recipe `bits: auto` does not go together with; `pinned` are layer policies that are no null."""
    checks = (
        (
            size_budget is None,
            "bits is auto without size_budget: set it to a share of the linears' bytes such as 0.30, or to a size",
        ),
        (
            ptq.weight_quant_dtype is None,
            "bits is auto while ptq.weight_quant_dtype is null: set it to int8 or qint4x2",
        ),
        (
            ptq.act_quant_dtype is not None,
            "bits is auto, which chooses among weight-only schemes, while ptq.act_quant_dtype is int8: set it to null, "
            "or bits: fixed",
        ),
        (
            ptq.kvcache_quant_dtype is not None,
            "bits is auto while ptq.kvcache_quant_dtype is int8, which excludes W4: set it to null, or bits: fixed",
        ),
        (
            bool(pinned),
            f"bits is auto, which writes layer_policies itself, and the recipe has one for {', '.join(pinned[:1])}: "
            "set it to null to keep those linears in float, or remove it",
        ),
        (
            propagation != "original",
            "bits is auto, which judges all layers before any is solved, while propagation is quantized: set "
            "propagation: original",
        ),
        (
            on_bad_layer == "keep_float",
            "bits is auto while on_bad_layer is keep_float, which could exceed size_budget: set on_bad_layer: fail",
        ),
    )
    return [text for found, text in checks if found]
