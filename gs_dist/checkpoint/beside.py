"""Files beside the weights that would have a loader take the directory for something else."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory

__all__ = ["check_files_beside"]

# Pattern of a name to what a loader makes of it. Description files of dialects are looked at where a dialect is told.
_MISLEADING: Mapping[str, str] = {
    "hf_quant_config.json": "vLLM and TensorRT-LLM take the weights for ModelOpt's",
    "quantize_config.json": "vLLM takes the weights for GPTQ's",
    "quant_config.json": "vLLM takes the weights for AWQ's",
    "adapter_config.json": "transformers loads the base model that it names, and an adapter over it",
    "adapter_model.*": "weights of an adapter, which transformers adds",
    "pytorch_model*.bin": "weights in pickle form, which some loaders prefer",
    "pytorch_model.bin.index.json": "an index of weights in pickle form",
    "consolidated*.pth": "weights in Mistral's or Meta's own form",
    "tf_model*.h5": "weights of another framework",
    "flax_model*.msgpack": "weights of another framework",
    "*.gguf": "weights in another form, which some engines prefer",
    "modeling_*.py": "code that replaces the model's where remote code is trusted",
    "configuration_*.py": "code that replaces the model's configuration where remote code is trusted",
}


def check_files_beside(inventory: Inventory) -> None:
    """Reports what would have a loader read something else than the weights that the index lists."""
    for name in sorted(path.name for path in inventory.directory.iterdir()):
        for pattern, why in _MISLEADING.items():
            if fnmatch.fnmatchcase(name, pattern):
                inventory.report(name, "file-beside", why, "no such file beside quantised weights")
                break
    if inventory.config.get("auto_map"):
        found = "auto_map, which names code to run"
        inventory.report(CONFIG_FILE, "file-beside", found, "no such key: this model needs no code")
