"""AWQ (Lin et al. 2024): input channels that matter are enlarged before rounding, the activation reduced to match.

The kernel is `gs_dist.solvers.awq`.
"""

from __future__ import annotations

from collections.abc import Iterable

from gs_dist.methods.contradiction import Contradiction
from gs_dist.methods.method import (
    ROUNDED,
    SEARCHED,
    Arguments,
    Policy,
    Ratios,
    SuppressionMethod,
    Work,
    Workspace,
    error_operations,
    objective_bytes,
)
from gs_dist.model.statistics import StatisticsSettings

__all__ = ["AWQ", "EXPONENTS", "TILE_ROWS", "AWQArguments", "ExponentArguments"]

EXPONENTS = tuple(i / 20 for i in range(20))  # of Golden Stick's AWQConfig
TILE_ROWS = 512  # rounded at a time under one candidate

_TILE_BYTES = 5  # of an entry: float32, and ranges of small groups in float64


class ExponentArguments(Arguments):
    """What AWQ shares with outlier suppression."""

    smooth_alpha: Ratios = None
    """Exponent of AWQ and Outlier Suppression, or several to search among; null searches all of theirs."""


class AWQArguments(ExponentArguments):
    """Those of Golden Stick's AWQConfig that are AWQ's own."""

    duo_scaling: bool = True
    """AWQ looks at the weights' magnitudes as well as at the activations'."""


class AWQ(SuppressionMethod[AWQArguments]):
    """Judges scales by rounded weights alone: activations count as they are."""

    name = "awq"
    label = "AWQ"
    arguments = tuple(AWQArguments.model_fields)
    forces_clipping = True  # as Golden Stick does

    def exponents(self, policy: Policy[AWQArguments]) -> float | tuple[float, ...]:
        """`smooth_alpha`."""
        given = policy.algo_args.smooth_alpha
        return EXPONENTS if given is None else given

    def statistics(self, policy: Policy[AWQArguments]) -> StatisticsSettings:
        """Output errors, of a single exponent too: its clipping asks for them."""
        return SEARCHED

    def contradictions(self, policy: Policy[AWQArguments]) -> Iterable[Contradiction]:
        """As Golden Stick: it does not look at rounded activations."""
        if policy.weight_quant_dtype == policy.act_quant_dtype == "int8":
            write = [{"outliers_suppression": "smooth"}]
            yield Contradiction(field="outliers_suppression", found="AWQ does not serve W8A8", write=write)

    def workspace(self, policy: Policy[AWQArguments], work: Work) -> Workspace:
        """What is searched against, and a tile for each thread."""
        return Workspace(
            shared=objective_bytes(work.channels, work.taken) if work.taken.sketches(work.channels) else 0,
            thread=min(work.rows, TILE_ROWS) * work.channels * _TILE_BYTES,
        )

    def operations(self, policy: Policy[AWQArguments], work: Work) -> int:
        """All rows for each exponent, and for plain rounding."""
        exponents = self.exponents(policy)
        tried = 1 if isinstance(exponents, float) else len(exponents)
        return (1 + tried) * (
            error_operations(work.rows, work.channels, work.taken) + ROUNDED * work.rows * work.channels
        )
