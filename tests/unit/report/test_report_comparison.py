"""Two runs side by side: where one loses more than the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from summaries import a_summary, dense_rows, linear_row

from gs_dist.errors import OutputError
from gs_dist.report.comparison import render_comparison

pytestmark = pytest.mark.seconds


def test_each_linear_is_told_by_the_ratio_of_its_errors() -> None:
    """Twice the error in the second run reads 2, whatever the errors are."""
    rows = dense_rows(2)
    doubled = [
        replace(row, relative_error=2 * row.relative_error, activation_error=2 * (row.activation_error or 0))
        for row in rows
        if row.relative_error
    ]
    text = render_comparison(a_summary(rows), a_summary(tuple(doubled)), ("one", "two"))
    assert text.count(": ratio of errors 2</") == len(doubled)


def test_runs_over_other_samples_are_said_to_be() -> None:
    """Their errors are over different tokens."""
    other = a_summary(dense_rows(1), fingerprints={"source": "cd" * 32, "data": "00"})
    assert "different samples" in render_comparison(a_summary(dense_rows(1)), other)
    assert "different samples" not in render_comparison(a_summary(dense_rows(1)), a_summary(dense_rows(1)))


def test_runs_of_different_models_are_refused() -> None:
    """There is nothing to hold side by side."""
    other = a_summary((linear_row(0, "other.linear", 0.1),))
    with pytest.raises(OutputError, match="no linear in common"):
        render_comparison(a_summary(dense_rows(1)), other)
