"""Makes golden_logits.safetensors: what transformers computes for the tiny models the tests build.

Run it where torch, transformers and ml_dtypes are installed (the package itself is not needed):

    python tests/data/make_golden_logits.py [CASE...]

Made with transformers 5.23.0 and torch 2.13.0, float32 on a CPU; the families added since with transformers 5.17.0.
Cases that are not named keep their values.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import checkpoints  # noqa: E402  (the path above makes it importable)

NUM_SAMPLES, NUM_TOKENS = 2, 300  # more than two attention blocks, the last one short
POSITIONS = [0, 1, 60, 127, 128, 200, 255, 256, 299]

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_one_kv_head": {"num_key_value_heads": 1, "dtype": "bfloat16"},
    "llama_many_kv_heads": {"num_key_value_heads": 4, "head_dim": 24},
    "llama3_rope_tied": {
        "tie": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama_linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "rms_norm_eps": 1e-3},
    "mistral_narrow_window": {"model_type": "mistral", "sliding_window": 48},
    "mistral_wide_window": {"model_type": "mistral", "sliding_window": 200},
    "qwen2_tied": {"model_type": "qwen2", "tie": True, "rope_theta": 1000000.0},
    "qwen3": {"model_type": "qwen3", "dtype": "float16"},
    "qwen2_windows_by_layer": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 48,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "olmo2": {"model_type": "olmo2"},
    "mixtral": {"model_type": "mixtral"},
    "qwen2_moe": {"model_type": "qwen2_moe"},
    "qwen3_moe": {"model_type": "qwen3_moe"},
    "glm4_moe": {"model_type": "glm4_moe"},
    "deepseek_v2": {"model_type": "deepseek_v2"},
    "deepseek_v2_lite": {"model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": {"model_type": "deepseek_v3"},
    "deepseek_v3_yarn": {
        "model_type": "deepseek_v3",
        "attention_bias": True,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 64,
        },
    },
    "deepseek_v3_halves": {"model_type": "deepseek_v3", "rope_interleave": False, "n_group": 1, "topk_group": 1},
    "llama_yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "qwen3_yarn_attention_factor": {
        "model_type": "qwen3",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 0.9,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        },
        "rope_theta": None,
    },
    "glm4_moe_yarn": {
        "model_type": "glm4_moe",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "granite": {"model_type": "granite"},
    "granite_biases_tied": {"model_type": "granite", "attention_bias": True, "mlp_bias": True, "tie": True},
    "phi3": {"model_type": "phi3"},
    "phi3_windows_partial_rotary": {
        "model_type": "phi3",
        "sliding_window": 48,
        "partial_rotary_factor": 0.75,
        "head_dim": 32,
    },
    "ministral3": {"model_type": "ministral3"},
    "seed_oss": {"model_type": "seed_oss"},
    "seed_oss_output_bias": {"model_type": "seed_oss", "attention_out_bias": True, "mlp_bias": True},
    "qwen3_moe_dense_first": {"model_type": "qwen3_moe", "mlp_only_layers": [0], "num_experts_per_tok": 3},
}
"""Name to arguments of `checkpoints.tiny_checkpoint`."""


def build(name: str, directory: Path) -> Path:
    """The case's checkpoint."""
    arguments = {"model_type": "llama", "max_position_embeddings": 512, **CASES[name]}
    return checkpoints.tiny_checkpoint(directory, **arguments)


def input_ids() -> Any:
    """Token ids (NUM_SAMPLES, NUM_TOKENS) int32 of all cases."""
    return np.random.default_rng(11).integers(0, 128, (NUM_SAMPLES, NUM_TOKENS)).astype(np.int32)


def digest(directory: Path) -> str:
    """sha256 of the weights, which tells a changed builder from a changed forward pass."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Writes the golden file beside this script."""
    import torch
    from safetensors import safe_open
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    golden, digests = {}, {}
    if len(sys.argv) > 1:
        with safe_open(HERE / "golden_logits.safetensors", "np") as file:
            golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            digests = json.loads(file.metadata()["digests"])
    ids = torch.from_numpy(input_ids().astype(np.int64))
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            directory = build(name, Path(folder))
            model, loading = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            assert not any(loading.values()), loading  # every tensor is one that the model class saves
            with torch.no_grad():
                logits = model(ids).logits
            golden[name] = np.ascontiguousarray(logits[:, POSITIONS].numpy())
            digests[name] = digest(directory)
            print(f"{name}: logits within {logits.min():.2f} .. {logits.max():.2f}")
    save_file(golden, HERE / "golden_logits.safetensors", metadata={"digests": json.dumps(digests)})


if __name__ == "__main__":
    main()
