"""The perplexities that a summary knows, whoever measured them."""

from __future__ import annotations

from dataclasses import dataclass

from gs_dist.results.summary import CalibrationSummary

__all__ = ["Perplexity", "perplexities"]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Of a published format, beside the float model's over the same samples."""

    format: str
    perplexity: float
    float_perplexity: float | None
    over: str

    @property
    def increase(self) -> str:
        """`+0.81%`, or nothing where the float model was not measured."""
        return "" if self.float_perplexity is None else f"{self.perplexity / self.float_perplexity - 1:+.2%}"


def perplexities(summary: CalibrationSummary) -> list[Perplexity]:
    """Those of `gs-dist evaluate` first, then the probe's."""
    probed = [
        Perplexity(
            format=p.format,
            perplexity=p.perplexity,
            float_perplexity=p.float_perplexity,
            over=f"{p.num_samples} samples of {'the calibration data' if p.calibration_data else 'other data'}",
        )
        for p in summary.probes
    ]
    evaluated = [
        Perplexity(format=e.format, perplexity=e.perplexity, float_perplexity=e.float_perplexity, over=e.basis())
        for e in summary.evaluations
    ]
    return evaluated + probed
