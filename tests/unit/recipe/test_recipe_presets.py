"""Schemes by name."""

from __future__ import annotations

import pytest

from gs_dist.errors import RecipeError
from gs_dist.recipe.config import config_of
from gs_dist.recipe.presets import PRESETS, find_preset


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_a_recipe_without_contradiction(name: str) -> None:
    """A preset's keys make a valid recipe that leaves the head alone."""
    document = {"model": "m", "output": "o", "calibration": {"data": "d"}, **PRESETS[name].document({4096, 14336})}
    config = config_of(document, source=name)
    assert config.ptq.opname_blacklist == ("lm_head",)
    assert config.ptq.group_size == (128 if PRESETS[name].grouped else 0)


def test_groups_are_the_largest_that_divide_every_linear() -> None:
    """SmolLM2's 576 channels take groups of 64; where no size divides all, a scale serves a whole channel."""
    assert PRESETS["w4a16"].document({576, 1536})["ptq"]["group_size"] == 64
    odd = PRESETS["w4a16"].document({100})["ptq"]
    assert (odd["weight_quant_granularity"], odd.get("group_size", 0)) == ("per_channel", 0)


def test_a_scheme_is_found_however_it_is_joined_and_a_wrong_one_names_the_nearest() -> None:
    """W8A8_DYNAMIC is w8a8-dynamic; w4a61 is told to be w4a16, probably."""
    assert find_preset("W8A8_DYNAMIC").name == "w8a8-dynamic"
    with pytest.raises(RecipeError, match=r"--scheme: 'w4a61' is not a scheme; do you mean w4a16\? Schemes are"):
        find_preset("w4a61")


def test_static_activations_by_name_do_not_end_a_job_at_a_linear_that_cannot_take_them() -> None:
    """One step for all tokens destroys a linear of SmolLM2; it stays in float, where a recipe's default is to fail."""
    document = {"model": "m", "output": "o", "calibration": {"data": "d"}}
    assert config_of(document | PRESETS["w8a8"].document({64}), source="w8a8").on_bad_layer == "keep_float"
    assert config_of(document, source="none").on_bad_layer == "fail"
