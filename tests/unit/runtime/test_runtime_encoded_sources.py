"""Sources whose files keep weights otherwise than a decoder has them: FP8 blocks, and all experts in one tensor."""

from __future__ import annotations

import json
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


def test_fused_experts_make_what_single_ones_make(tmp_path: Path) -> None:
    """A slice at a time: the published bytes are those of a job on experts one by one."""
    config = tiny_config("qwen3_moe")
    tensors = random_tensors(config)
    together, _ = published(tmp_path / "fused", config, fused(tensors, 8))
    assert together == published(tmp_path / "single", config, tensors)[0]


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
    """A layout that keeps inputs first would be read as something else."""
    config = tiny_config("qwen3_moe")
    tensors = fused(random_tensors(config), 8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
    save_checkpoint(tmp_path / "model", config, tensors)
    save_samples(tmp_path / "samples.parquet", 128)
    with pytest.raises(CheckpointError, match=r"has shape \(8, 64, 96\)"):
        plan_of(small_recipe(tmp_path, ptq=PTQ))
