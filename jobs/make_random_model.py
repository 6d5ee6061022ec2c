"""Makes a model of a real one's widths with random weights and few layers, to measure what a job costs at that width.

    python jobs/make_random_model.py models/llama8b-2l --shape llama-3-8b --layers 2
    python jobs/make_random_model.py models/llama70b-1l --shape llama-3-70b --layers 1
    python jobs/make_random_model.py models/qwen30b-1l --shape qwen3-30b-a3b --layers 1

bfloat16 weights, normal with the usual deviation of 0.02; eight channels of every norm are eightfold, so that there are
outliers to smooth. There is no tokenizer: calibrate on a column of ids.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

SHAPES = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
HEAD_DIM, VOCABULARY = 128, 128256
DEVIATION = 0.02
OUTLIERS, OUTLIER_SIZE = 8, 8.0  # channels of each norm, and by how much they are larger

Array = npt.NDArray[np.generic]


def config(shape: str, layers: int) -> dict[str, object]:
    """The content of config.json."""
    kind: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if "num_experts" in SHAPES[shape]:
        kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True}
    return {
        **kind,
        **SHAPES[shape],
        "head_dim": HEAD_DIM,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "torch_dtype": "bfloat16",
    }


def weight(generator: np.random.Generator, rows: int, columns: int) -> Array:
    """A random matrix in bfloat16, made some rows at a time."""
    made = np.empty((rows, columns), dtype=ml_dtypes.bfloat16)
    for start in range(0, rows, 1024):
        part = generator.standard_normal((min(1024, rows - start), columns), dtype=np.float32)
        made[start : start + 1024] = part * np.float32(DEVIATION)
    return made


def norm(generator: np.random.Generator, channels: int) -> Array:
    """A norm's weight: ones, but for some outliers."""
    made = np.ones(channels, dtype=np.float32)
    made[generator.choice(channels, OUTLIERS, replace=False)] = OUTLIER_SIZE
    return made.astype(ml_dtypes.bfloat16)


def mlp(sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Name and shape of a layer's linears behind its attention: of one gated mlp, or of a router and its experts."""

    def gated(prefix: str, inner: int) -> dict[str, tuple[int, int]]:
        hidden = sizes["hidden_size"]
        rows = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        return {f"{prefix}.{name}": size for name, size in rows.items()}

    if "num_experts" not in sizes:
        return gated("mlp", sizes["intermediate_size"])
    linears = {"mlp.gate": (sizes["num_experts"], sizes["hidden_size"])}
    for number in range(sizes["num_experts"]):
        linears |= gated(f"mlp.experts.{number}", sizes["moe_intermediate_size"])
    return linears


def shards(shape: str, layers: int, seed: int) -> Iterator[tuple[str, dict[str, Array]]]:
    """Name and tensors of each file: what lies outside the layers, and each layer."""
    sizes, generator = SHAPES[shape], np.random.default_rng(seed)
    hidden = sizes["hidden_size"]
    queries, keys = sizes["num_attention_heads"] * HEAD_DIM, sizes["num_key_value_heads"] * HEAD_DIM
    outer = {
        "model.embed_tokens.weight": weight(generator, VOCABULARY, hidden),
        "model.norm.weight": norm(generator, hidden),
        "lm_head.weight": weight(generator, VOCABULARY, hidden),
    }
    yield "outer", outer
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        **mlp(sizes),
    }
    mixture = "num_experts" in sizes
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": weight(generator, *size) for name, size in linears.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = norm(generator, hidden)
        for name in ("q_norm", "k_norm") if mixture else ():
            tensors[f"{prefix}.self_attn.{name}.weight"] = norm(generator, HEAD_DIM)
        yield f"layer-{layer:05d}", tensors


def write_model(directory: Path, shape: str, layers: int, seed: int) -> None:
    """Writes config.json, the weights and their index into `directory`, which exists."""
    index: dict[str, str] = {}
    for name, tensors in shards(shape, layers, seed):
        file = f"model-{name}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # save_file leaves it to its owner alone
        index |= dict.fromkeys(tensors, file)
    total = sum((directory / file).stat().st_size for file in set(index.values()))
    documents = {
        "config.json": config(shape, layers),
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": index},
    }
    for name, content in documents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("output", type=Path, help="directory to make")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b", help="whose widths (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (%(default)s)")
    options = parser.parse_args()
    output: Path = options.output
    if output.exists():
        raise SystemExit(f"error: {output} exists; name another directory or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        model = Path(temporary, "model")
        model.mkdir()
        write_model(model, options.shape, options.layers, options.seed)
        os.replace(model, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
