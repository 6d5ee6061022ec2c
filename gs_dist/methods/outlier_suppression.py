"""Outlier Suppression Lite (Golden Stick) and Plus (Wei et al. 2023).

The kernel is `gs_dist.solvers.outlier_suppression`.
"""

from __future__ import annotations

from collections.abc import Iterable

from gs_dist.methods.awq import EXPONENTS, ExponentArguments
from gs_dist.methods.contradiction import Contradiction
from gs_dist.methods.exponent_search import ExponentSearch
from gs_dist.methods.method import Policy

__all__ = ["SHIFT_STEP", "OutlierSuppressionLite", "OutlierSuppressionPlus"]

# Every how manieth exponent is tried of a shift at first, and of how many shifts.
SHIFT_STEP, _SHIFTS = 4, 2

_PLUS_EXPONENTS = tuple(i / 20 for i in range(21))  # Golden Stick's outlier suppression with shifts goes up to 1


class OutlierSuppressionLite(ExponentSearch[ExponentArguments]):
    """SmoothQuant's strength by search, of W8A8."""

    name = "outlier-suppression-lite"
    label = "OSL"
    arguments = tuple(ExponentArguments.model_fields)
    forces_clipping = True  # as Golden Stick does

    def exponents(self, policy: Policy[ExponentArguments]) -> float | tuple[float, ...]:
        """`smooth_alpha`, by default AWQ's."""
        given = policy.algo_args.smooth_alpha
        return EXPONENTS if given is None else given

    def contradictions(self, policy: Policy[ExponentArguments]) -> Iterable[Contradiction]:
        """As Golden Stick."""
        if not (policy.weight_quant_dtype == policy.act_quant_dtype == "int8" and policy.kvcache_quant_dtype is None):
            yield Contradiction(
                field="outliers_suppression",
                found=f"{self.name} serves exactly W8A8 without KV-cache quantisation",
                write=[{"weight_quant_dtype": "int8", "act_quant_dtype": "int8", "kvcache_quant_dtype": None}],
            )


class OutlierSuppressionPlus(ExponentSearch[ExponentArguments]):
    """Shifts each channel to its middle first, where a bias can take that up and the error falls."""

    name = "outlier-suppression+"
    label = "OutlierSuppressionPlus"
    arguments = tuple(ExponentArguments.model_fields)
    shifts = True

    def exponents(self, policy: Policy[ExponentArguments]) -> float | tuple[float, ...]:
        """`smooth_alpha`."""
        given = policy.algo_args.smooth_alpha
        return _PLUS_EXPONENTS if given is None else given

    def clips_by_default(self, policy: Policy[ExponentArguments]) -> bool:
        """It moves outliers into columns, which would set the range of each row."""
        return True

    def trials(self, policy: Policy[ExponentArguments]) -> int:
        """Every so manieth exponent again for each shift; no shift without rounded activations."""
        unshifted = super().trials(policy)
        if isinstance(self.exponents(policy), float) or policy.act_quant_dtype is None:
            return unshifted
        return unshifted + _SHIFTS * -(-unshifted // SHIFT_STEP)
