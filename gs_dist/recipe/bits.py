"""What `bits: auto` does not go together with."""

from __future__ import annotations

from collections.abc import Sequence

from gs_dist.recipe.policy import QuantPolicy

__all__ = ["contradictions"]


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
            ptq.weight_quant_dtype not in ("int8", "qint4x2"),
            f"bits is auto while ptq.weight_quant_dtype is {ptq.weight_quant_dtype or 'null'}: set it to int8 or "
            "qint4x2",
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
