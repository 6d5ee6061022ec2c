"""A dense decoder converted without data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import random_tensors, save_checkpoint, tiny_checkpoint, tiny_config
from conversions import read_tensors, run_conversion, unpacked_int32, within_half_a_step

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.sources.directory import SourceDirectory
from gs_dist.errors import PolicyConflictError, UserError
from gs_dist.numbers.integer import INT8
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedLayer, QuantizedLinear
from gs_dist.solvers.affine import quantize_weight


@pytest.mark.parametrize("dialect", ["compressed-tensors", "ascend"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_have_the_bytes_of_a_job_without_smoothing(tmp_path: Path, dialect: str, dtype: str) -> None:
    """W8A8 per token writes what a calibrated job's codec writes of weights rounded to nearest."""
    model = tiny_checkpoint(tmp_path / "model", dtype=dtype, shards=2)
    found = read_tensors(run_conversion(model, tmp_path / "out", format=dialect)[dialect])
    reader = CheckpointReader(model)
    policy = QuantPolicy(act_quant_dtype="int8", act_quant_granularity="per_token")
    expected = dict(reader.read_outer())
    for layer in range(reader.architecture.num_layers):
        tensors = reader.read_layer(layer)
        linears = {}
        for linear in reader.architecture.linears(layer):
            weight = tensors.pop(f"{linear.name}.weight").astype(np.float32)
            codes, scale, _ = quantize_weight(weight, form=INT8, group_size=0, symmetric=True, scale_dtype=dtype)
            linears[linear.name] = QuantizedLinear(policy=policy, codes=codes, scale=scale)
        expected |= codec_of(dialect).encode_layer(
            QuantizedLayer(layer=layer, linears=linears, tensors=tensors), reader.architecture
        )
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("dialect", "scheme", "engine"),
    [
        ("compressed-tensors", "W8A8_DYNAMIC", "vllm"),
        ("compressed-tensors", "W8A16", "transformers"),
        ("compressed-tensors", "W4A16", "transformers"),
        ("ascend", "W8A8_DYNAMIC", "vllm-ascend"),
        ("ascend", "W8A16", "vllm-ascend"),
    ],
)
def test_the_checker_finds_nothing(tmp_path: Path, dialect: str, scheme: str, engine: str) -> None:
    """The rules of format and engine, written apart from the writer, hold for what was written."""
    model = tiny_checkpoint(tmp_path / "model", dtype="bfloat16")
    made = run_conversion(model, tmp_path / "out", format=dialect, scheme=scheme, group_size=32)
    report = check(made[dialect], engine)
    assert not report.problems, report.render(20)
    assert report.facts["linears"].startswith("14 ")


@pytest.mark.parametrize("dialect", ["compressed-tensors", "ascend"])
def test_a_head_of_its_own_is_kept_and_the_config_says_so(tmp_path: Path, dialect: str) -> None:
    """VLLM goes by the flag alone, and would serve the embedding in its place."""
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors({**config, "tie_word_embeddings": False})
    model = save_checkpoint(tmp_path / "model", config, tensors)
    published = run_conversion(model, tmp_path / "out", format=dialect, scheme="W8A8_DYNAMIC")[dialect]
    assert json.loads((published / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(read_tensors(published)["lm_head.weight"], tensors["lm_head.weight"])
    assert check(published).clean


@pytest.mark.parametrize("tied", [(True, True), (True, False), (False, True), (None, True), (True, None), (None, None)])
@pytest.mark.parametrize("prefix", ["language_model.", ""])
def test_a_wrappers_own_head_is_told_by_every_flag(
    tmp_path: Path, prefix: str, tied: tuple[bool | None, bool | None]
) -> None:
    """Outer and inner config may say different things of the head, or nothing; loaders differ on which one counts."""
    text = tiny_config(tie_word_embeddings=False)
    tensors = {f"{prefix}{name}": tensor for name, tensor in random_tensors(text).items()}
    tensors["visual.patch_embed.weight"] = np.ones((8, 8), np.float32)
    text.pop("tie_word_embeddings")
    outer, inner = tied
    config = {"model_type": "a_wrapper", "text_config": text, "vision_config": {"depth": 1}}
    for part, flag in ((config, outer), (text, inner)):
        if flag is not None:
            part["tie_word_embeddings"] = flag
    model = save_checkpoint(tmp_path / "model", config, tensors)
    published = run_conversion(model, tmp_path / "out", scheme="W8A8_DYNAMIC")["compressed-tensors"]
    found = json.loads((published / "config.json").read_text())
    assert found["tie_word_embeddings"] is False
    assert found["text_config"].get("tie_word_embeddings") is (None if inner is None else False)
    assert read_tensors(published)[f"{prefix}lm_head.weight"].tobytes() == tensors[f"{prefix}lm_head.weight"].tobytes()
    told = [note for note in SourceDirectory(model).notes if "lm_head.weight holds other values than" in note]
    assert len(told) == 1


@pytest.mark.parametrize("stored", [True, False])
def test_a_wrappers_tied_head_stays_tied(tmp_path: Path, stored: bool) -> None:
    """Whether a copy of the embedding is stored as head or none is, flags stay as they are."""
    text = tiny_config(tie_word_embeddings=True)
    tensors = {f"language_model.{name}": tensor for name, tensor in random_tensors(text).items()}
    if stored:
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].copy()
    model = save_checkpoint(tmp_path / "model", {"model_type": "a_wrapper", "text_config": text}, tensors)
    published = run_conversion(model, tmp_path / "out", scheme="W8A8_DYNAMIC")["compressed-tensors"]
    found = json.loads((published / "config.json").read_text())
    assert "tie_word_embeddings" not in found
    assert found["text_config"]["tie_word_embeddings"] is True


def test_groups_of_four_bits_are_within_half_a_step(tmp_path: Path) -> None:
    """W4A16: codes unpacked by the format's page, times their group's scale, are near the weight."""
    model = tiny_checkpoint(tmp_path / "model", dtype="bfloat16")
    made = run_conversion(model, tmp_path / "out", scheme="W4A16", group_size=32)
    found, source = read_tensors(made["compressed-tensors"]), CheckpointReader(model)
    name = "model.layers.1.mlp.down_proj"
    rows, columns = found[f"{name}.weight_shape"].tolist()
    codes = unpacked_int32(found[f"{name}.weight_packed"], 4, columns).reshape(rows, -1, 32)
    step = found[f"{name}.weight_scale"].astype(np.float64)[:, :, None]
    weight = source.read([f"{name}.weight"])[f"{name}.weight"].astype(np.float64).reshape(rows, -1, 32)
    assert within_half_a_step(codes * step, weight, step)


def test_two_formats_come_of_one_reading(tmp_path: Path) -> None:
    """Formats named together are what they are alone."""
    model = tiny_checkpoint(tmp_path / "model", dtype="bfloat16")
    both = run_conversion(model, tmp_path / "both", format=["ascend", "compressed-tensors"])
    for name in both:
        alone = read_tensors(run_conversion(model, tmp_path / name, format=name)[name])
        together = read_tensors(both[name])
        assert {key: array.tobytes() for key, array in alone.items()} == {
            key: array.tobytes() for key, array in together.items()
        }


def test_patterns_overrule_the_presets(tmp_path: Path) -> None:
    """A null entry keeps a linear in floats, and both files that describe a model say so."""
    model = tiny_checkpoint(tmp_path / "model", dtype="bfloat16")
    made = run_conversion(
        model, tmp_path / "out", format=["ascend", "compressed-tensors"], layer_policies={r".*1\.mlp\.down_proj": None}
    )
    description = json.loads((made["ascend"] / "quant_model_description.json").read_text())
    assert description["model.layers.1.mlp.down_proj.weight"] == "FLOAT"
    assert description["model.layers.0.mlp.down_proj.weight"] == "W8A8_DYNAMIC"
    config = json.loads((made["compressed-tensors"] / "config.json").read_text())
    assert "model.layers.1.mlp.down_proj" in config["quantization_config"]["ignore"]
    assert not check(made["compressed-tensors"]).problems


@pytest.mark.parametrize(
    ("policies", "error", "said"),
    [
        ({".*nothing": None}, UserError, "matches no linear"),
        ({".*q_proj": None}, UserError, "engines fuse the two into one"),
        ({".*q_proj": None, ".*self_attn.*": None}, PolicyConflictError, "conflict"),
        ({".*down_proj": "W9A9"}, UserError, "not a scheme"),
        ({".*": None}, UserError, "no linear would be quantised"),
    ],
)
def test_policies_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, policies: dict[str, str | None], error: type[Exception], said: str
) -> None:
    """The message says what to change, and there is no output."""
    model = tiny_checkpoint(tmp_path / "model")
    with pytest.raises(error, match=said):
        run_conversion(model, tmp_path / "out", layer_policies=policies)
    assert not (tmp_path / "out").exists()


def test_a_group_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    """The message names the linear and its channels."""
    model = tiny_checkpoint(tmp_path / "model")
    with pytest.raises(UserError, match="do not divide into groups of 128"):
        run_conversion(model, tmp_path / "out", scheme="W4A16")


def test_four_bits_for_dense_linears_are_refused_for_vllm_ascend(tmp_path: Path) -> None:
    """What the engine dropped is said before the work, with what to choose instead."""
    model = tiny_checkpoint(tmp_path / "model")
    with pytest.raises(UserError, match="vLLM-Ascend's main loads no linears outside of experts in W4A16: give them"):
        run_conversion(model, tmp_path / "out", scheme="W4A16", group_size=32, format="ascend")
