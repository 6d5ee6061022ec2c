"""Small floats as number formats of the result: stored forms, descriptions, and values decoded independently."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import tiny_checkpoint
from conversions import Array, family_checkpoint, read_file, read_tensors, run_conversion

from gs_dist.errors import UserError

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decoded(found: dict[str, Array], name: str) -> Array:
    """Float64 values of a converted linear by the pages of the formats."""
    scale = found[f"{name}.weight_scale"]
    stored = found.get(f"{name}.weight", found.get(f"{name}.weight_packed"))
    assert stored is not None
    if stored.dtype == np.uint8:
        values = np.stack([E2M1[stored & 15], E2M1[stored >> 4]], axis=-1).reshape(len(stored), -1)
    else:
        assert stored.dtype == ml_dtypes.float8_e4m3fn
        values = stored.astype(np.float64)
    if scale.dtype == np.uint8:
        assert scale.shape == (len(values), values.shape[1] // 32)
        return np.asarray(values * np.repeat(2.0 ** (scale.astype(np.float64) - 127), 32, axis=1))
    spread = scale.astype(np.float64)
    if scale.shape != (len(values), 1):
        spread = np.kron(spread, np.ones((128, 128)))[: len(values), : values.shape[1]]
    return np.asarray(values * spread)


CASES = [
    ("ascend", "W8A8FP8_DYNAMIC", 2**-4),
    ("ascend", "W8A8_MXFP8", 2**-4),
    ("ascend", "W4A8_MXFP", 0.5),
    ("ascend", "W4A4_MXFP4", 0.5),
    ("compressed-tensors", "W8A8FP8_DYNAMIC", 2**-4),
    ("compressed-tensors", "FP8_BLOCK", 2**-4),
    ("compressed-tensors", "W8A8_MXFP8", 2**-4),
    ("compressed-tensors", "W4A4_MXFP4", 0.5),
    ("compressed-tensors", "W4A16_MXFP4", 0.5),
]


@pytest.mark.parametrize(("dialect", "scheme", "bound"), CASES)
def test_stored_values_are_near_the_weights(tmp_path: Path, dialect: str, scheme: str, bound: float) -> None:
    """Every large value within the format's relative step, and as a whole within half of that."""
    model = tiny_checkpoint(tmp_path / "model", dtype="bfloat16", hidden_size=256, intermediate_size=320)
    source = read_file(model / "model.safetensors")
    made = run_conversion(model, tmp_path / "out", format=dialect, scheme=scheme)[dialect]
    found = read_tensors(made)
    for name in [name.removesuffix(".weight_scale") for name in found if name.endswith(".weight_scale")]:
        weight = source[f"{name}.weight"].astype(np.float64)
        values = decoded(found, name)
        assert values.shape == weight.shape
        large = np.abs(weight) > np.abs(weight).max() / 4
        assert (np.abs(values - weight)[large] <= bound * np.abs(weight)[large]).all()
        assert np.square(values - weight).sum() <= (bound / 2) ** 2 * np.square(weight).sum()
    if dialect == "ascend":
        description = json.loads((made / "quant_model_description.json").read_text())
        assert description["model.layers.0.mlp.up_proj.weight"] == scheme
        assert description["group_size"] == (32 if "MXFP" in scheme else 0)
    else:
        group = json.loads((made / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        assert group["weights"]["type"] == "float"


def test_experts_of_a_mixture_take_microscaling_too(tmp_path: Path) -> None:
    """gpt-oss in floats becomes MXFP4 experts one by one, each near its weight."""
    model, tensors = family_checkpoint(tmp_path / "model", "gpt_oss")
    found = read_tensors(run_conversion(model, tmp_path / "out", scheme="W4A16_MXFP4")["compressed-tensors"])
    gate_up = tensors["model.layers.0.mlp.experts.gate_up_proj"][2].T.astype(np.float64)
    for part, weight in (("gate_proj", gate_up[0::2]), ("up_proj", gate_up[1::2])):
        values = decoded(found, f"model.layers.0.mlp.experts.2.{part}")
        assert np.square(values - weight).sum() <= 0.03 * np.square(weight).sum()


def test_schemes_that_an_engine_cannot_hold_together_are_refused(tmp_path: Path) -> None:
    """vLLM-Ascend has one group size for all of a description."""
    model, _ = family_checkpoint(tmp_path / "model", "qwen3_moe")
    with pytest.raises(UserError, match="W4A8_DYNAMIC only without groups and W8A8_MXFP8 only with"):
        run_conversion(
            model,
            tmp_path / "out",
            format="ascend",
            scheme="W4A8_DYNAMIC",
            layer_policies={r".*self_attn\..*": "W8A8_MXFP8"},
        )


def test_inputs_that_are_no_multiple_of_a_microscaling_block_are_refused(tmp_path: Path) -> None:
    """With the linear's name and channels."""
    model = tiny_checkpoint(tmp_path / "model", dtype="bfloat16", intermediate_size=144)
    with pytest.raises(
        UserError, match=r"down_proj and 1 more: has 144 input channels, which do not divide into micro"
    ):
        run_conversion(model, tmp_path / "out", scheme="W8A8_MXFP8")
