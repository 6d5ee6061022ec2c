"""How a linear is spelt in a summary."""

from __future__ import annotations

from gs_dist.recipe.policy import QuantPolicy

__all__ = ["strategy"]


def strategy(policy: QuantPolicy | None) -> str:
    """The policy's label, `NA` for a linear that stays."""
    return "NA" if policy is None else policy.label
