"""Rounding to nearest: each weight by itself."""

from __future__ import annotations

from collections.abc import Iterable

from gs_dist.methods.contradiction import Contradiction
from gs_dist.methods.method import Arguments, Policy, RoundingMethod

__all__ = ["RoundToNearest"]


class RoundToNearest(RoundingMethod[Arguments]):
    """Needs nothing and adds nothing to what every linear's solve takes."""

    name = "none"

    def contradictions(self, policy: Policy[Arguments]) -> Iterable[Contradiction]:
        """As Golden Stick: four bits beside rounded activations need more."""
        if (policy.weight_quant_dtype, policy.act_quant_dtype) == ("qint4x2", "int8"):
            mended = {"precision_recovery": "gptq", "algo_args.desc_act": True, "algo_args.static_groups": True}
            yield Contradiction(field="precision_recovery", found="W4A8 is not rounded to nearest", write=[mended])
