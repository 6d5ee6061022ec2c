"""`gs-dist check OUT --model SOURCE` of converted directories of any model type and number format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_checkpoint
from conversions import family_checkpoint, family_names, run_conversion
from safetensors.numpy import load_file, save_file

from gs_dist.checkpoint.check import check


@pytest.mark.parametrize("family", family_names())
def test_a_converted_family_is_its_sources_rounding_and_no_other_models(tmp_path: Path, family: str) -> None:
    """Fused experts and what stays too; another source is told by linears and by tensors that stay."""
    model, _ = family_checkpoint(tmp_path / "model", family)
    made = run_conversion(model, tmp_path / "out", format=["ascend", "compressed-tensors"], scheme="W4A8_DYNAMIC")
    other, _ = family_checkpoint(tmp_path / "other", family, seed=1)
    for directory in made.values():
        report = check(directory, model=model)
        assert report.clean, report.render()
        assert "largest loss of a weight's energy" in report.facts["source"]
        found = {problem.rule for problem in check(directory, model=other).problems}
        assert found >= {"source-weight", "source-tensor"}, found


@pytest.mark.parametrize(
    ("dialect", "scheme"),
    [
        ("compressed-tensors", "W4A16"),
        ("compressed-tensors", "FP8_BLOCK"),
        ("compressed-tensors", "W4A4_MXFP4"),
        ("ascend", "W8A8FP8_DYNAMIC"),
        ("compressed-tensors", "W8A8_MXFP8"),
    ],
)
def test_every_number_format_is_turned_back(tmp_path: Path, dialect: str, scheme: str) -> None:
    """Of a model type never heard of, with one value that is another's."""
    model, tensors = family_checkpoint(tmp_path / "model", "qwen3_moe")
    config = json.loads((model / "config.json").read_text()) | {"model_type": "unheard_of"}
    save_checkpoint(model, config, tensors)
    settings = {"group_size": 32} if scheme == "W4A16" else {}
    made = run_conversion(model, tmp_path / "out", format=dialect, scheme=scheme, **settings)[dialect]
    report = check(made, model=model)
    assert report.clean, report.render()
    changed = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[changed] = np.asarray(-tensors[changed])
    tensors["model.norm.weight"] = np.asarray(tensors["model.norm.weight"] + 1)
    save_checkpoint(model, config, tensors)
    told = {(problem.rule, problem.tensor.rpartition(".")[0]) for problem in check(made, model=model).problems}
    assert told == {("source-weight", changed.rpartition(".")[0]), ("source-tensor", "model.norm")}


def test_experts_that_stayed_in_one_tensor_are_compared(tmp_path: Path) -> None:
    """Kept by a pattern, a fused tensor has the source's bytes."""
    model, tensors = family_checkpoint(tmp_path / "model", "gpt_oss")
    made = run_conversion(model, tmp_path / "out", layer_policies={r".*\.experts\..*": None})["compressed-tensors"]
    assert check(made, model=model).clean
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name][3, 0, 0] += 1
    save_checkpoint(model, json.loads((model / "config.json").read_text()), tensors, shards=2)
    told = [(problem.rule, problem.tensor) for problem in check(made, model=model).problems]
    assert told == [("source-tensor", name)]


@pytest.mark.parametrize(("dialect", "scheme"), [("compressed-tensors", "W4A16"), ("ascend", "W8A8_DYNAMIC")])
@pytest.mark.parametrize("lost", ["weight_scale", "codes"])
def test_a_linear_that_lacks_a_tensor_is_told_of(tmp_path: Path, dialect: str, scheme: str, lost: str) -> None:
    """What cannot be turned back is a problem like others, and the comparison goes on."""
    model, _ = family_checkpoint(tmp_path / "model", "qwen3_moe")
    settings = {"group_size": 32} if scheme == "W4A16" else {}
    made = run_conversion(model, tmp_path / "out", format=dialect, scheme=scheme, **settings)[dialect]
    config = json.loads((made / "config.json").read_text()) | {"model_type": "unheard_of"}
    (made / "config.json").write_text(json.dumps(config))
    codes = "weight_packed" if scheme == "W4A16" else "weight"
    name = f"model.layers.1.self_attn.q_proj.{codes if lost == 'codes' else lost}"
    index = json.loads((made / "model.safetensors.index.json").read_text())
    shard = made / index["weight_map"][name]
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    report = check(made, model=model)
    assert any(name.rpartition(".")[0] in problem.tensor for problem in report.problems), report.render()
    assert "largest loss of a weight's energy" in report.facts["source"]


def test_a_source_of_other_sizes_is_no_source(tmp_path: Path) -> None:
    """Told by the shapes of linears, where no network says which there may be."""
    model, tensors = family_checkpoint(tmp_path / "model", "qwen3_moe")
    made = run_conversion(model, tmp_path / "out", format="ascend", scheme="W8A8_DYNAMIC")["ascend"]
    for directory in (model, made):
        config = json.loads((directory / "config.json").read_text()) | {"model_type": "unheard_of"}
        (directory / "config.json").write_text(json.dumps(config))
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = np.asarray(tensors[name][:-2])
    save_checkpoint(model, json.loads((model / "config.json").read_text()), tensors)
    told = [(p.rule, p.tensor) for p in check(made, model=model).problems if p.rule.startswith("source")]
    assert told == [("source-weight", name)]
