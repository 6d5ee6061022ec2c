"""What `docs/extending.md` promises: an addition of each kind is taken up everywhere from its own home.

Each test registers a small addition of `tests/` and goes the way of a recipe with it; nothing else is touched.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_checkpoint
from plain_dialect.codec import DESCRIPTION
from pydantic import ValidationError
from quantized_layers import LINEARS, quantise
from safetensors.numpy import load_file, save_file

from gs_dist.checkpoint.check import check, check_all
from gs_dist.checkpoint.dialects import codec_of, published_dialect
from gs_dist.checkpoint.manifest import Fingerprints, publish_layer, publish_outer
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.model_card import write_model_card
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import find_models
from gs_dist.errors import CheckpointError, RecipeError
from gs_dist.recipe import dialects
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.summary import CalibrationSummary

DOCS = Path(__file__).parents[2] / "docs" / "extending.md"
PRINTS = Fingerprints(recipe="r", source="s", data="d")
PLAIN = dialects.Dialect(
    name="plain", title="the plain layout", home="plain_dialect", description_file=DESCRIPTION, elsewhere="Not at all."
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one row that an addition costs outside of its own package."""
    monkeypatch.setitem(dialects.DIALECTS, "plain", PLAIN)  # type: ignore[arg-type]


def a_recipe(output: Path, source: Path, **changes: object) -> CalibrationConfig:
    values = {"model": str(source), "output": str(output), "calibration": {"data": "c.parquet"}, "format": ["plain"]}
    return CalibrationConfig.model_validate({**values, **changes})


def test_a_dialect_that_is_not_registered_is_refused(tmp_path: Path) -> None:
    """The names that a recipe takes are those of the table."""
    with pytest.raises(ValidationError, match="compressed-tensors, ascend, golden-stick, each once"):
        a_recipe(tmp_path / "run", tmp_path / "m")


@pytest.mark.usefixtures("plain")
def test_a_registered_dialect_is_recipe_written_merged_checked_read_back_and_told_of(tmp_path: Path) -> None:
    """With a record, a codec and a layout it goes the whole way, and no file of the package knows its name."""
    source, output = tiny_checkpoint(tmp_path / "m", "llama", tokenizer=True), tmp_path / "run"
    config = a_recipe(output, source)
    reader = CheckpointReader(source)
    architecture, policy = reader.architecture, QuantPolicy()
    refused = QuantPolicy(act_quant_dtype="int8")
    with pytest.raises(RecipeError, match="plain holds weights alone"):
        codec_of("plain").check_policies({"model.layers.0.mlp.up_proj": refused}, architecture)

    layers = [quantise(reader, n, dict.fromkeys(LINEARS, policy)) for n in range(architecture.num_layers)]
    output.mkdir()
    manifests = [publish_layer(output, layer, architecture, config.dialects, PRINTS) for layer in layers]
    outer = publish_outer(output, reader, config.dialects, PRINTS)
    merge_checkpoint(output, "plain", reader, manifests, outer)

    directory = output / "plain"
    assert json.loads((directory / DESCRIPTION).read_text())["linears"]
    assert published_dialect(directory) == "plain"
    assert find_models(output) == {"plain": directory}
    assert {name: report.clean for name, report in check_all(output).items()} == {"plain": True}
    with pytest.raises(CheckpointError, match=f"{DESCRIPTION} describes quantised weights"):
        CheckpointReader(directory)
    decoded = codec_of("plain").decode_layer(CheckpointReader(directory, quantized=True), 1)
    for name, linear in decoded.linears.items():
        np.testing.assert_array_equal(linear.dequantised(), layers[1].linears[name].dequantised())

    write_model_card(directory, config, _summary(source), architecture)
    card = (directory / "README.md").read_text()
    assert "by gs_dist, in the plain layout." in card

    shard = directory / "layer-00001.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight_scale"][3] = 0
    save_file(tensors, shard)
    assert "scale-positive" in {problem.rule for problem in check(directory).problems}


def test_what_a_dialect_costs_is_what_the_page_says() -> None:
    """Its list names three places, the record and the two files of its folder, and those exist for every dialect."""
    page = DOCS.read_text(encoding="utf-8").split("\n## A dialect\n")[1].split("\n## ")[0]
    named = [line for line in page.splitlines() if line.startswith("1. ")]
    assert len(named) == 3
    assert "gs_dist/recipe/dialects.py" in named[0]
    assert "codec.py" in named[1]
    assert "layout.py" in named[2]
    for dialect in dialects.DIALECTS.values():
        home = DOCS.parents[1].joinpath(*dialect.home.split("."))
        assert (home / "codec.py").is_file()
        assert (home / "layout.py").is_file()


def _summary(source: Path) -> CalibrationSummary:
    return CalibrationSummary(
        model=source.name,
        formats=("plain",),
        propagation="original",
        num_samples=1,
        num_tokens=8,
        seconds=1.0,
        versions={},
        fingerprints={},
        rows=(),
        stages=(),
    )
