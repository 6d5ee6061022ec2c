"""`gs-dist init`: a recipe with comments that the other commands take as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from checkpoints import header_only_checkpoint, tiny_checkpoint
from typer.testing import CliRunner, Result

from gs_dist.recipe.config import load_recipe
from gs_dist.recipe.presets import PRESETS, find_preset
from gs_dist.terminal.cli import app


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.parametrize("scheme", PRESETS)
def test_a_recipe_of_every_scheme_is_taken_by_plan(tmp_path: Path, scheme: str) -> None:
    """It says what the scheme stands for, and its shape fits this machine."""
    tiny_checkpoint(tmp_path / "model")
    written = run("init", tmp_path / "model", "--scheme", scheme, "-o", tmp_path / "out", "-w", tmp_path / "r.yaml")
    assert (written.exit_code, written.output) == (0, f"recipe: {tmp_path}/r.yaml\n")
    config = load_recipe(tmp_path / "r.yaml")
    assert config.ptq.weight_quant_dtype == find_preset(scheme).ptq["weight_quant_dtype"]
    planned = run("plan", tmp_path / "r.yaml", "parallel.device=cpu", "calibration.data=elsewhere")
    assert planned.exit_code == 0, planned.output


def test_each_key_has_its_description_before_it_and_the_next_ones_only_lack_their_mark(tmp_path: Path) -> None:
    """Removing the # before a key gives a recipe that says it."""
    tiny_checkpoint(tmp_path / "model")
    text = run("init", tmp_path / "model").stdout
    assert "# How many samples statistics are taken from.\n  num_samples: 128" in text
    (tmp_path / "r.yaml").write_text(text.replace("# max_perplexity_increase:", "max_perplexity_increase:"))
    assert load_recipe(tmp_path / "r.yaml").max_perplexity_increase == 0.05


def test_a_large_model_is_spread_over_the_nodes_that_are_described(tmp_path: Path) -> None:
    """The machine at hand does not matter then."""
    header_only_checkpoint(tmp_path / "model", "llama-3-70b")
    nodes = ("--nodes", 2, "--npus-per-node", 8, "--cpus-per-node", 160, "--memory-per-node", "896GiB")
    text = run("init", tmp_path / "model", *nodes).stdout
    parallel = yaml.safe_load(text)["parallel"]
    assert parallel["pipeline_parallel_size"] * parallel["data_parallel_size"] <= 16
    assert "on ascend" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{dir}/nowhere"], "is no directory"),
        (["{dir}/model", "--scheme", "w8b8"], "do you mean w8a8"),
        (["{dir}/model", "-w", "{dir}/there.yaml"], "is there already"),
        (["{dir}/empty"], "without config.json"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(tmp_path: Path, arguments: list[str], told: str) -> None:
    """The message says what to change."""
    tiny_checkpoint(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.yaml").write_text("kept")
    result = run("init", *(argument.format(dir=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert told in result.output
    assert (tmp_path / "there.yaml").read_text() == "kept"
