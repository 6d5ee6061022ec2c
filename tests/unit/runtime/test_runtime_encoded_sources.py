"""Sources whose files keep weights otherwise than a decoder has them: in few bits, or all experts in one tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import random_tensors, save_checkpoint, tiny_config
from runs import plan_of, run_inline, save_samples, small_recipe
from safetensors import safe_open

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import CheckpointError

Array = npt.NDArray[Any]

BLOCK = 16
PTQ = {
    "weight_quant_dtype": "int8",
    "act_quant_dtype": "int8",
    "act_quant_granularity": "per_token",
    "outliers_suppression": "smooth",
    "opname_blacklist": ["lm_head"],
}


def in_fp8(tensors: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """The linears' weights as E4M3 with a scale a block, and the bfloat16 weights that these stand for."""
    coded, plain = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "layers" not in name or name.endswith(("mlp.gate.weight", "_bias")):
            coded[name] = plain[name] = tensor
            continue
        scales = np.empty([-(-size // BLOCK) for size in tensor.shape], np.float32)
        codes, wide = np.empty(tensor.shape, ml_dtypes.float8_e4m3fn), np.empty(tensor.shape, np.float32)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                place = np.s_[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
                values = tensor[place].astype(np.float32)
                scales[row, column] = np.abs(values).max() / 448
                codes[place] = (values / scales[row, column]).astype(ml_dtypes.float8_e4m3fn)
                wide[place] = codes[place].astype(np.float32) * scales[row, column]
        coded[name], coded[f"{name}_scale_inv"] = codes, scales
        plain[name] = wide.astype(ml_dtypes.bfloat16)
    return coded, plain


def fused(tensors: dict[str, Array], experts: int) -> dict[str, Array]:
    """Experts of a layer as transformers 5 holds them."""
    made = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix in sorted({name.split("experts.")[0] + "experts." for name in tensors if ".experts." in name}):
        own = [
            [tensors[f"{prefix}{number}.{leaf}_proj.weight"] for leaf in ("gate", "up", "down")]
            for number in range(experts)
        ]
        made[f"{prefix}gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in own])
        made[f"{prefix}down_proj"] = np.stack([down for _, _, down in own])
    return made


def renamed_as_in_memory(tensors: dict[str, Array]) -> dict[str, Array]:
    """Mixtral's tensors under the names that transformers 5 gives them in memory."""
    leaves = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    made = {}
    for name, tensor in tensors.items():
        for old, new in leaves.items():
            name = name.replace(old, new)
        made[name] = tensor
    return made


def packed(tensors: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Experts in int4, two scales a row, as Kimi-K2 has them; and the bfloat16 weights that these stand for."""
    rng = np.random.default_rng(3)
    coded, plain = {}, {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            coded[name] = plain[name] = tensor
            continue
        rows, columns = tensor.shape
        grouped = tensor.astype(np.float32).reshape(rows, 2, -1)
        scale = (np.abs(grouped).max(axis=2) / rng.uniform(6, 8)).astype(ml_dtypes.bfloat16)
        codes = np.clip(np.rint(grouped / scale.astype(np.float32)[:, :, None]), -8, 7) + 0.0  # no zero has a sign
        plain[name] = (codes * scale.astype(np.float32)[:, :, None]).reshape(rows, columns).astype(ml_dtypes.bfloat16)
        unsigned = (codes.reshape(rows, columns // 8, 8) + 8).astype(np.uint32)
        words = (unsigned << (4 * np.arange(8, dtype=np.uint32))).sum(axis=2, dtype=np.uint32)
        module = name.removesuffix(".weight")
        coded |= {f"{module}.weight_packed": words.view(np.int32), f"{module}.weight_scale": scale}
        coded[f"{module}.weight_shape"] = np.array([rows, columns], np.int32)
    return coded, plain


def as_mxfp4(tensors: dict[str, Array], experts: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Fused experts in E2M1 with a power of two for 32 inputs; and what these stand for."""
    coded, plain = {}, dict(tensors)
    for name, tensor in fused(tensors, experts).items():
        if tensor.ndim != 3:
            coded[name] = tensor
            continue
        grouped = tensor.astype(np.float32).reshape(*tensor.shape[:2], -1, 32)
        exponent = np.floor(np.log2(np.abs(grouped).max(axis=3))).astype(np.int32) - 2
        wide = np.ldexp(grouped, -exponent[..., None]).astype(ml_dtypes.float4_e2m1fn)
        octets = wide.view(np.uint8)
        coded[f"{name}_blocks"] = octets[..., 0::2] | (octets[..., 1::2] << 4)
        coded[f"{name}_scales"] = (exponent + 127).astype(np.uint8)
        values = np.ldexp(wide.astype(np.float32), exponent[..., None]).reshape(tensor.shape)
        values = values.astype(ml_dtypes.bfloat16)
        half = values.shape[1] // 2
        for number in range(experts):
            place = f"{name.rpartition('.')[0]}.{number}."
            if name.endswith("down_proj"):
                plain[f"{place}down_proj.weight"] = values[number]
            else:
                plain[f"{place}gate_proj.weight"] = values[number, :half]
                plain[f"{place}up_proj.weight"] = values[number, half:]
    return coded, plain


def published(directory: Path, config: dict[str, Any], tensors: dict[str, Array]) -> tuple[dict[str, bytes], Path]:
    """Every tensor that a job makes of a checkpoint, as bytes, and where it lies."""
    save_checkpoint(directory / "model", config, tensors)
    save_samples(directory / "samples.parquet", 128)
    run_inline(small_recipe(directory, ptq=PTQ))
    found = {}
    for path in sorted((directory / "out" / "compressed-tensors").glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                found[name] = file.get_slice(name).get_dtype().encode() + bytes(_raw(file, path, name))
    return found, directory / "out" / "compressed-tensors"


def as_read(directory: Path, config: dict[str, Any], tensors: dict[str, Array]) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every tensor that a job would read of a checkpoint."""
    reader = CheckpointReader(save_checkpoint(directory, config, tensors))
    return {name: (array.dtype.name, array.tobytes()) for name, array in reader.read(reader.tensors).items()}


def _raw(file: Any, path: Path, name: str) -> bytes:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return data[8 + length + begin : 8 + length + end]


def test_fp8_blocks_make_what_their_bfloat16_weights_make(tmp_path: Path) -> None:
    """Decoded as they are read: every published byte is that of a job on the decoded checkpoint."""
    config = tiny_config("deepseek_v3", torch_dtype="bfloat16")
    coded, plain = in_fp8(random_tensors(config, "bfloat16"))
    stated = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    encoded, directory = published(tmp_path / "fp8", {**config, "quantization_config": stated}, coded)
    assert encoded == published(tmp_path / "plain", config, plain)[0]
    assert check(directory).clean
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["quant_method"] != "fp8"
    assert not any("scale_inv" in name for name in encoded)
    reader = CheckpointReader(tmp_path / "fp8" / "model")
    assert any("FP8 blocks: they are decoded to bfloat16" in note for note in reader.notes)
    sizes = CheckpointReader(tmp_path / "plain" / "model").tensors
    assert {name: info.nbytes for name, info in reader.tensors.items()} == {n: i.nbytes for n, i in sizes.items()}


def test_packed_integers_make_what_their_bfloat16_weights_make(tmp_path: Path) -> None:
    """Kimi-K2's experts in int4: every byte is that of the decoded checkpoint, and a job takes it."""
    config = tiny_config("kimi_k2", torch_dtype="bfloat16")
    coded, plain = packed(random_tensors(config, "bfloat16"))
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    stated = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    coded_config = {**config, "quantization_config": stated}
    assert as_read(tmp_path / "a", coded_config, coded) == as_read(tmp_path / "b", config, plain)
    _, directory = published(tmp_path / "job", coded_config, coded)
    assert check(directory, model=tmp_path / "job" / "model").clean
    notes = CheckpointReader(tmp_path / "a").notes
    assert any("24 weights are in packed integers: they are decoded to bfloat16" in note for note in notes)


def test_mxfp4_experts_make_what_their_bfloat16_weights_make(tmp_path: Path) -> None:
    """Fused, with their scales beside them; gates come before ups, as in every family that is calibrated."""
    config = tiny_config("qwen3_moe", torch_dtype="bfloat16", moe_intermediate_size=32)
    coded, plain = as_mxfp4(random_tensors(config, "bfloat16"), 8)
    stated = {"quant_method": "mxfp4"}
    found = as_read(tmp_path / "a", {**config, "quantization_config": stated}, coded)
    assert found == as_read(tmp_path / "b", config, plain)


def as_saved(tensors: dict[str, Array]) -> dict[str, Array]:
    """Outputs before inputs, as transformers keeps most families."""
    return tensors


def inputs_first(tensors: dict[str, Array]) -> dict[str, Array]:
    """(E, in, out), as it keeps some."""
    return {
        name: np.ascontiguousarray(tensor.swapaxes(1, 2)) if tensor.ndim == 3 else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("form", [as_saved, inputs_first])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_fused_experts_make_what_single_ones_make(
    family: str, form: Callable[[dict[str, Array]], dict[str, Array]], tmp_path: Path
) -> None:
    """A slice at a time: what is read are experts one by one, under the usual names."""
    config = tiny_config(family, intermediate_size=48)
    tensors = random_tensors(config)
    saved = form(fused(renamed_as_in_memory(tensors), 8))
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in saved)
    assert as_read(tmp_path / "fused", config, saved) == as_read(tmp_path / "single", config, tensors)


def test_fused_experts_in_fp8_are_decoded_a_slice_at_a_time(tmp_path: Path) -> None:
    """Blocks of an expert's own, gates and ups among the same rows."""
    config = tiny_config("qwen3_moe", torch_dtype="bfloat16", num_hidden_layers=1)
    coded, plain = in_fp8(random_tensors(config, "bfloat16"))
    both = fused(coded, 8)
    for leaf, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        place = "model.layers.0.mlp.experts"
        rows = [
            np.concatenate([coded[f"{place}.{number}.{part}_proj.weight_scale_inv"] for part in parts])
            for number in range(8)
        ]
        both[f"{place}.{leaf}_scale_inv"] = np.stack(rows)
    stated = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    save_checkpoint(tmp_path / "model", {**config, "quantization_config": stated}, both)
    found = CheckpointReader(tmp_path / "model").read_layer(0)
    for name, tensor in plain.items():
        if ".experts." in name:
            seen = found[name.removeprefix("model.layers.0.")]
            assert seen.tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), "nowhere in the checkpoint"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": np.ones((1, 1), np.float32)}), "call for"),
    ],
)
def test_codes_without_their_scales_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    """Before any work, by the name of the tensor."""
    config = tiny_config("deepseek_v3", torch_dtype="bfloat16", num_hidden_layers=1)
    coded, _ = in_fp8(random_tensors(config, "bfloat16"))
    damage(coded)
    stated = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    save_checkpoint(tmp_path / "model", {**config, "quantization_config": stated}, coded)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path / "model")


def test_fused_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    """Whatever else would be read as something else."""
    config = tiny_config("qwen3_moe")
    tensors = fused(random_tensors(config), 8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :, :48])
    save_checkpoint(tmp_path / "model", config, tensors)
    save_samples(tmp_path / "samples.parquet", 128)
    with pytest.raises(CheckpointError, match=r"has shape \(8, 96, 48\)"):
        plan_of(small_recipe(tmp_path, ptq=PTQ))
