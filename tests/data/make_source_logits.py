"""Makes source_logits.safetensors: what transformers computes for checkpoints whose config.json and tensors disagree.

Run it where torch, transformers and ml_dtypes are installed (the package itself is not needed):

    python tests/data/make_source_logits.py

Made with transformers 5.17.0 and torch 2.13.0, float32 on a CPU.
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

POSITIONS = [0, 1, 17, 100, 199]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = dict[str, Any]


def own_head(tensors: Tensors) -> None:
    """A head that was trained apart from the embedding it is tied to."""
    tensors[HEAD] = np.random.default_rng(7).standard_normal(tensors[EMBEDDING].shape).astype(np.float32) / 8


def equal_head(tensors: Tensors) -> None:
    """A copy of the embedding."""
    tensors[HEAD] = tensors[EMBEDDING].copy()


def head_alone(tensors: Tensors) -> None:
    """The embedding under the head's name."""
    tensors[HEAD] = tensors.pop(EMBEDDING)


def as_it_is(tensors: Tensors) -> None:
    """Nothing changes."""


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensors], None]]] = {
    "own_head": ({"tie_word_embeddings": True}, own_head),
    "own_head_qwen2": ({"model_type": "qwen2", "tie_word_embeddings": True}, own_head),
    "equal_head": ({"tie_word_embeddings": True}, equal_head),
    "head_alone": ({"tie_word_embeddings": True}, head_alone),
    "llama3_without_length": ({"rope_scaling": LLAMA3, "max_position_embeddings": 128}, as_it_is),
    "llama3_length_beside": ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, as_it_is),
    "both_tables_alike": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
            "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 5e5},
        },
        as_it_is,
    ),
    "window_of_no_llama": ({"sliding_window": 16}, as_it_is),
}
"""Name to keys of config.json and what is done to the tensors."""


def build(name: str, directory: Path) -> Path:
    """The case's checkpoint."""
    overrides, change = CASES[name]
    config = checkpoints.tiny_config(**{"model_type": "llama", "max_position_embeddings": 512, **overrides})
    tensors = checkpoints.random_tensors(config)
    change(tensors)
    return checkpoints.save_checkpoint(directory, config, tensors)


def input_ids() -> Any:
    """Token ids (1, 200) int32 of all cases."""
    return np.random.default_rng(12).integers(0, 128, (1, 200)).astype(np.int32)


def main() -> None:
    """Writes the file beside this script."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    golden = {}
    ids = torch.from_numpy(input_ids().astype(np.int64))
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            model = AutoModelForCausalLM.from_pretrained(
                build(name, Path(folder)), dtype=torch.float32, attn_implementation="eager"
            )
            with torch.no_grad():
                golden[name] = model(ids).logits[:, POSITIONS].numpy().copy()
    save_file(golden, HERE / "source_logits.safetensors")


if __name__ == "__main__":
    main()
