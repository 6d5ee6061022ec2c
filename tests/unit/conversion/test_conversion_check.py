"""`gs-dist check` of converted directories: by their own description, and against versions of engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_safetensors, tiny_checkpoint
from conversions import family_checkpoint, family_names, read_file, run_conversion

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.engines import require_known
from gs_dist.checkpoint.engines.kinds import kinds_of
from gs_dist.errors import UserError


def rules(directory: Path, engine: str | None = None) -> set[str]:
    """Rules that a directory breaks."""
    return {problem.rule for problem in check(directory, engine).problems}


def change(directory: Path, name: str, value: np.ndarray | None) -> None:
    """Replaces a tensor in the one file of a directory, or takes it out; its hash is forgotten."""
    (directory / "provenance.json").unlink(missing_ok=True)
    shutil.rmtree(directory.parent / "manifests")
    file = directory / "model-00001-of-00001.safetensors"
    tensors = dict(read_file(file))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    before = tensors.pop(name)
    index["metadata"]["total_size"] -= before.nbytes
    if value is None:
        del index["weight_map"][name]
    else:
        tensors[name] = value
        index["metadata"]["total_size"] += value.nbytes
    save_safetensors(file, tensors)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", "W4A8_DYNAMIC"])
@pytest.mark.parametrize("family", family_names())
def test_converted_families_break_no_rule(tmp_path: Path, family: str, scheme: str) -> None:
    """Written from the formats' pages, apart from the writer; in both dialects."""
    model, _ = family_checkpoint(tmp_path / "model", family)
    made = run_conversion(model, tmp_path / "out", format=["ascend", "compressed-tensors"], scheme=scheme)
    for directory in made.values():
        report = check(directory, "vllm-ascend" if directory.name == "ascend" else None)
        assert not report.problems, report.render(10)


@pytest.mark.parametrize("dialect", ["ascend", "compressed-tensors"])
@pytest.mark.parametrize("scheme", ["W8A8FP8_DYNAMIC", "W8A8_MXFP8", "W4A4_MXFP4"])
def test_small_floats_break_no_rule(tmp_path: Path, dialect: str, scheme: str) -> None:
    """In a dense model of a type that is served."""
    model = tiny_checkpoint(tmp_path / "model", dtype="bfloat16")
    made = run_conversion(model, tmp_path / "out", format=dialect, scheme=scheme)[dialect]
    report = check(made, "vllm-ascend" if dialect == "ascend" else None)
    assert not report.problems, report.render(10)


def test_faults_of_an_ascend_directory_are_found(tmp_path: Path) -> None:
    """A scale that is gone, a scale_bias that is another's, an offset that is not zero, a label without tensor."""
    model, _ = family_checkpoint(tmp_path / "model", "qwen3_moe")
    expert = "model.layers.0.mlp.experts.1.down_proj"

    def fresh(name: str) -> Path:
        return run_conversion(model, tmp_path / name, format="ascend", scheme="W4A8_DYNAMIC")["ascend"]

    directory = fresh("scale")
    change(directory, f"{expert}.weight_scale", None)
    assert rules(directory) == {"tensor-present", "description-extra"}
    directory = fresh("bias")
    bias = read_file(directory / "model-00001-of-00001.safetensors")[f"{expert}.scale_bias"]
    change(directory, f"{expert}.scale_bias", bias[::-1].copy())
    assert rules(directory) == {"scale-bias"}
    directory = fresh("offset")
    change(directory, "model.layers.0.self_attn.q_proj.weight_offset", np.ones((128, 1), np.float32))
    assert rules(directory) == {"offset-zero"}
    directory = fresh("label")
    description = json.loads((directory / "quant_model_description.json").read_text())
    description["model.layers.0.self_attn.q_proj.weight"] = "W5A5"
    (directory / "quant_model_description.json").write_text(json.dumps(description))
    assert "description-label" in rules(directory)


def test_faults_of_a_compressed_tensors_directory_are_found(tmp_path: Path) -> None:
    """A scale that is gone, and a linear that no group takes although it has one."""
    model, _ = family_checkpoint(tmp_path / "model", "deepseek_v3")
    made = run_conversion(model, tmp_path / "out")["compressed-tensors"]
    change(made, "model.layers.1.mlp.experts.3.down_proj.weight_scale", None)
    assert rules(made) == {"tensor-present"}
    made = run_conversion(model, tmp_path / "other")["compressed-tensors"]
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"]["ignore"].append(r"re:.*experts.*down_proj$")
    (made / "config.json").write_text(json.dumps(config))
    assert {"tensor-dtype", "tensor-expected"} <= rules(made)
    for pattern in ("re:(.*.*)*#", "re:(?!model)"):  # one that `re` never ends, and one that is not tried
        config["quantization_config"]["ignore"][-1] = pattern
        (made / "config.json").write_text(json.dumps(config))
        assert ("config-groups" in rules(made)) is (pattern == "re:(?!model)")


@pytest.mark.parametrize(
    ("engine", "kind", "expert", "loads"),
    [
        ("vllm-ascend==0.23", "W4A8_DYNAMIC", False, True),
        ("vllm-ascend", "W4A8_DYNAMIC", False, False),
        ("vllm-ascend==main", "W8A8_MIX", True, False),
        ("vllm-ascend==0.18.0", "W4A4_MXFP4", False, False),
        ("vllm-ascend==0.23.0", "W4A4_MXFP4", False, True),
        ("sglang", "W8A16", False, False),
        ("sglang", "W4A8_DYNAMIC", True, True),
        ("xllm", "W8A8_MXFP8", False, False),
    ],
)
def test_versions_of_engines_load_what_their_registries_name(engine: str, kind: str, expert: bool, loads: bool) -> None:
    """The names that a release registers; a name without version is the newest."""
    kinds = kinds_of(engine)
    assert kinds is not None
    assert (kinds.refusal(kind, expert=expert) is None) == loads


def test_an_unknown_version_is_refused_with_those_that_are_known() -> None:
    """Nothing is guessed."""
    with pytest.raises(UserError, match=r"known versions of vllm-ascend are 0\.18\.0, 0\.23\.0, main"):
        kinds_of("vllm-ascend==0.9")
    assert kinds_of("vllm==0.32") is None
    with pytest.raises(UserError, match=r"known versions of vllm are 0\.32\.0"):
        require_known("vllm==0.9")
    require_known("vllm==0.32")


def test_what_an_engine_dropped_is_said_before_the_work_and_by_the_check(tmp_path: Path) -> None:
    """SGLang has no W8A16; the conversion writes nothing, and a directory that is there is told of."""
    model = tiny_checkpoint(tmp_path / "model", dtype="bfloat16")
    with pytest.raises(UserError, match=r"sglang 0\.5\.23 loads no linears outside of experts in W8A16: give them"):
        run_conversion(model, tmp_path / "out", format="ascend", scheme="W8A16", engine="sglang")
    assert not (tmp_path / "out").exists()
    made = run_conversion(model, tmp_path / "out", format="ascend", scheme="W8A16")["ascend"]
    assert not check(made, "vllm-ascend").problems
    assert rules(made, "sglang") == {"engine-kind"}
