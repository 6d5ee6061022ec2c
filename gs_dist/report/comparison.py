"""Two runs of one model side by side, as an HTML page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gs_dist.errors import OutputError
from gs_dist.report.drawing import Figure
from gs_dist.report.figures import ratio_figure
from gs_dist.report.heat_map import heat_map
from gs_dist.report.page_templates import render
from gs_dist.report.perplexities import perplexities
from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import CalibrationSummary

__all__ = ["render_comparison"]

_MOST = 10


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One linear in both runs."""

    first: LinearSummary
    second: LinearSummary

    @property
    def ratio(self) -> float | None:
        """The second error over the first; None where one of them is not known, or is nothing."""
        first, second = self.first.largest_error, self.second.largest_error
        return second / first if first and second else None


@dataclass(frozen=True, kw_only=True)
class RoleErrors:
    """Median errors of the linears of one role, None where none is known."""

    role: str
    first: float | None
    second: float | None


def render_comparison(
    first: CalibrationSummary, second: CalibrationSummary, names: tuple[str, str] = ("first", "second")
) -> str:
    """The page.

    Args:
        first: summary of a run.
        second: of another that quantised the same linears.
        names: what the two are called.

    Raises:
        OutputError: the runs have no linear in common.
    """
    others = {row.name: row for row in second.rows}
    pairs = [Pair(first=row, second=others[row.name]) for row in first.rows if row.name in others]
    if not pairs:
        raise OutputError(f"{names[0]} and {names[1]} have no linear in common: name two runs of one model")
    ratios = {pair.first.name: pair.ratio for pair in pairs}
    matrix = heat_map(first.rows, lambda row: ratios.get(row.name))
    what = f"error of {names[1]} / error of {names[0]}"
    drawn = Figure(specification=ratio_figure(matrix, "ratio of errors"), label=f"{what}, by layer")
    changed = sorted((pair for pair in pairs if pair.ratio), key=lambda pair: -_size(pair))
    return render(
        "comparison.html",
        {"ratios": drawn} if matrix else {},
        names=names,
        runs=(first, second),
        perplexities=[perplexities(run) for run in (first, second)],
        same_model=first.fingerprints.get("source") == second.fingerprints.get("source"),
        same_data=first.fingerprints.get("data") == second.fingerprints.get("data"),
        ratios=matrix,
        what=what,
        roles=_roles(pairs),
        changed=changed[:_MOST],
    )


def _size(pair: Pair) -> float:
    """How much a linear changed, as a share of its output's energy."""
    return abs((pair.second.largest_error or 0.0) - (pair.first.largest_error or 0.0))


def _roles(pairs: Sequence[Pair]) -> list[RoleErrors]:
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.first.role, []).append(pair)
    return [
        RoleErrors(role=role, first=_median([p.first for p in own]), second=_median([p.second for p in own]))
        for role, own in groups.items()
    ]


def _median(rows: Sequence[LinearSummary]) -> float | None:
    known = [row.largest_error for row in rows if row.largest_error is not None]
    return statistics.median(known) if known else None
