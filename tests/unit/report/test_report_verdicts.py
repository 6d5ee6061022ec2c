"""Verdicts: whether a run kept to its recipe's limits."""

from __future__ import annotations

from dataclasses import replace

from summaries import a_summary, dense_rows

from gs_dist.recipe.config import CalibrationConfig, config_of
from gs_dist.report.verdicts import verdicts


def a_recipe(**settings: object) -> CalibrationConfig:
    document = {"model": "/m", "output": "/o", "calibration": {"data": "calib.parquet"}, **settings}
    return config_of(document, source="test")


def test_a_limit_that_linears_pass_is_told_with_their_number_and_the_worst() -> None:
    """Errors over all tokens count with what rounded activations add."""
    rows = dense_rows(2)
    above = sum((row.energy_error or 0) > 5e-4 for row in rows)
    verdict = verdicts(a_summary(rows), a_recipe(max_relative_error=5e-4))[0]
    assert verdict.kept is False
    assert f"{above} linears above it; the worst linear, model.layers.1.mlp.down_proj" in verdict.text


def test_a_perplexity_is_judged_for_each_format_that_was_probed() -> None:
    """The increase that the probe found against the one that is allowed."""
    summary = a_summary(dense_rows(1))
    probe = replace(summary.probes[0], format="ascend", perplexity=4.0)
    found = verdicts(replace(summary, probes=(*summary.probes, probe)), a_recipe(max_perplexity_increase=0.05))
    assert [v.kept for v in found if v.limit == "max_perplexity_increase"] == [True, False]


def test_no_limit_is_no_verdict() -> None:
    """What nobody asked for was neither kept nor broken."""
    found = verdicts(a_summary(dense_rows(1)), a_recipe())
    assert [v.kept for v in found if v.limit == "max_perplexity_increase"] == [None]
