"""Tiny models in every scheme that compressed-tensors holds, made by whole jobs, for engines to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import tiny_checkpoint
from runs import run_inline, save_samples, small_recipe

from gs_dist.recipe.config import CalibrationConfig

__all__ = ["DENSE", "MIXTURE", "REFUSED", "SCHEMES", "make"]

_W8A8 = {"weight_quant_dtype": "int8", "act_quant_dtype": "int8"}
_W4 = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}
_GPTQ = {"precision_recovery": "gptq", "algo_args": {"desc_act": True, "static_groups": True}}

SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8-dynamic": {**_W8A8, "act_quant_granularity": "per_token"},
    "w8a8-static": _W8A8,
    "w8a8-static-zero-points": {**_W8A8, "act_symmetric": False},
    "w4a16": _W4,
    "w4a16-zero-points": {**_W4, "weight_symmetric": False},
    "w4a16-gptq": {**_W4, **_GPTQ},
}
"""Those that vLLM serves on CPUs."""

REFUSED: dict[str, dict[str, Any]] = {
    "w8a16": {"weight_quant_dtype": "int8"},
    "int8-kv": {"weight_quant_dtype": "int8", "kvcache_quant_dtype": "int8"},
    "w8a8-kv": {**_W8A8, "act_quant_granularity": "per_token", "kvcache_quant_dtype": "int8"},
}
"""Those that it does not."""

DENSE = ("llama", "mistral", "qwen2", "qwen3")
MIXTURE = "qwen3_moe"
_SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def make(root: Path, model_type: str, name: str, ptq: dict[str, Any]) -> CalibrationConfig:
    """The finished job `root/model_type/name`; its model is made with the first one of that type."""
    directory = root / model_type
    if not (directory / "model").is_dir():
        sizes = {**_SIZES, "moe_intermediate_size": 64} if model_type == MIXTURE else _SIZES
        tiny_checkpoint(directory / "model", model_type, dtype="bfloat16", **sizes)
        save_samples(directory / "samples.parquet", 128)
    # Weights without any structure have large errors at 4 bits; that is not what is looked at here.
    config = small_recipe(directory, name, ptq=ptq, max_relative_error=None, max_token_error=None)
    run_inline(config)
    return config
