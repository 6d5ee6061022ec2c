"""Whether a run kept to the limits that its recipe sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gs_dist.recipe.config import CalibrationConfig
from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import CalibrationSummary
from gs_dist.wording import counted

__all__ = ["Verdict", "verdicts"]

_Figure = Callable[[LinearSummary], float | None]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One limit: whether it was kept, None where none was set, and the figures."""

    limit: str
    kept: bool | None
    text: str


def verdicts(summary: CalibrationSummary, config: CalibrationConfig) -> list[Verdict]:
    """Of every limit that a recipe can set."""
    return [*_errors(summary, config), *_perplexities(summary, config)]


def _errors(summary: CalibrationSummary, config: CalibrationConfig) -> Iterator[Verdict]:
    yield _ceiling("max_relative_error", config.max_relative_error, summary, lambda row: row.energy_error)
    if config.max_token_error is not None:
        yield _ceiling("max_token_error", config.max_token_error, summary, lambda row: row.token_error)


def _ceiling(limit: str, ceiling: float | None, summary: CalibrationSummary, figure: _Figure) -> Verdict:
    known = [(value, row.name) for row in summary.rows if (value := figure(row)) is not None]
    if not known:
        return Verdict(limit=limit, kept=None, text="no linear's error is known")
    worst, name = max(known)
    told = f"the worst linear, {name}, loses {worst:.3g}"
    if ceiling is None:
        return Verdict(limit=limit, kept=None, text=f"no limit was set; {told}")
    above = sum(value > ceiling for value, _ in known)
    found = f"{counted(above, 'linear')} above it; {told}" if above else told
    return Verdict(limit=limit, kept=not above, text=f"at most {ceiling:g}: {found}")


def _perplexities(summary: CalibrationSummary, config: CalibrationConfig) -> Iterator[Verdict]:
    limit = config.max_perplexity_increase
    if limit is None:
        yield Verdict(limit="max_perplexity_increase", kept=None, text="no limit was set, so that nothing was probed")
        return
    for probe in summary.probes:
        yield Verdict(
            limit="max_perplexity_increase",
            kept=probe.increase <= limit,
            text=f"at most {limit:.1%}: {probe.format} has {probe.sentence()}",
        )
