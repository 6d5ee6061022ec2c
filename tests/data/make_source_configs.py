"""Writes what transformers makes of each config.json in source_configs.json into that file.

Run it where transformers and torch are installed (the package itself is not needed):

    python tests/data/make_source_configs.py

The files are of published models and of public repositories, without what names a machine or a path; long ones of
quantised models are cut to the keys that say so. Made with transformers 5.17.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("source_configs.json")


def reading(config: dict[str, Any]) -> dict[str, Any]:
    """What decides a decoder's arithmetic, as the configuration class has it."""
    from transformers import CONFIG_MAPPING

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    made = CONFIG_MAPPING[config["model_type"]].from_dict(plain)
    kinds = getattr(made, "layer_types", None) or ["sliding_attention"] * made.num_hidden_layers
    window = None if config["model_type"] == "llama" else made.sliding_window
    rope = {key: value for key, value in made.rope_parameters.items() if key != "type"}
    return {
        "vocab_size": made.vocab_size,
        "hidden_size": made.hidden_size,
        "intermediate_size": made.intermediate_size,
        "num_layers": made.num_hidden_layers,
        "num_heads": made.num_attention_heads,
        "num_kv_heads": made.num_key_value_heads,
        "head_dim": getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads,
        "rms_norm_eps": made.rms_norm_eps,
        "tie_word_embeddings": made.tie_word_embeddings,
        "max_position_embeddings": made.max_position_embeddings,
        "eos_token_id": made.eos_token_id if "eos_token_id" in config else None,
        "dtype": None if made.dtype is None else str(made.dtype).removeprefix("torch."),
        "rope": rope,
        "windows": sorted({str(window if kind == "sliding_attention" else None) for kind in kinds}),
        "attention_bias": config["model_type"] == "qwen2" or bool(getattr(made, "attention_bias", False)),
        "mlp_bias": bool(getattr(made, "mlp_bias", False)),
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
