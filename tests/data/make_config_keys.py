"""Makes config_keys.json: the keys of the configuration classes of the served families, and their defaults.

Run it where transformers is installed (the package itself is not needed):

    python tests/data/make_config_keys.py

Made with transformers 5.17.0.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

MODEL_TYPES = (
    *("granite", "llama", "mistral", "ministral3", "olmo2", "phi3", "qwen2", "qwen3", "seed_oss"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe"),
)


def class_keys(model_type: str) -> dict[str, Any]:
    """Key to default of the type's configuration class, as a new configuration holds them."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    fields = {field.name for field in dataclasses.fields(config)} - {"transformers_version"}
    return {key: getattr(config, key) for key in sorted(fields)}


def generation_keys() -> list[str]:
    """Settings of generation, which older versions saved in config.json."""
    from transformers import GenerationConfig

    return sorted(GenerationConfig()._get_default_generation_params())


def main() -> None:
    """Writes the file beside this script."""
    import transformers

    content = {
        "transformers": transformers.__version__,
        "classes": {model_type: class_keys(model_type) for model_type in MODEL_TYPES},
        "generation": generation_keys(),
    }
    path = Path(__file__).with_name("config_keys.json")
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
