"""How many calibration tokens reached each expert of a mixture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from gs_dist.results.quantized import LinearSummary
from gs_dist.wording import counted

__all__ = ["LayerCoverage", "describe_coverage", "expert_coverage"]


@dataclass(frozen=True, kw_only=True)
class LayerCoverage:
    """Of a layer's experts.

    Attributes:
        layer: its number.
        given: tokens that each expert was given, in order of expert.
        borrowed: how many experts took other tokens too, because too few were given to them.
    """

    layer: int
    given: tuple[int, ...]
    borrowed: int

    @property
    def unreached(self) -> int:
        """Experts that no token reached."""
        return sum(count == 0 for count in self.given)


def expert_coverage(rows: Iterable[LinearSummary]) -> list[LayerCoverage]:
    """By layer, from the rows of the linears that read an expert's own input; none for a dense model."""
    layers: dict[int, list[LinearSummary]] = {}
    for row in rows:
        if row.num_given is not None:
            layers.setdefault(row.layer, []).append(row)
    return [
        LayerCoverage(
            layer=layer,
            given=tuple(row.num_given or 0 for row in own),
            borrowed=sum(row.num_tokens > (row.num_given or 0) for row in own),
        )
        for layer, own in sorted(layers.items())
    ]


def describe_coverage(layers: list[LayerCoverage]) -> str:
    """One line on all layers; empty for a dense model."""
    given = [count for layer in layers for count in layer.given]
    if not given:
        return ""
    unreached, borrowed = sum(layer.unreached for layer in layers), sum(layer.borrowed for layer in layers)
    line = (
        f"experts: {len(given)} in {counted(len(layers), 'layer')}, given {min(given)} to {max(given)} tokens each, "
        f"median {statistics.median(given):.0f}"
    )
    if not borrowed:
        return line
    return f"{line}; {unreached} reached by none, {borrowed} by too few: those that came closest stand in"
