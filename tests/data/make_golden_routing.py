"""Makes golden_routing.safetensors: what transformers computes where routers decide by a hair, or starve experts.

Run it where torch, transformers and ml_dtypes are installed (the package itself is not needed):

    python tests/data/make_golden_routing.py

Made with transformers 5.17.0 and torch 2.13.0, float32 on a CPU. Samples have several lengths, and an attention mask.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import checkpoints  # noqa: E402  (the path above makes it importable)

LENGTHS = (150, 97, 33)  # of the samples; the rest of each row is padding
EVERY = 16  # tokens whose logits are kept

Tensors = dict[str, Any]


def routers(tensors: Tensors) -> list[str]:
    """Names of the routers' weights."""
    return [name for name in tensors if name.endswith((".gate.weight",))]


def near_ties(tensors: Tensors) -> None:
    """Experts of which two and two are wanted alike, to some 1e-4 of a logit."""
    generator = np.random.default_rng(3)
    for name in routers(tensors):
        weight = tensors[name]
        noise = 2e-5 * generator.standard_normal((weight.shape[0] // 2, weight.shape[1]))
        weight[1::2] = weight[0::2] + noise.astype(np.float32)


def starving_logits(tensors: Tensors) -> None:
    """Every token goes to one of the first two experts, and to the first of the others, whose logits are all 0."""
    for name in routers(tensors):
        tensors[name][1] = -tensors[name][0]
        tensors[name][2:] = 0.0
        tensors[name][2] = 0.5 * tensors[name][0]


def starving_correction(tensors: Tensors) -> None:
    """A correction that keeps every token from half of the experts."""
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name][4:] = -10.0


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensors], None]]] = {
    "mixtral_near_ties": ({"model_type": "mixtral", "num_experts_per_tok": 3}, near_ties),
    "qwen2_moe_near_ties": ({"model_type": "qwen2_moe", "num_experts_per_tok": 3}, near_ties),
    "qwen3_moe_near_ties": ({"model_type": "qwen3_moe", "num_experts_per_tok": 3}, near_ties),
    "qwen3_moe_starving": ({"model_type": "qwen3_moe"}, starving_logits),
    "glm4_moe_starving": ({"model_type": "glm4_moe"}, starving_correction),
    "deepseek_v2_near_ties": ({"model_type": "deepseek_v2"}, near_ties),
    "deepseek_v3_near_ties": ({"model_type": "deepseek_v3"}, near_ties),
    "deepseek_v3_starving": ({"model_type": "deepseek_v3"}, starving_correction),
}
"""Name to keys of config.json and what is done to the tensors."""


def build(name: str, directory: Path) -> Path:
    """The case's checkpoint."""
    keys, change = CASES[name]
    config = checkpoints.tiny_config(**{"max_position_embeddings": 512, **keys})
    tensors = checkpoints.random_tensors(config)
    change(tensors)
    return checkpoints.save_checkpoint(directory, config, tensors)


def input_ids() -> Any:
    """Token ids (3, 150) int32; padding is of any id."""
    return np.random.default_rng(13).integers(0, 128, (len(LENGTHS), max(LENGTHS))).astype(np.int32)


def mask() -> Any:
    """(3, 150), True for what is no padding."""
    return np.arange(max(LENGTHS))[None, :] < np.array(LENGTHS)[:, None]


def main() -> None:
    """Writes the file beside this script."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    golden = {}
    ids, seen = torch.from_numpy(input_ids().astype(np.int64)), mask()
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            model = AutoModelForCausalLM.from_pretrained(
                build(name, Path(folder)), dtype=torch.float32, attn_implementation="eager"
            )
            with torch.no_grad():
                logits = model(ids, attention_mask=torch.from_numpy(seen.astype(np.int64))).logits.numpy()
            golden[name] = np.ascontiguousarray(logits[seen][::EVERY])
            print(f"{name}: {golden[name].shape}, logits within {logits.min():.2f} .. {logits.max():.2f}")
    save_file(golden, HERE / "golden_routing.safetensors")


if __name__ == "__main__":
    main()
