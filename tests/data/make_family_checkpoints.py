"""Writes `family_checkpoints.json`: config.json and tensors (dtype, shape) of tiny models as transformers saves them.

    pip install 'torch==2.13.*' 'transformers==5.17.0' safetensors
    python tests/data/make_family_checkpoints.py

Each model is made from its configuration class with random weights, saved with `save_pretrained`, and its headers read
back. Values are not kept: tests make their own under these names.
"""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED: dict[str, Any] = {**QWEN, "shared_expert_intermediate_size": 32}
ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**SMALL, **QWEN},
    "qwen3_next": {**SMALL, **SHARED, **LINEAR_ATTENTION},
    "qwen3_5_moe": {"text_config": {**SMALL, **SHARED, **LINEAR_ATTENTION}, "vision_config": VISION},
    "deepseek_v3": {**SMALL, **ROUTED, **MLA},
    "glm4_moe": {**SMALL, **ROUTED, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "mixtral": {**SMALL, **LOCAL},
    "gpt_oss": {**SMALL, **LOCAL, "intermediate_size": 32},
    "gemma3_text": SMALL,
    "qwen3_vl": {"text_config": SMALL, "vision_config": VISION},
    "qwen3_vl_moe": {"text_config": {**SMALL, **QWEN}, "vision_config": VISION},
}


def main() -> None:
    """Writes the file beside this script."""
    found = {}
    for family, settings in FAMILIES.items():
        config = AutoConfig.for_model(family, **settings)
        config.dtype = "bfloat16"
        kind = AutoModelForImageTextToText if "vision_config" in settings else AutoModelForCausalLM
        torch.manual_seed(0)
        model = kind.from_config(config).to(torch.bfloat16)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            data = (Path(directory) / "model.safetensors").read_bytes()
            saved = json.loads((Path(directory) / "config.json").read_text())
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        tensors = {name: [entry["dtype"], entry["shape"]] for name, entry in sorted(header.items())}
        found[family] = {"config": saved, "tensors": tensors}
    path = Path(__file__).with_name("family_checkpoints.json")
    lines = [f" {json.dumps(family)}: {json.dumps(entry)}" for family, entry in found.items()]
    made = json.dumps({"made_with": f"transformers {transformers.__version__}, torch {torch.__version__}"})
    path.write_text(made[:-1] + ",\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
