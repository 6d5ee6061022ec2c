"""Every number format that recipes name through the whole job, in every dialect that holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import plan_of, run_inline, small_recipe

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import check_policies
from gs_dist.errors import UserError
from gs_dist.numbers.table import WEIGHT_FORMATS, WeightFormatName
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.dialects import DIALECTS


def holds(dialect: str, config: CalibrationConfig) -> bool:
    """Whether a dialect takes the recipe's policies."""
    plan = plan_of(config)
    try:
        check_policies(dialect, plan.policies, plan.architecture)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_job_publishes_it_and_what_is_published_passes_every_check(tmp_path: Path, name: WeightFormatName) -> None:
    """Tensors, the scales that provenance.json notes, and the float weights that they are roundings of."""
    form = WEIGHT_FORMATS[name]
    size = min(form.group_sizes)
    granularity = "per_group" if size else "per_channel"
    policy = {"weight_quant_dtype": name, "weight_quant_granularity": granularity, "group_size": size}
    config = small_recipe(tmp_path, num_layers=1, ptq=policy, max_relative_error=None)
    dialects = [dialect for dialect in DIALECTS if holds(dialect, config)]
    assert "compressed-tensors" in dialects
    config = small_recipe(tmp_path, ptq=policy, max_relative_error=None, format=dialects)
    summary = run_inline(config)
    assert {row.strategy for row in summary.rows} == {"NA", f"{form.label}-{granularity.replace('_', '')}"}  # the head
    for dialect in dialects:
        report = check(Path(config.output) / dialect, model=config.model)
        assert report.clean, report.render()
