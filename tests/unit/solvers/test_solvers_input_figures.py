"""What a summary tells of a linear's input."""

from __future__ import annotations

import numpy as np

from gs_dist.model.statistics import InputStatistics
from gs_dist.solvers.input_figures import input_figures


def statistics(x: np.ndarray) -> InputStatistics:
    return InputStatistics(
        num_tokens=len(x),
        minimum=x.min(axis=0).astype(np.float32),
        maximum=x.max(axis=0).astype(np.float32),
        sum_abs=np.abs(x).sum(axis=0),
        sum_squares=(x**2).sum(axis=0),
    )


def test_outlier_channels_are_those_far_beyond_the_median_channel_largest_first() -> None:
    """A channel ten times the median one counts, a channel nine times it does not."""
    x = np.ones((4, 64))
    x[0, 5], x[1, 9], x[2, 3] = -10.0, 250.0, 9.9
    found = input_figures(statistics(x))
    assert found == {"input_min": -10.0, "input_max": 250.0, "input_typical": 1.0, "outlier_channels": (9, 5)}


def test_an_input_that_was_zero_throughout_has_no_outliers() -> None:
    """Nothing is far beyond nothing."""
    assert input_figures(statistics(np.zeros((4, 8))))["outlier_channels"] == ()
