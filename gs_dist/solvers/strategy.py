"""How a policy is spelt in a summary, as golden-stick's reference page spells it."""

from __future__ import annotations

from gs_dist.recipe.policy import QuantPolicy

__all__ = ["strategy"]


def strategy(policy: QuantPolicy | None) -> str:
    """`SmoothQuant-W8-perchannel-A8-pertensor`, `AWQ-wclip-W4-pergroup`, `NA` for a linear that stays."""
    if policy is None or not policy.quantises_linear:
        return "NA"
    parts = [method.label for method in policy.methods if method.label]
    parts.append(f"{policy.weight_format.label}-{policy.weight_quant_granularity.replace('_', '')}")
    if policy.act_quant_dtype is not None:
        parts.append(f"A8-{policy.act_quant_granularity.replace('_', '')}")
    return "-".join(parts)
