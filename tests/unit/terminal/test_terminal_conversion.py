"""`gs-dist convert`, and recipes with `mode: convert`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conversions import family_checkpoint
from typer.testing import CliRunner, Result

from gs_dist.terminal.cli import app


def run(*arguments: str) -> Result:
    """A command in this process."""
    return CliRunner().invoke(app, list(arguments))


def test_a_conversion_says_what_it_will_do_and_where_the_model_is(tmp_path: Path) -> None:
    """Counts of schemes and reasons, memory of a worker, the directory."""
    model, _ = family_checkpoint(tmp_path / "model", "qwen3_moe")
    done = run("convert", str(model), "-o", str(tmp_path / "out"), "--format", "ascend", "--workers", "1")
    assert done.exit_code == 0, done.output
    assert "32 W8A8_DYNAMIC" in done.output
    assert "2 linears, router of a mixture" in done.output
    assert "MiB each" in done.output
    assert f"model: {tmp_path / 'out' / 'ascend'}" in done.output
    assert run("check", str(tmp_path / "out"), "--for", "vllm-ascend==0.23").exit_code == 0
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.startswith("<!doctype html>")
    assert "W8-perchannel-A8-pertoken" in report


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    """The plan alone."""
    model, _ = family_checkpoint(tmp_path / "model", "mixtral")
    done = run("convert", str(model), "-o", str(tmp_path / "out"), "--dry-run")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_recipe_may_ask_for_a_conversion(tmp_path: Path, command: str) -> None:
    """With overrides, and planned by `gs-dist plan`."""
    model, _ = family_checkpoint(tmp_path / "model", "deepseek_v3")
    recipe = tmp_path / "recipe.yaml"
    settings = {"mode": "convert", "model": str(model), "output": str(tmp_path / "out"), "workers": 1}
    recipe.write_text(yaml.safe_dump({**settings, "layer_policies": {".*kv_b_proj": "W8A8_DYNAMIC"}}))
    planned = run("plan", str(recipe))
    assert planned.exit_code == 0, planned.output
    assert not (tmp_path / "out").exists()
    done = run(command, str(recipe), "format=ascend")
    assert done.exit_code == 0, done.output
    description = json.loads((tmp_path / "out" / "ascend" / "quant_model_description.json").read_text())
    assert description["model.layers.0.self_attn.kv_b_proj.weight"] == "W8A8_DYNAMIC"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme", "W8A9"], "do you mean W8A16?"),
        (["schem=W8A16"], "schem: found an unknown key; write scheme"),
        (["format=golden-stick"], "write one or more of compressed-tensors, ascend"),
        (["--format", "ascend", "--scheme", "W4A16"], "vLLM-Ascend's main loads no"),
        (["--for", "vllm-ascend==0.9"], "known versions of vllm-ascend are"),
        (["layer_policies={'.*nothing': null}"], "matches no linear of the model"),
        (["memory_per_worker=1MiB"], "memory_per_worker is 1.0 MiB: set memory_per_worker to"),
    ],
)
def test_mistakes_end_with_exit_code_2_and_what_to_write(tmp_path: Path, arguments: list[str], said: str) -> None:
    """Before anything is written."""
    model, _ = family_checkpoint(tmp_path / "model", "qwen3_moe")
    done = run("convert", str(model), "-o", str(tmp_path / "out"), *arguments)
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert not (tmp_path / "out").exists()


def test_an_output_must_be_named_and_lie_outside_of_the_model(tmp_path: Path) -> None:
    """Both are said with what to give."""
    model, _ = family_checkpoint(tmp_path / "model", "qwen3_moe")
    assert "give -o DIRECTORY" in run("convert", str(model)).output
    inside = run("convert", str(model), "-o", str(model / "out"))
    assert inside.exit_code == 2
    assert "write a directory of its own, outside the model's" in inside.output


def test_keys_of_a_conversion_are_explained() -> None:
    """`gs-dist recipe convert`."""
    done = run("recipe", "convert")
    assert done.exit_code == 0
    assert "layer_policies" in done.output
    assert "vllm-ascend==0.23" in done.output
