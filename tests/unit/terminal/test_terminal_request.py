"""A recipe from what is typed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import tiny_checkpoint

from gs_dist.data.shipped_text import SHIPPED_TEXT, shipped_note
from gs_dist.errors import RecipeError
from gs_dist.terminal.request import Request, again


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "model", num_layers=1)
    return tmp_path / "model"


def test_a_model_directory_and_a_scheme_are_a_whole_recipe(model: Path, tmp_path: Path) -> None:
    """Options and overrides are laid over the scheme's keys."""
    request = Request(
        source=model,
        scheme="w8a8",
        data=["a.parquet", "b.jsonl"],
        output=tmp_path / "out",
        format=["ascend"],
        samples=7,
        length=16,
        overrides=["calibration.seed=3"],
    )
    config = request.config()
    assert (config.model, config.output, config.dialects) == (str(model), str(tmp_path / "out"), ("ascend",))
    data = config.calibration
    assert (data.data, data.num_samples, data.sequence_length, data.seed) == (("a.parquet", "b.jsonl"), 7, 16, 3)
    assert config.ptq.is_static
    assert "calibration.data=[a.parquet, b.jsonl]" in again(config)


def test_without_data_the_shipped_text_is_taken_and_said_to_be_no_domain_of_yours(model: Path, tmp_path: Path) -> None:
    """The text exists beside the package, and the note names the option that replaces it."""
    config = Request(source=model, output=tmp_path / "out").config()
    assert config.calibration.data == (str(SHIPPED_TEXT),)
    assert SHIPPED_TEXT.is_file()
    assert "--data" in shipped_note(config.calibration.data)[0]
    assert shipped_note(["mine.parquet"]) == ()


def test_what_is_missing_or_out_of_place_is_named(model: Path, tmp_path: Path) -> None:
    """No output, a scheme beside a recipe, a source that is not there, a directory that holds no model."""
    with pytest.raises(RecipeError, match=r"-o is missing: .* Write -o DIRECTORY"):
        Request(source=model, scheme="w8a8").config()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\noutput: o\ncalibration: {data: d}\n")
    with pytest.raises(RecipeError, match="a recipe, which says its own"):
        Request(source=recipe, scheme="w8a8").config()
    with pytest.raises(RecipeError, match="is not there"):
        Request(source=tmp_path / "nowhere", scheme="w8a8").config()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"is a directory without config\.json: name the directory of a model"):
        Request(source=tmp_path / "empty", output=tmp_path / "out").config()


def test_options_are_laid_over_a_recipe(tmp_path: Path) -> None:
    """The same options serve a recipe, too."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\noutput: o\ncalibration: {data: d}\n")
    config = Request(source=recipe, data=["x.parquet"], samples=3, output=tmp_path / "elsewhere").config()
    assert (config.calibration.data, config.calibration.num_samples) == (("x.parquet",), 3)
    assert config.output == str(tmp_path / "elsewhere")


def test_no_more_samples_are_asked_for_than_the_data_hold(model: Path, tmp_path: Path) -> None:
    """Where nobody says how many, all are taken that are there; a number that was typed stands."""
    rows = pa.table({"input_ids": [list(range(16))] * 5})
    pq.write_table(rows, tmp_path / "few.parquet")
    request = Request(source=model, data=[str(tmp_path / "few.parquet")], output=tmp_path / "out", length=16)
    assert request.config().calibration.num_samples == 5
    assert replace(request, samples=9).config().calibration.num_samples == 9
    assert replace(request, data=["nowhere/*.parquet"]).config().calibration.num_samples == 128
