"""Where a model lies and where an output may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from gs_dist.conversion.config import ConversionConfig
from gs_dist.errors import RecipeError
from gs_dist.recipe.config import config_of

INSIDE, AROUND = "outside the model's", "one that does not hold the model"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a model in a directory, links to both, and the working directory beside them."""
    (tmp_path / "home/all/model/sub").mkdir(parents=True)
    (tmp_path / "home/to_model").symlink_to("all/model")
    (tmp_path / "home/to_all").symlink_to("all")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def refusals(model: str, output: str) -> list[str]:
    """Of a recipe that calibrates and of one that converts."""
    with pytest.raises(RecipeError) as of_recipe:
        config_of({"model": model, "output": output, "calibration": {"data": "d"}}, source="r")
    with pytest.raises(ValueError, match="write a directory") as of_conversion:
        ConversionConfig(model=model, output=output)
    return [str(of_recipe.value), str(of_conversion.value)]


@pytest.mark.parametrize("model", ["all/model", "to_model", "to_all/model", "~/to_model", "{home}/all/./model/"])
@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("all/model", INSIDE),
        ("all/model/sub/new", INSIDE),
        ("to_model/new", INSIDE),
        ("~/all/model/new", INSIDE),
        ("{home}/to_all/model/sub/../new", INSIDE),
        ("all", AROUND),
        ("to_all", AROUND),
        ("~", AROUND),
        (".", AROUND),
        ("/", AROUND),
    ],
)
def test_model_and_output_do_not_hold_each_other(home: Path, model: str, output: str, told: str) -> None:
    """By real path: through links, `~`, `..` and a working directory, in both directions."""
    for text in refusals(model.format(home=home), output.format(home=home)):
        assert told in text


@pytest.mark.parametrize("output", ["all/model2", "all/other", "out", "~/out", "to_all/out"])
def test_directories_beside_the_model_will_do(home: Path, output: str) -> None:
    """A name that begins like the model's is another directory."""
    config_of({"model": "~/to_model", "output": output, "calibration": {"data": "d"}}, source="r")
    ConversionConfig(model="~/to_model", output=output)


@pytest.mark.parametrize("uri", ["s3://bucket/m", "hf://datasets/a", "s3:/bucket/m"])
def test_a_uri_is_no_directory(home: Path, uri: str) -> None:
    """It would be taken for a path of that name."""
    for model, output in ((uri, "out"), ("to_model", uri)):
        for text in refusals(model, output):
            assert "write a directory that is mounted here and on every node, and no URI" in text
