"""Rounding toward zero: no method of use, but one that is added as any other is."""

from __future__ import annotations

from collections.abc import Iterable

from gs_dist.methods.contradiction import Contradiction
from gs_dist.methods.method import SEARCHED, Arguments, Policy, Ratio, RoundingMethod, Work, Workspace
from gs_dist.model.statistics import StatisticsSettings

__all__ = ["TowardZero", "TowardZeroArguments"]


class TowardZeroArguments(Arguments):
    """What it reads."""

    pull: Ratio = 0.5
    """How far weights are pulled toward zero before they are rounded, in codes."""


class TowardZero(RoundingMethod[TowardZeroArguments]):
    """Asks for statistics, workspace and operations of its own."""

    name = "toward-zero"
    label = "TowardZero"
    arguments = tuple(TowardZeroArguments.model_fields)

    def statistics(self, policy: Policy[TowardZeroArguments]) -> StatisticsSettings:
        """Pretends to search."""
        return SEARCHED

    def contradictions(self, policy: Policy[TowardZeroArguments]) -> Iterable[Contradiction]:
        """Rounded activations."""
        if policy.act_quant_dtype is not None:
            write = [{"act_quant_dtype": None}]
            yield Contradiction(field="precision_recovery", found="toward-zero takes weights alone", write=write)

    def workspace(self, policy: Policy[TowardZeroArguments], work: Work) -> Workspace:
        """A thousand bytes a row."""
        return Workspace(own=1000 * work.rows)

    def operations(self, policy: Policy[TowardZeroArguments], work: Work) -> int:
        """Seven a weight."""
        return 7 * work.rows * work.channels
