"""What a summary tells of a linear's input: its range, and the channels far beyond the others."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from gs_dist.model.statistics import InputStatistics
from gs_dist.results.quantized import OUTLIER_FACTOR

__all__ = ["InputFigures", "input_figures"]

_MOST = 8  # channels that are named


class InputFigures(TypedDict, total=False):
    """Fields of `LinearSummary` that tell of the input; none where no token reached it."""

    input_min: float
    input_max: float
    input_typical: float
    outlier_channels: tuple[int, ...]


def input_figures(statistics: InputStatistics) -> InputFigures:
    """Range, median channel and outlier channels of an input that tokens reached, before any rescaling."""
    magnitudes = np.asarray(statistics.max_abs, dtype=np.float64)
    typical = float(np.median(magnitudes))
    largest_first = np.argsort(-magnitudes, kind="stable")[:_MOST]
    outliers = [int(c) for c in largest_first if typical > 0 and magnitudes[c] >= OUTLIER_FACTOR * typical]
    return InputFigures(
        input_min=float(statistics.minimum.min()),
        input_max=float(statistics.maximum.max()),
        input_typical=typical,
        outlier_channels=tuple(outliers),
    )
