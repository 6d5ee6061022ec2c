"""What a checkpoint holds beside its decoder is published as it is, and engines are told so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from checkpoints import random_tensors, save_checkpoint, tiny_config
from runs import run_inline, save_samples, small_recipe
from safetensors import safe_open

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.name_patterns import NamePatterns
from gs_dist.checkpoint.reader import CheckpointReader

DYNAMIC = {
    "weight_quant_dtype": "int8",
    "act_quant_dtype": "int8",
    "act_quant_granularity": "per_token",
    "outliers_suppression": "smooth",
    "opname_blacklist": ["lm_head"],
}
CODED = "model.layers.1.mlp.shared_experts.up_proj.weight"

Tensors = dict[str, npt.NDArray[Any]]


def with_further_layer(directory: Path) -> Tensors:
    """One layer, and one of multi-token prediction behind it, partly in FP8 blocks; returns the second."""
    config = tiny_config("deepseek_v3", torch_dtype="bfloat16", first_k_dense_replace=0, num_hidden_layers=2)
    tensors = random_tensors(config, "bfloat16")
    for name in ("eh_proj", "shared_head.head"):
        shape = (64, 128) if name == "eh_proj" else (128, 64)
        tensors[f"model.layers.1.{name}.weight"] = np.ones(shape, ml_dtypes.bfloat16)
    codes = np.random.default_rng(1).integers(-4, 5, tensors[CODED].shape).astype(ml_dtypes.float8_e4m3fn)
    coded = {**tensors, CODED: codes, f"{CODED}_scale_inv": np.full((1, 1), 0.125, np.float32)}
    config |= {
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 1,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    save_checkpoint(directory / "model", config, coded)
    save_samples(directory / "samples.parquet", 128)
    tensors[CODED] = (codes.astype(np.float32) * 0.125).astype(ml_dtypes.bfloat16)
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}


def test_layers_of_multi_token_prediction_are_carried_over(tmp_path: Path) -> None:
    """Decoded where they are in codes, in float for engines, and compared with the source."""
    further = with_further_layer(tmp_path)
    config = small_recipe(tmp_path, ptq=DYNAMIC, format=["compressed-tensors", "ascend"])
    notes = CheckpointReader(tmp_path / "model").notes
    assert any("layers of multi-token prediction behind the last are carried over" in note for note in notes)
    run_inline(config)
    for dialect in config.dialects:
        published = tmp_path / "out" / dialect
        report = check(published, model=tmp_path / "model")
        assert report.clean, report.render()
        with safe_open(published / "outer.safetensors", "np") as file:
            held = set(file.keys())
        assert further.keys() <= held
        data = (published / "outer.safetensors").read_bytes()
        assert all(tensor.tobytes() in data for tensor in further.values())
    description = json.loads((tmp_path / "out" / "ascend" / "quant_model_description.json").read_text())
    assert {description[name] for name in further} == {"FLOAT"}
    path = tmp_path / "out" / "compressed-tensors" / "config.json"
    content = json.loads(path.read_text())
    ignore = NamePatterns(content["quantization_config"]["ignore"])
    assert all(ignore.match(name.removesuffix(".weight")) for name in further)
    assert not ignore.match("model.layers.0.mlp.experts.1.up_proj")
    content["quantization_config"]["ignore"].pop()
    path.write_text(json.dumps(content))
    found = {problem.rule for problem in check(path.parent).problems}
    assert "carried" in found
