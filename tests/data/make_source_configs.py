"""Writes what transformers makes of each config.json in source_configs.json into that file.

Run it where transformers and torch are installed (the package itself is not needed):

    python tests/data/make_source_configs.py

The files are of published models and of public repositories, without what names a machine or a path; long ones of
quantised models are cut to the keys that say so. Made with transformers 5.17.0.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("source_configs.json")


SAVED_AS = {"kimi_k2": "deepseek_v3"}  # by its own code, which transformers has not
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
ROPE = ("rope_type", "rope_theta", "factor")
LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def reading(config: dict[str, Any]) -> dict[str, Any]:
    """What decides a decoder's arithmetic, as the configuration class has it, and as its layers are built."""
    from transformers import CONFIG_MAPPING

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    made = CONFIG_MAPPING[SAVED_AS.get(config["model_type"], config["model_type"])].from_dict(plain)
    kinds = getattr(made, "layer_types", None) or ["sliding_attention"] * made.num_hidden_layers
    window = None if config["model_type"] == "llama" else getattr(made, "sliding_window", None)
    rope = made.rope_parameters
    told = (*ROPE, *LLAMA3) if rope["rope_type"] == "llama3" else ROPE
    return {
        "vocab_size": made.vocab_size,
        "hidden_size": made.hidden_size,
        "num_layers": made.num_hidden_layers,
        "num_heads": made.num_attention_heads,
        "num_kv_heads": made.num_key_value_heads,
        "rms_norm_eps": made.rms_norm_eps,
        "tie_word_embeddings": made.tie_word_embeddings,
        "max_position_embeddings": made.max_position_embeddings,
        "eos_token_id": made.eos_token_id if "eos_token_id" in config else None,
        "dtype": None if made.dtype is None else str(made.dtype).removeprefix("torch."),
        "rope": {key: rope[key] for key in told if key in rope},
        "multipliers": [float(getattr(made, key, 1.0)) for key in MULTIPLIERS],
        "growth": rope.get("llama_4_scaling_beta") or 0.0,
        "windows": sorted({str(window if kind == "sliding_attention" else None) for kind in kinds}),
        **built(made),
    }


def built(made: Any) -> dict[str, Any]:
    """What the layers are made of, looked up in modules without memory of their own."""
    import torch

    home = importlib.import_module(type(made).__module__.replace("configuration", "modeling"))
    name = type(made).__name__.removesuffix("Config")
    rotary = getattr(home, f"{name}RotaryEmbedding")(made)
    frequencies = rotary.inv_freq.tolist()
    with torch.device("meta"):
        layers = [getattr(home, f"{name}DecoderLayer")(made, layer) for layer in range(made.num_hidden_layers)]
    attention = layers[0].self_attn
    mlps = [getattr(layer, "mlp", None) or layer.block_sparse_moe for layer in layers]
    dense = [mlp for mlp in mlps if not hasattr(mlp, "experts")]
    return {
        "frequencies": [frequencies[0], frequencies[len(frequencies) // 2], frequencies[-1]],
        "channels_turning": 2 * len(frequencies),
        "rotary_factor": rotary.attention_scaling,
        "score_scale": float(attention.scaling),
        "attention": {
            name: [*module.weight.shape, getattr(module, "bias", None) is not None]
            for name, module in sorted(attention.named_children())
            if name.endswith(("proj", "proj_with_mqa"))
        },
        "norms": sorted(name for name, _ in attention.named_children() if name.endswith("norm")),
        "intermediate_size": dense[0].down_proj.in_features if dense else None,
        "mlp_bias": bool(dense) and dense[0].down_proj.bias is not None,
        "dense_layers": [] if dense == mlps else [layer for layer, mlp in enumerate(mlps) if mlp in dense],
        "experts": None if dense == mlps else experts(made, next(mlp for mlp in mlps if hasattr(mlp, "experts"))),
    }


def experts(made: Any, mlp: Any) -> dict[str, Any]:
    """Sizes of a mixture, and how tokens choose."""
    count, double, _ = mlp.experts.gate_up_proj.shape
    shared = getattr(mlp, "shared_experts", None) or getattr(mlp, "shared_expert", None)
    by_family = {"mixtral": True, "deepseek_v2": False}  # whatever the key says
    grouped = getattr(made, "topk_method", None) != "greedy"
    return {
        "num_experts": count,
        "intermediate_size": double // 2,
        "shared_size": 0 if shared is None else shared.gate_proj.out_features,
        "top_k": made.num_experts_per_tok,
        "scale": getattr(made, "routed_scaling_factor", 1.0),
        "normalised": by_family.get(made.model_type, getattr(made, "norm_topk_prob", None)),
        "groups": [(grouped and getattr(made, key, None)) or 1 for key in ("n_group", "topk_group")],
    }


def main() -> None:
    """Rewrites the file."""
    table = json.loads(DATA.read_text(encoding="utf-8"))
    for entry in table.values():
        entry["reading"] = reading(entry["config"])
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items()]
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
