"""Whatever stands in a recipe, reading it gives a recipe or a message, soon and in little memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gs_dist.errors import RecipeError
from gs_dist.recipe.config import CalibrationConfig, load_recipe

pytestmark = pytest.mark.seconds
GOOD = """\
model: /models/tiny
output: /out
calibration: {data: [a.parquet], num_samples: 8, sequence_length: 32, micro_batch_size: auto}
ptq: {weight_quant_dtype: int8, act_quant_dtype: int8, outliers_suppression: smooth, opname_blacklist: [lm_head]}
layer_policies: {'.*mlp.*': {act_quant_granularity: per_token}, '.*o_proj': null}
parallel: {pipeline_parallel_size: 2, memory_per_worker: 60GiB, timeout: 60.0}
format: [compressed-tensors]
"""
SIGNS = st.sampled_from([*"{}[]:,-&*!|>'\"%@`#?\n\t\0\ufeff\ud7ff ~0e.", "<<: ", "&a ", "*a", "!!set ", "---\n"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def read(content: bytes, overrides: tuple[str, ...] = ()) -> None:
    """A recipe, or a message of bounded length; nothing else may come out."""
    said = "read"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "recipe.yaml"
        path.write_bytes(content)
        try:
            assert isinstance(load_recipe(path, overrides), CalibrationConfig)
        except RecipeError as error:
            said = str(error)
    assert 0 < len(said) < 20_000


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_recipe_or_refused(content: bytes) -> None:
    """Random bytes end in a RecipeError."""
    read(content)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), SIGNS), max_size=6))
@example([(0, 0, "? ")])
def test_a_damaged_recipe_is_read_or_refused(damage: list[tuple[int, int, str]]) -> None:
    """Signs that mean something to YAML, put anywhere over a good recipe, end in a recipe or a RecipeError."""
    text = GOOD
    for start, length, sign in damage:
        text = text[:start] + sign + text[start + length :]
    read(text.encode("utf-8", "surrogatepass"))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([*CalibrationConfig.model_fields, "calibration.data", "parallel.timeout", "ptq.algo_args"]), VALUES
)
def test_any_value_of_any_key_is_taken_or_refused(key: str, value: object) -> None:
    """A key with a value of any kind ends in a recipe or a RecipeError."""
    document = yaml.safe_load(GOOD)
    *sections, last = key.split(".")
    table = document
    for section in sections:
        table = table[section]
    table[last] = value
    read(yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_any_override_is_taken_or_refused(override: str) -> None:
    """What follows a recipe on the command line ends in a recipe or a RecipeError."""
    read(GOOD.encode(), (override,))
