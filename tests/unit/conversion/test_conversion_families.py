"""Families of models converted under the names that transformers 5.17 writes, and decoded independently."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_checkpoint
from conversions import (
    Array,
    expert_matrices,
    family_checkpoint,
    family_names,
    paired_rows,
    read_tensors,
    run_conversion,
    within_half_a_step,
)

from gs_dist.conversion.config import ConversionConfig
from gs_dist.conversion.plan import plan_conversion

QUANTIZED = {
    "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen3_next": {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "in_proj_qkvz",
        "out_proj",
    },
    "qwen3_5_moe": {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("in_proj_qkv", "in_proj_z", "out_proj"),
    },
    "deepseek_v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "glm4_moe": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"},
    "gpt_oss": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gemma3_text": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen3_vl": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen3_vl_moe": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}


def weights_of(family: str, tensors: dict[str, Array]) -> dict[str, Array]:
    """Weight (out, in) of every linear by name, as the model's own code takes experts apart."""
    fused_by_inputs = family == "gpt_oss"
    return expert_matrices(tensors, interleaved=fused_by_inputs, by_inputs=fused_by_inputs)


@pytest.mark.parametrize("dialect", ["ascend", "compressed-tensors"])
@pytest.mark.parametrize("family", family_names())
def test_every_dequantized_weight_is_within_half_a_step_and_everything_else_is_as_it_was(
    tmp_path: Path, family: str, dialect: str
) -> None:
    """Experts are published one by one; routers, gates, embeddings, convolutions and towers keep their bytes."""
    model, tensors = family_checkpoint(tmp_path / "model", family)
    found = read_tensors(run_conversion(model, tmp_path / "out", format=dialect)[dialect])
    weights = weights_of(family, tensors)
    left = dict(found)
    for name, weight in weights.items():
        if f"{name}.weight_scale" not in found:
            assert left.pop(f"{name}.weight").tobytes() == weight.tobytes(), name
            continue
        assert name.rpartition(".")[2] in QUANTIZED[family], name
        step = left.pop(f"{name}.weight_scale").astype(np.float64)
        codes = left.pop(f"{name}.weight").astype(np.float64)
        if dialect == "ascend":
            assert not left.pop(f"{name}.weight_offset").astype(np.float64).any()
        assert within_half_a_step(codes * step, weight.astype(np.float64), step), name
    quantized = {name.removesuffix(".weight_scale").rpartition(".")[2] for name in found if name.endswith("_scale")}
    assert quantized == QUANTIZED[family]
    others = {name: values for name, values in tensors.items() if name.removesuffix(".weight") not in weights}
    others = {name: values for name, values in others.items() if not (".experts." in name and values.ndim == 3)}
    biases = {name for name in others if name.endswith("_proj_bias")}
    for name in biases:
        values, stem, down = others.pop(name), name.rpartition(".")[0], "down" in name
        for number, row in enumerate(values):
            parts = {"down_proj": row} if down else {"gate_proj": row[0::2], "up_proj": row[1::2]}
            for part, bias in parts.items():
                assert left.pop(f"{stem}.{number}.{part}.bias").tobytes() == bias.tobytes()
    assert {name: values.tobytes() for name, values in left.items()} == {
        name: values.tobytes() for name, values in others.items()
    }


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "qwen3_vl_moe"])
def test_four_bit_experts_multiply_as_the_engines_kernel_does(tmp_path: Path, family: str) -> None:
    """W4A8 for vLLM-Ascend: the product of halved activations with `scale_bias` is the float product of the codes.

    The kernel takes an int8 activation apart into 16 h + l with l from 0 to 15, multiplies h and l - 8, which are both
    int4, and adds scale_bias for the missing 8; a rank of tensor parallelism adds up its columns of scale_bias.
    """
    model, tensors = family_checkpoint(tmp_path / "model", family)
    made = run_conversion(model, tmp_path / "out", format="ascend", scheme="W4A8_DYNAMIC")["ascend"]
    found = read_tensors(made)
    description = json.loads((made / "quant_model_description.json").read_text())
    rng = np.random.default_rng(1)
    experts = {name: weight for name, weight in weights_of(family, tensors).items() if ".experts." in name}
    assert experts
    for name, weight in experts.items():
        assert description[f"{name}.weight"] == "W4A8_DYNAMIC"
        assert found[f"{name}.weight"].shape == (len(weight) // 2, weight.shape[1])
        codes = paired_rows(found[f"{name}.weight"])
        step = found[f"{name}.weight_scale"].astype(np.float64)
        assert found[f"{name}.weight_scale"].dtype == np.float32
        assert within_half_a_step(codes * step, weight.astype(np.float64), step * 1.0)
        x = rng.integers(-128, 128, weight.shape[1])
        high, low = x >> 4, (x & 15) - 8
        spread = name.endswith(("down_proj", "w2"))
        bias = found[f"{name}.scale_bias"].astype(np.float64)
        assert bias.shape == (len(weight), 16 if spread else 1)
        product = (codes @ (16 * high + low)) * step[:, 0] + bias.sum(axis=1)
        np.testing.assert_allclose(product, (codes @ x) * step[:, 0], rtol=0, atol=1e-6 * np.abs(product).max())
        if spread:  # each of two ranks has half of the inputs and half of the columns
            half = weight.shape[1] // 2
            first = (codes[:, :half] @ (16 * high + low)[:half]) * step[:, 0] + bias[:, :8].sum(axis=1)
            np.testing.assert_allclose(first, (codes[:, :half] @ x[:half]) * step[:, 0], rtol=0, atol=1e-5)
    dense = [name for name in found if name.endswith(("q_proj.weight", "o_proj.weight"))]
    assert {description[name] for name in dense} == {"W8A8_DYNAMIC"}


def test_a_family_never_heard_of_gets_the_usual_linears_and_is_told_so(tmp_path: Path) -> None:
    """A linear of an unusual name stays in floats unless a pattern names it."""
    from gs_dist.conversion.config import ConversionConfig
    from gs_dist.conversion.plan import plan_conversion

    model, _ = family_checkpoint(tmp_path / "model", "qwen3_next")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "novel"}))
    settings = {"model": str(model), "output": str(tmp_path / "out")}
    plan = plan_conversion(ConversionConfig.model_validate(settings))
    assert any("model type novel is not known" in note for note in plan.notes)
    assert plan.assignment.schemes["model.layers.0.linear_attn.in_proj_qkvz"] is None
    assert plan.assignment.schemes["model.layers.1.self_attn.q_proj"] is not None
    named = ConversionConfig.model_validate({**settings, "layer_policies": {".*in_proj_qkvz": "W8A8_DYNAMIC"}})
    assert plan_conversion(named).assignment.schemes["model.layers.0.linear_attn.in_proj_qkvz"] is not None


def test_layers_beyond_the_models_are_multi_token_prediction_and_stay(tmp_path: Path) -> None:
    """DeepSeek and GLM keep their extra layer under the number after the last."""
    model, _ = family_checkpoint(tmp_path / "model", "glm4_moe")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    found = read_tensors(run_conversion(model, tmp_path / "out")["compressed-tensors"])
    assert "model.layers.0.self_attn.q_proj.weight_scale" in found
    assert not any(name.startswith("model.layers.1.") and name.endswith("_scale") for name in found)


def test_a_tensor_of_three_dimensions_that_is_no_expert_is_told_of_and_stays(tmp_path: Path) -> None:
    """A convolution is expected to have three, and is not worth a word."""
    model, tensors = family_checkpoint(tmp_path / "model", "qwen3_moe")
    odd = {f"model.layers.0.{name}": np.ones((4, 5, 6), np.float32) for name in ("blend.mixing", "linear_attn.conv1d")}
    config = json.loads((model / "config.json").read_text())
    save_checkpoint(model, config, {**tensors, **{f"{name}.weight": values for name, values in odd.items()}}, shards=2)
    settings = {"model": str(model), "output": str(tmp_path / "out")}
    notes = plan_conversion(ConversionConfig.model_validate(settings)).notes
    assert [note for note in notes if "more than two dimensions" in note] == [
        "no experts by name, and carried over as they are: 1 tensor of more than two dimensions, such as "
        "model.layers.0.blend.mixing.weight (4, 5, 6); to have linears quantised, publish them one by one"
    ]
    found = read_tensors(run_conversion(model, tmp_path / "out")["compressed-tensors"])
    assert found["model.layers.0.blend.mixing.weight"].shape == (4, 5, 6)
