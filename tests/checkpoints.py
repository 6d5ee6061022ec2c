"""Builders of Hugging Face directories for tests: tiny models with real weights, large ones with headers alone.

`import ml_dtypes` gives NumPy its bfloat16. Nothing here uses the package under test, so that a reader's or
writer's fault cannot hide in its own fixture.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[Any]]

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_SPELLING = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "uint8": "U8",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "granite": "GraniteForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2")
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
}
# Keys that a family's tiny config has beyond those of all; `None` is written as null.
_FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 32},  # on purpose not hidden_size / num_attention_heads
    "ministral3": {
        "head_dim": 32,
        "rope_theta": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.4,
    },
    "phi3": {"pad_token_id": 0},
    "seed_oss": {"head_dim": 32, "attention_bias": True, "attention_out_bias": False},
    "mixtral": {"sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {
        "head_dim": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v2": {**_DEEPSEEK, "norm_topk_prob": False, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_DEEPSEEK, "norm_topk_prob": True, "num_nextn_predict_layers": 0},
    "kimi_k2": {**_DEEPSEEK, "norm_topk_prob": True, "num_nextn_predict_layers": 0},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 96,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
}
_LARGE: dict[str, dict[str, Any]] = {
    "llama-3-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 128001,
        "files": 30,
    },
    "qwen3-32b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 151645,
        "files": 17,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 151645,
        "files": 118,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        "files": 163,
    },
}


def tiny_config(model_type: str = "llama", **overrides: Any) -> dict[str, Any]:
    """A config.json of two layers, 64 channels, 4 query heads over 2 KV heads; `overrides` are its keys."""
    config: dict[str, Any] = {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    return {**config, **_FAMILY_KEYS.get(model_type, {}), **overrides}


def _mlp_rows(config: dict[str, Any], layer: int) -> list[tuple[str, int, int, bool]]:
    """Name, outputs, inputs and bias of each matrix of a layer's mlp, routers and experts included."""
    kind, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]

    def gated(prefix: str, size: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Any:
        bias = bool(config.get("mlp_bias"))
        gate, up, down = names
        return [
            (f"{prefix}.{gate}", size, hidden, bias),
            (f"{prefix}.{up}", size, hidden, bias),
            (f"{prefix}.{down}", hidden, size, bias),
        ]

    if kind == "mixtral":
        rows = [("block_sparse_moe.gate", config["num_local_experts"], hidden, False)]
        for expert in range(config["num_local_experts"]):
            rows += gated(f"block_sparse_moe.experts.{expert}", inner, ("w1", "w3", "w2"))
        return rows
    if kind in ("glm4_moe", *_LATENT) and layer >= config["first_k_dense_replace"]:
        rows = [("mlp.gate", config["n_routed_experts"], hidden, False)]
        for expert in range(config["n_routed_experts"]):
            rows += gated(f"mlp.experts.{expert}", config["moe_intermediate_size"])
        return rows + gated("mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])
    if kind == "phi3":
        return [("mlp.gate_up_proj", 2 * inner, hidden, False), ("mlp.down_proj", hidden, inner, False)]
    if kind not in ("qwen2_moe", "qwen3_moe") or layer in config["mlp_only_layers"]:
        return gated("mlp", inner)
    rows = [("mlp.gate", config["num_experts"], hidden, False)]
    for expert in range(config["num_experts"]):
        rows += gated(f"mlp.experts.{expert}", config["moe_intermediate_size"])
    if kind == "qwen2_moe":
        rows += gated("mlp.shared_expert", config["shared_expert_intermediate_size"])
        rows.append(("mlp.shared_expert_gate", 1, hidden, False))
    return rows


def _attention_rows(config: dict[str, Any]) -> list[tuple[str, int, int, bool]]:
    """Likewise of its attention."""
    hidden, heads, kind = config["hidden_size"], config["num_attention_heads"], config["model_type"]
    bias = bool(config.get("attention_bias"))
    if kind in _LATENT:
        nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
        query = [("self_attn.q_proj", heads * (nope + rope), hidden, False)]
        if rank is not None:
            query = [
                ("self_attn.q_a_proj", rank, hidden, bias),
                ("self_attn.q_b_proj", heads * (nope + rope), rank, False),
            ]
        return [
            *query,
            ("self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden, bias),
            ("self_attn.kv_b_proj", heads * (nope + value), kv_rank, False),
            ("self_attn.o_proj", hidden, heads * value, bias),
        ]
    head_dim = config.get("head_dim") or hidden // heads
    query_size, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    if kind == "phi3":
        return [
            ("self_attn.qkv_proj", query_size + 2 * kv, hidden, False),
            ("self_attn.o_proj", hidden, query_size, False),
        ]
    qkv_bias = bias or kind in ("qwen2", "qwen2_moe")
    return [
        ("self_attn.q_proj", query_size, hidden, qkv_bias),
        ("self_attn.k_proj", kv, hidden, qkv_bias),
        ("self_attn.v_proj", kv, hidden, qkv_bias),
        ("self_attn.o_proj", hidden, query_size, bool(config.get("attention_out_bias", bias and kind != "glm4_moe"))),
    ]


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Full name to shape of every tensor the model class saves for this config."""
    hidden, heads, kind = config["hidden_size"], config["num_attention_heads"], config["model_type"]
    head_dim = config.get("head_dim") or hidden // heads
    query, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    attention = _attention_rows(config)
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if kind in ("qwen3", "qwen3_moe") or config.get("use_qk_norm"):
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    if kind in _LATENT:
        norms["self_attn.kv_a_layernorm"] = config["kv_lora_rank"]
        if config["q_lora_rank"] is not None:
            norms["self_attn.q_a_layernorm"] = config["q_lora_rank"]
    if kind == "olmo2":
        norms = {"post_attention_layernorm": hidden, "post_feedforward_layernorm": hidden}
        norms |= {"self_attn.q_norm": query, "self_attn.k_norm": kv}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm, size in norms.items():
            shapes[f"{prefix}{norm}.weight"] = (size,)
        for name, out_features, in_features, bias in [*attention, *_mlp_rows(config, layer)]:
            shapes[f"{prefix}{name}.weight"] = (out_features, in_features)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (out_features,)
            if kind in ("glm4_moe", "deepseek_v3", "kimi_k2") and name == "mlp.gate":
                shapes[f"{prefix}{name}.e_score_correction_bias"] = (out_features,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_tensors(config: dict[str, Any], dtype: str = "float32", seed: int = 0) -> Tensors:
    """Weights that keep activations of order one; norms near 1, a few loud channels, as real models have."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("norm.weight"):
            values = 1.0 + 0.1 * rng.standard_normal(shape)
            values[rng.integers(shape[0])] *= 4.0
        elif name.endswith(("_bias", ".bias")):
            values = 0.1 * rng.standard_normal(shape)
        elif name == "model.embed_tokens.weight":
            values = 0.5 * rng.standard_normal(shape)
        else:
            values = rng.standard_normal(shape) / math.sqrt(shape[1])
        tensors[name] = values.astype(np.float32).astype(DTYPES[dtype])
    return tensors


def raw_safetensors(entries: dict[str, Any], data: bytes, header_length: int | None = None) -> bytes:
    """A safetensors file of exactly this header and data, right or wrong; `header_length` overrides the true one."""
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if header_length is None else header_length) + header + data


def save_safetensors(path: Path, tensors: Tensors) -> None:
    """Writes tensors back to back in the order given."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        entries[name] = {
            "dtype": _SPELLING[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    path.write_bytes(raw_safetensors(entries, b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values())))


def save_checkpoint(directory: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """Writes config.json, generation_config.json and the tensors over `shards` files, indexed when several."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    if shards == 1:
        save_safetensors(directory / "model.safetensors", tensors)
        return directory
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_safetensors(directory / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def save_tokenizer(directory: Path, vocab_size: int = 128) -> None:
    """A byte-pair tokenizer.json without merges beyond single characters: any ASCII text is in its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = ["<unk>", "<s>", "</s>", "Ġ", *(chr(code) for code in range(33, 127))]
    vocab = {symbol: index for index, symbol in enumerate(symbols[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )


def tiny_checkpoint(
    directory: Path,
    model_type: str = "llama",
    dtype: str = "float32",
    shards: int = 1,
    *,
    tie: bool = False,
    num_layers: int = 2,
    seed: int = 0,
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """A random model of `num_layers` layers and 64 channels in Hugging Face form; returns `directory`.

    `overrides` are keys of config.json (`hidden_size=128`, `attention_bias=True`, ...).
    """
    config = tiny_config(
        model_type, tie_word_embeddings=tie, num_hidden_layers=num_layers, torch_dtype=dtype, **overrides
    )
    save_checkpoint(directory, config, random_tensors(config, dtype, seed), shards)
    if tokenizer:
        save_tokenizer(directory, config["vocab_size"])
    return directory


def header_only_checkpoint(directory: Path, name: str) -> Path:
    """Real shapes of a model of `_LARGE` as sparse files: true headers, data of holes.

    In bfloat16, or in FP8 blocks with layers of multi-token prediction behind the last, where its config says so.
    """
    large = dict(_LARGE[name])
    num_files = large.pop("files")
    config = {
        "architectures": [_CLASSES[large["model_type"]]],
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        **large,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    stored = list(_stored(config))
    total = sum(_nbytes(dtype, shape) for _, dtype, shape in stored)
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for tensor, dtype, shape in stored:
        if filled > total * len(files) / num_files:
            files.append({})
        files[-1][tensor] = (dtype, shape)
        filled += _nbytes(dtype, shape)
    weight_map = {}
    for number, part in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map.update(dict.fromkeys(part, file))
        _save_sparse(directory / file, part)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _stored(config: dict[str, Any]) -> Any:
    """Name, dtype and shape of each tensor as the files have it."""
    coded = config.get("quantization_config")
    further = config.get("num_nextn_predict_layers", 0)
    shapes = tensor_shapes({**config, "num_hidden_layers": config["num_hidden_layers"] + further})
    for tensor, shape in shapes.items():
        if coded is None or "layers" not in tensor or len(shape) != 2 or tensor.endswith("mlp.gate.weight"):
            yield tensor, "F32" if tensor.endswith("e_score_correction_bias") else "BF16", shape
            continue
        yield tensor, "F8_E4M3", shape
        blocks = zip(shape, coded["weight_block_size"], strict=True)
        yield f"{tensor}_scale_inv", "F32", tuple(-(-size // block) for size, block in blocks)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype] * math.prod(shape)


def _save_sparse(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor, (dtype, shape) in shapes.items():
        end = offset + _nbytes(dtype, shape)
        entries[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = raw_safetensors(entries, b"")
    path.write_bytes(header)
    with path.open("r+b") as file:
        file.truncate(len(header) + offset)  # a hole: no blocks on disk
