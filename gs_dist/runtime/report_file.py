"""report.html in a job's output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gs_dist.checkpoint.output_lock import REPORT
from gs_dist.checkpoint.writer import write_bytes
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.report.page import render_report
from gs_dist.results.summary import CalibrationSummary

__all__ = ["publish_report"]


def publish_report(
    output: Path, summary: CalibrationSummary, config: CalibrationConfig | None, tell: Callable[[str], None]
) -> None:
    """Draws and writes it. Foreign code draws, and no fault of a picture is worth a model: `tell` is told of one.

    Args:
        output: of the job.
        summary: of the job.
        config: its recipe; None for a conversion, which has no limits to show.
        tell: told where the report was not made.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        page = render_report(summary, config)
    except Exception as error:
        tell(f"{REPORT} was not made ({type(error).__name__}: {error}); `gs-dist report` tries again")
    else:
        write_bytes(output / REPORT, page.encode())
