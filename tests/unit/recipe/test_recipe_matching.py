"""Which linear gets which policy, by patterns of names."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gs_dist.conversion.config import ConversionConfig
from gs_dist.errors import RecipeError, UserError
from gs_dist.recipe.config import config_of
from gs_dist.recipe.matching import match_patterns
from gs_dist.recipe.pattern import compiled_of_recipe

NAMES = [f"model.layers.{n}.{part}" for n in range(12) for part in ("mlp.down_proj", "self_attn.q_proj")]


@pytest.mark.parametrize("pattern", ["(.*.*)*x", "(a|a)*b", "(?:[a-z.]+)+#", "((.+)+)+!"])
def test_a_pattern_of_a_recipe_cannot_keep_a_job_busy(pattern: str) -> None:
    """Patterns that take `re` longer than a life are tried on long names at once."""
    with pytest.raises(UserError, match="matches no linear of the model"):
        match_patterns(["a" * 5000, *NAMES], [pattern])


@pytest.mark.parametrize("pattern", ["^(?!.*down_proj).*", r"(?<=mlp\.)down_proj", r"(.)\1", r".*(?=q_proj)"])
def test_what_linear_time_does_not_allow_is_said_with_what_to_write_instead(pattern: str) -> None:
    """Look-around and references back, in recipes of both kinds; the pattern is named."""
    told = "patterns are matched by RE2, in linear time, which has no look-ahead, no look-behind"
    document = {"model": "m", "output": "o", "calibration": {"data": "d"}, "layer_policies": {pattern: None}}
    with pytest.raises(RecipeError) as of_recipe:
        config_of(document, source="recipe.yaml")
    with pytest.raises(ValidationError) as of_conversion:
        ConversionConfig(model="m", output="o", scheme="W8A8_DYNAMIC", layer_policies={pattern: None})
    for text in (str(of_recipe.value), str(of_conversion.value)):
        assert told in text
        assert "list what is to stay in ptq.opname_blacklist" in text


parts = st.sampled_from(
    [".*", r"\.", r"\d+", "model", "layers", "(1|2|10)", "[0-5]", "down_proj", "q_proj", "$", "^", "x?"]
)


@given(st.lists(parts, min_size=1, max_size=6).map("".join))
def test_a_pattern_means_what_it_means_to_python(pattern: str) -> None:
    """Without look-around and references, RE2 matches from the start of names what `re.match` does."""
    compiled = compiled_of_recipe(pattern)
    for name in NAMES:
        assert bool(compiled.match(name)) is bool(re.match(pattern, name))
