"""Checkpoints that are quantised already, decoded while they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import random_tensors, save_checkpoint, save_safetensors, tiny_config
from conversions import (
    Array,
    family_checkpoint,
    read_file,
    read_tensors,
    run_conversion,
    unpacked_int32,
    within_half_a_step,
)

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.sources.fp8_block import decode_e4m3
from gs_dist.conversion.config import ConversionConfig
from gs_dist.conversion.plan import plan_conversion
from gs_dist.errors import CheckpointError

BLOCK = 24  # divides neither 64 nor 96 outputs or inputs: blocks at the edges are cut short


def fp8_values(codes: Array, scale: Array) -> Array:
    """Float64 values of E4M3 codes, each times its block's scale, an independent way."""
    rows, columns = codes.shape
    spread = np.kron(scale.astype(np.float64), np.ones((BLOCK, BLOCK)))[:rows, :columns]
    return codes.astype(np.float64) * spread


def fp8_checkpoint(directory: Path, **config: Any) -> tuple[Path, dict[str, Array]]:
    """DeepSeek-V3's names, every linear of the layers but the router in FP8; and the linears' values."""
    rng = np.random.default_rng(3)
    _, floats = family_checkpoint(directory / "floats", "deepseek_v3")
    tensors, values = {}, {}
    for name, weight in floats.items():
        if weight.ndim != 2 or ".layers." not in name or name.endswith("mlp.gate.weight"):
            tensors[name] = weight
            continue
        codes = rng.integers(0, 256, weight.shape).astype(np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0
        blocks = tuple(-(-size // BLOCK) for size in weight.shape)
        scale = rng.uniform(1e-4, 1e-3, blocks).astype(np.float32)
        tensors[name] = codes.view(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        values[name.removesuffix(".weight")] = fp8_values(tensors[name], scale)
    stated = json.loads((directory / "floats" / "config.json").read_text())
    stated["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        **config,
    }
    return save_checkpoint(directory / "model", stated, tensors, shards=3), values


def test_every_e4m3_code_decodes_to_what_ml_dtypes_says() -> None:
    """Subnormals and signed zeros too; the two NaN codes are looked for elsewhere."""
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], dtype=np.uint8)
    target, scratch = np.empty(codes.shape, dtype=np.float32), np.empty(codes.shape, dtype=np.int32)
    decode_e4m3(codes, scratch, target)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert target.tobytes() == expected.tobytes()


def test_fp8_blocks_are_decoded_and_quantized(tmp_path: Path) -> None:
    """What is quantised is within half a step of code x scale; what stays is that product in bfloat16, bit for bit."""
    model, values = fp8_checkpoint(tmp_path)
    made = run_conversion(model, tmp_path / "out", format="ascend")["ascend"]
    found = read_tensors(made)
    kept = 0
    for name, weight in values.items():
        if f"{name}.weight_scale" in found:
            step = found[f"{name}.weight_scale"].astype(np.float64)
            assert within_half_a_step(found[f"{name}.weight"].astype(np.float64) * step, weight, step), name
            continue
        expected = weight.astype(np.float32).astype(ml_dtypes.bfloat16)
        assert found[f"{name}.weight"].tobytes() == expected.tobytes(), name
        kept += 1
    assert kept == 2  # kv_b_proj of both layers
    assert not any(name.endswith("_scale_inv") for name in found)
    assert "quantization_config" not in json.loads((made / "config.json").read_text())


def test_scales_of_powers_of_two_in_one_byte_are_read_too(tmp_path: Path) -> None:
    """DeepSeek-V3.1's `scale_fmt` ue8m0, kept as float8_e8m0fnu."""
    model, _ = fp8_checkpoint(tmp_path / "a")
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= read_file(file)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e8m0fnu)
    config = json.loads((model / "config.json").read_text())
    save_checkpoint(tmp_path / "b", config, tensors)
    found = read_tensors(run_conversion(tmp_path / "b", tmp_path / "out")["compressed-tensors"])
    name = "model.layers.1.mlp.experts.2.up_proj"
    weight = fp8_values(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"])
    step = found[f"{name}.weight_scale"].astype(np.float64)
    assert within_half_a_step(found[f"{name}.weight"].astype(np.float64) * step, weight, step)


def test_an_fp8_weight_without_its_scales_is_refused(tmp_path: Path) -> None:
    """The message names weight, file and what is missing; nothing is written."""
    model, _ = fp8_checkpoint(tmp_path)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    lost = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    file = model / index["weight_map"].pop(lost)
    kept = {name: values for name, values in read_file(file).items() if name != lost}
    save_safetensors(file, kept)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"o_proj\.weight' is FP8 and its scales weight_scale_inv \(3, 6\)"):
        run_conversion(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fp8_without_blocks_is_refused(tmp_path: Path) -> None:
    """One scale a tensor is another encoding."""
    model, _ = fp8_checkpoint(tmp_path, weight_block_size=None)
    with pytest.raises(CheckpointError, match="weight_block_size is None"):
        run_conversion(model, tmp_path / "out")


def test_fp8_nan_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    """A code that stands for NaN ends the conversion; there is no model."""
    model, _ = fp8_checkpoint(tmp_path)
    file = next(iter(sorted(model.glob("*.safetensors"))))
    data = bytearray(file.read_bytes())
    (length,) = np.frombuffer(bytes(data[:8]), dtype=np.uint64)
    header = json.loads(bytes(data[8 : 8 + int(length)]))
    name = next(name for name, entry in header.items() if entry.get("dtype") == "F8_E4M3")
    data[8 + int(length) + header[name]["data_offsets"][0] + 5] = 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="holds NaN"):
        run_conversion(model, tmp_path / "out")
    assert not (tmp_path / "out" / "done").exists()
    assert not (tmp_path / "out" / "compressed-tensors" / "model.safetensors.index.json").exists()


def mxfp4_checkpoint(directory: Path) -> tuple[Path, dict[str, Array]]:
    """gpt-oss with experts in MXFP4; and every expert's linears (out, in) as its own code takes them apart."""
    rng = np.random.default_rng(4)
    _, floats = family_checkpoint(directory / "floats", "gpt_oss")
    tensors, values = {}, {}
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name, weight in floats.items():
        if weight.ndim != 3:
            tensors[name] = weight
            continue
        experts, columns, rows = weight.shape
        blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8)
        scales = rng.integers(118, 124, (experts, rows, columns // 32)).astype(np.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        halves = np.stack([table[blocks & 15], table[blocks >> 4]], axis=-1).reshape(experts, rows, -1, 32)
        decoded = (halves * 2.0 ** (scales.astype(np.float64) - 127)[..., None]).reshape(experts, rows, columns)
        stem, leaf = name.rpartition(".")[0], name.rpartition(".")[2]
        for number, matrix in enumerate(decoded):
            if leaf == "down_proj":
                values[f"{stem}.{number}.down_proj"] = matrix
            else:
                values[f"{stem}.{number}.gate_proj"] = matrix[0::2]
                values[f"{stem}.{number}.up_proj"] = matrix[1::2]
    config = json.loads((directory / "floats" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return save_checkpoint(directory / "model", config, tensors, shards=2), values


def test_mxfp4_experts_are_decoded_exactly_and_quantized(tmp_path: Path) -> None:
    """Two E2M1 codes a byte, exponents plus 127, gate and up alternating along the outputs."""
    model, values = mxfp4_checkpoint(tmp_path)
    found = read_tensors(run_conversion(model, tmp_path / "out")["compressed-tensors"])
    for name, weight in values.items():
        step = found[f"{name}.weight_scale"].astype(np.float64)
        assert within_half_a_step(found[f"{name}.weight"].astype(np.float64) * step, weight, step), name
    floats = read_tensors(
        run_conversion(model, tmp_path / "floats-out", layer_policies={r".*\.experts\..*": None})["compressed-tensors"]
    )
    for name, weight in values.items():
        assert floats[f"{name}.weight"].tobytes() == weight.astype(ml_dtypes.bfloat16).tobytes()


def test_mxfp4_without_scales_is_refused(tmp_path: Path) -> None:
    """The message names the tensor and the form its scales would have."""
    model, _ = mxfp4_checkpoint(tmp_path)
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= read_file(file)
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    config = json.loads((model / "config.json").read_text())
    save_checkpoint(tmp_path / "b", config, tensors)
    with pytest.raises(CheckpointError, match=r"down_proj_blocks' is MXFP4, and its scales uint8 \(4, 64, 1\) are"):
        run_conversion(tmp_path / "b", tmp_path / "out")


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers_are_decoded_and_rounded_anew(tmp_path: Path, symmetric: bool) -> None:
    """Kimi-K2's form: int4 in words along the inputs, a scale a group, zero points packed along the outputs."""
    rng = np.random.default_rng(5)
    _, floats = family_checkpoint(tmp_path / "floats", "deepseek_v3")
    tensors, values = {}, {}
    for name, weight in floats.items():
        if ".experts." not in name:
            tensors[name] = weight
            continue
        rows, columns = weight.shape
        module = name.removesuffix(".weight")
        words = rng.integers(-(2**31), 2**31, (rows, columns // 8)).astype(np.int32)
        scale = rng.uniform(1e-3, 2e-3, (rows, columns // 32)).astype(ml_dtypes.bfloat16)
        tensors |= {f"{module}.weight_packed": words, f"{module}.weight_scale": scale}
        tensors[f"{module}.weight_shape"] = np.array([rows, columns], dtype=np.int32)
        codes = unpacked_int32(words, 4, columns).reshape(rows, -1, 32)
        if not symmetric:
            zero = rng.integers(-(2**31), 2**31, (rows // 8, columns // 32)).astype(np.int32)
            tensors[f"{module}.weight_zero_point"] = zero
            codes = codes - unpacked_int32(np.ascontiguousarray(zero.T), 4, rows).T[:, :, None]
        values[module] = (codes * scale.astype(np.float64)[:, :, None]).reshape(rows, columns)
    config = json.loads((tmp_path / "floats" / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    model = save_checkpoint(tmp_path / "model", config, tensors, shards=2)
    found = read_tensors(run_conversion(model, tmp_path / "out")["compressed-tensors"])
    for name, weight in values.items():
        step = found[f"{name}.weight_scale"].astype(np.float64)
        assert within_half_a_step(found[f"{name}.weight"].astype(np.float64) * step, weight, step), name


def test_another_quantization_is_refused_by_name(tmp_path: Path) -> None:
    """The message lists what is decoded."""
    config = tiny_config(quantization_config={"quant_method": "gptq"})
    tensors = random_tensors(config)
    del tensors[Q]
    model = save_checkpoint(tmp_path / "model", config, {**tensors, f"{Q[:-6]}qweight": np.zeros((8, 64), np.int32)})
    with pytest.raises(CheckpointError, match="is of 'gptq'; decoded are fp8 with blocks, mxfp4 and"):
        run_conversion(model, tmp_path / "out")


Change = Callable[[dict[str, Any], dict[str, Any]], Any]
Q = "model.layers.0.self_attn.q_proj.weight"


def under(prefix: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return change


def damaged(name: str, value: float) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[name].reshape(-1)[7] = value

    return change


def stored(name: str, array: Any) -> Change:
    return lambda config, tensors: tensors.update({name: array})


def stated(**keys: Any) -> Change:
    return lambda config, tensors: config.update(keys)


REFUSED: dict[str, tuple[Change, str]] = {
    "stale bitsandbytes": (
        stated(quantization_config={"quant_method": "bitsandbytes"}),
        r"speaks of quantised weights \(bitsandbytes\), and every tensor is in float.* remove the key from config.json",
    ),
    "stale, within": (
        stated(text_config={"quantization_config": {"quant_method": "awq"}}),
        r"speaks of quantised weights \(awq\), and every tensor is in float",
    ),
    "GPTQ without config": (
        stored(f"{Q[:-6]}qweight", np.zeros((8, 64), np.int32)),
        r"qweight' \(int32\) is of quantised weights \(GPTQ or AWQ\), though config.json has no quantization_config",
    ),
    "bitsandbytes without config": (
        stored(f"{Q}.absmax", np.ones(64, np.float32)),
        r"is of quantised weights \(bitsandbytes\)",
    ),
    "integers": (stored(Q, np.zeros((64, 64), np.int8)), r"is of quantised weights \(integers\)"),
    "LoRA": (
        stored(f"{Q[:-6]}lora_A.weight", np.ones((8, 64), np.float32)),
        "belongs to an adapter .* that is not merged",
    ),
    "IA3": (
        stored(f"{Q[:-6]}ia3_l.default", np.ones((1, 64), np.float32)),
        "belongs to an adapter .* that is not merged",
    ),
    "peft": (under("base_model.model."), "names begin with 'base_model.model.', as peft saves them"),
    "compiled": (under("_orig_mod."), "names begin with '_orig_mod.', as torch.compile saves them"),
    "NaN in the embedding": (damaged("model.embed_tokens.weight", np.nan), "embed_tokens.weight' holds nan: the"),
    "infinity in a norm": (damaged("model.norm.weight", np.inf), "model.norm.weight' holds inf: the checkpoint is"),
    "NaN in the head": (damaged("lm_head.weight", np.nan), "lm_head.* (holds nan|is not finite): the"),
    "NaN in a weight": (damaged(Q, np.nan), "a value is not finite: the weight is damaged; download the file again"),
    "Infinity in config.json": (stated(rms_norm_eps=np.inf), "'rms_norm_eps' holds what"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_float_model_is_refused_by_what_it_is(kind: str, tmp_path: Path) -> None:
    """With the sentences of a calibration, and nothing is left that looks like a model."""
    change, message = REFUSED[kind]
    config = tiny_config()
    tensors = random_tensors(config)
    change(config, tensors)
    model = save_checkpoint(tmp_path / "model", config, tensors)
    with pytest.raises(CheckpointError, match=message):
        run_conversion(model, tmp_path / "out")
    assert not list(tmp_path.glob("out/*/config.json"))


def test_a_quantization_config_over_weights_that_were_decoded_is_noted(tmp_path: Path) -> None:
    """DeepSeek's own cast to bfloat16 leaves it."""
    config = tiny_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    model = save_checkpoint(tmp_path / "model", config, random_tensors(config))
    plan = plan_conversion(ConversionConfig.model_validate({"model": str(model), "output": str(tmp_path / "out")}))
    assert [note for note in plan.notes if "weights in FP8 blocks, and every tensor is in float" in note]
    assert [note for note in CheckpointReader(model).notes if "weights in FP8 blocks, and every tensor is" in note]
    published = run_conversion(model, tmp_path / "out")["compressed-tensors"]
    assert json.loads((published / "config.json").read_text())["quantization_config"]["quant_method"] != "fp8"


def test_a_source_half_downloaded_is_refused(tmp_path: Path) -> None:
    """A missing file, and a file that ends too early."""
    model, _ = family_checkpoint(tmp_path / "model", "qwen3_moe")
    _, second = sorted(model.glob("model-*.safetensors"))
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated, download it again"):
        run_conversion(model, tmp_path / "out")
    second.unlink()
    with pytest.raises(CheckpointError, match=r"is listed in model\.safetensors\.index\.json and missing"):
        run_conversion(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_not_finite_ends_the_conversion_with_its_linears_name(tmp_path: Path) -> None:
    """A damaged weight is not rounded to something."""
    model, tensors = family_checkpoint(tmp_path / "model", "qwen3_moe")
    weight = tensors["model.layers.1.self_attn.k_proj.weight"].copy()
    weight[3, 5] = np.inf
    config = json.loads((model / "config.json").read_text())
    save_checkpoint(tmp_path / "b", config, {**tensors, "model.layers.1.self_attn.k_proj.weight": weight})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj: a value is not finite"):
        run_conversion(tmp_path / "b", tmp_path / "out")
