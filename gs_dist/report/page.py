"""A summary as an HTML page: one file, no network, no scripts; every drawing has its table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from gs_dist.recipe.config import CalibrationConfig, published_recipe
from gs_dist.report.advice import advise, advise_converted
from gs_dist.report.drawing import Figure
from gs_dist.report.figures import account_figure, heat_map_figure, memory_figure
from gs_dist.report.heat_map import HeatMap, heat_map
from gs_dist.report.page_templates import render
from gs_dist.report.perplexities import perplexities
from gs_dist.report.verdicts import verdicts
from gs_dist.results.coverage import describe_coverage, expert_coverage
from gs_dist.results.quantized import OUTLIER_FACTOR, LinearSummary
from gs_dist.results.summary import CalibrationSummary

__all__ = ["render_report"]

_WORST = 10
_RANGES = 10


def render_report(summary: CalibrationSummary, config: CalibrationConfig | None = None) -> str:
    """The page.

    Args:
        summary: of a job.
        config: its recipe; None where it was not kept, and then limits and recipe are not shown.
    """
    quantized = [row for row in summary.rows if row.relative_error is not None]
    errors = heat_map(quantized, lambda row: row.largest_error)
    outliers = heat_map(summary.rows, lambda row: row.outlier_ratio)
    sensitivities = _sensitivities(summary.rows)
    advice = advise if summary.has_data else advise_converted
    figures = {
        **_drawn("errors", errors, "error"),
        **_drawn("outliers", outliers, "largest channel / median channel"),
        **_of_workers(summary),
    }
    for scheme, matrix in sensitivities.items():
        figures |= _drawn(f"sensitivity-{scheme}", matrix, f"error as {scheme}")
    return render(
        "report.html",
        figures,
        summary=summary,
        schemes=_schemes(summary),
        sizes=_sizes(summary),
        perplexities=perplexities(summary),
        verdicts=[] if config is None else verdicts(summary, config),
        recipe=None if config is None else published_recipe(config),
        errors=errors,
        sensitivities=sensitivities,
        outliers=outliers,
        outlier_factor=OUTLIER_FACTOR,
        widest=sorted((r for r in summary.rows if r.outlier_ratio), key=lambda r: -(r.outlier_ratio or 0))[:_RANGES],
        worst=[(row, advice(row)) for row in summary.sorted_rows("error")[:_WORST] if row.largest_error is not None],
        coverage=expert_coverage(summary.rows),
        coverage_told=describe_coverage(expert_coverage(summary.rows)),
        kinds=_kinds(summary),
    )


def _schemes(summary: CalibrationSummary) -> list[tuple[str, int, float | None]]:
    """Strategy, how many linears, and the worst error among them."""
    counts = Counter(row.strategy for row in summary.rows)
    found = []
    for strategy, count in counts.most_common():
        errors = [r.largest_error for r in summary.rows if r.strategy == strategy and r.largest_error is not None]
        found.append((strategy, count, max(errors, default=None)))
    return found


def _sizes(summary: CalibrationSummary) -> list[tuple[str, int, float | None]]:
    """Format, bytes, and the share of the float model's that they are."""
    source = summary.source_bytes
    return [(name, size, size / source if source else None) for name, size in summary.model_bytes.items()]


def _drawn(name: str, matrix: HeatMap, what: str) -> dict[str, Figure]:
    if not matrix:
        return {}
    return {name: Figure(specification=heat_map_figure(matrix, what), label=f"{what} of each linear, by layer")}


def _sensitivities(rows: Sequence[LinearSummary]) -> dict[str, HeatMap]:
    """A heat map for each scheme that linears were judged by."""
    schemes = dict.fromkeys(scheme for row in rows for scheme in row.scheme_errors or {})

    def of(scheme: str) -> Callable[[LinearSummary], float | None]:
        return lambda row: (row.scheme_errors or {}).get(scheme)

    return {scheme: heat_map(rows, of(scheme)) for scheme in schemes}


def _kinds(summary: CalibrationSummary) -> list[str]:
    return list(dict.fromkeys(kind for stage in summary.stages for kind in stage.account))


def _of_workers(summary: CalibrationSummary) -> dict[str, Figure]:
    stages = summary.stages
    if not any(stage.account for stage in stages):
        return {}
    return {
        "account": Figure(specification=account_figure(stages), label="Seconds of each worker by kind of work"),
        "memory": Figure(specification=memory_figure(stages), label="Peak memory of each worker and what was planned"),
    }
