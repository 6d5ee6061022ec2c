"""What people take for a float model: adapters, quantised weights, rerankers. Each is refused by what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import random_tensors, raw_safetensors, save_checkpoint, tiny_checkpoint, tiny_config

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import CheckpointError

UP = "model.layers.0.mlp.up_proj.weight"

Tensors = dict[str, Any]


def replaced(*names_and_values: tuple[str, Any]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[UP]
        tensors.update(dict(names_and_values))

    return change


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        items = list(tensors.items())
        tensors.clear()
        tensors.update({rename(name): array for name, array in items})

    return change


CODES = np.ones((8, 16), np.int32)
KINDS: list[tuple[str, Callable[[Tensors], Any], str]] = [
    (
        "GPTQ without config",
        replaced((UP.replace("weight", "qweight"), CODES), (UP.replace("weight", "g_idx"), CODES)),
        "up_proj.qweight' (int32) is of quantised weights (GPTQ or AWQ), though config.json has no quantization_config",
    ),
    (
        "packed",
        replaced((UP.replace("weight", "weight_packed"), CODES)),
        "up_proj.weight_packed' (int32) is of quantised weights (compressed-tensors)",
    ),
    (
        "bitsandbytes",
        replaced((UP, np.ones((4096, 1), np.uint8)), (f"{UP}.absmax", np.ones(64, np.float32))),
        "up_proj.weight.absmax' (float32) is of quantised weights (bitsandbytes)",
    ),
    (
        "int8 of bitsandbytes",
        replaced((UP, np.ones((128, 64), np.int8)), (UP.replace("weight", "SCB"), np.ones(128, np.float32))),
        "is of quantised weights (bitsandbytes)",
    ),
    (
        "LoRA not merged",
        renamed(lambda name: name.replace("up_proj.weight", "up_proj.base_layer.weight")),
        "up_proj.base_layer.weight' belongs to an adapter (LoRA or its like) that is not merged; merge",
    ),
    (
        "LoRA beside the weights",
        lambda tensors: tensors.update({UP.replace("weight", "lora_A.weight"): np.ones((4, 64), np.float32)}),
        "up_proj.lora_A.weight' belongs to an adapter (LoRA or its like) that is not merged",
    ),
    (
        "peft's names",
        renamed(lambda name: f"base_model.model.{name}"),
        "names begin with 'base_model.model.', as peft saves them, and loaders look for 'model.embed_tokens.weight'",
    ),
    ("compiled", renamed(lambda name: f"_orig_mod.{name}"), "names begin with '_orig_mod.', as torch.compile saves"),
    ("wrapped", renamed(lambda name: f"module.{name}"), "names begin with 'module.', as DistributedDataParallel"),
    (
        "reward model",
        lambda tensors: tensors.update({"score.weight": tensors.pop("lm_head.weight")[:1]}),
        "'score.weight': this is a classifier, reward model or reranker, and causal language models are served",
    ),
    (
        "value head",
        lambda tensors: tensors.update({"v_head.summary.weight": np.ones((1, 64), np.float32)}),
        "'v_head.summary.weight': this is a model with a value head",
    ),
    (
        "embedding model",
        renamed(lambda name: name.removeprefix("model.")),
        "names lack the prefix 'model.', as embedding models and rerankers are saved: save the causal language model",
    ),
    (
        "vision",
        lambda tensors: tensors.update({"model.visual.patch_embed.weight": np.ones((4, 4), np.float32)}),
        "'model.visual.patch_embed.weight': this model reads images too",
    ),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in KINDS], ids=[row[0] for row in KINDS])
def test_each_kind_of_tensors_is_refused_by_what_it_is(
    change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    """Not "complete the download", which would not help."""
    tensors = random_tensors(tiny_config())
    change(tensors)
    with pytest.raises(CheckpointError) as refused:
        CheckpointReader(save_checkpoint(tmp_path / "m", tiny_config(), tensors))
    assert message in str(refused.value)
    assert "complete the download" not in str(refused.value)


def save_fp8(directory: Path, leaf: str) -> Path:
    """A tiny model with one weight in FP8 and a scale beside it."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(tiny_config()))
    entries: dict[str, Any] = {}
    data = b""
    for name, array in random_tensors(tiny_config()).items():
        wanted = {name: array}
        if name == UP:
            wanted = {name: array.astype(ml_dtypes.float8_e4m3fn), name.replace("weight", leaf): np.ones(1, np.float32)}
        for key, value in wanted.items():
            spelling = "F8_E4M3" if value.dtype.itemsize == 1 else "F32"
            begin, data = len(data), data + value.tobytes()
            entries[key] = {"dtype": spelling, "shape": list(value.shape), "data_offsets": [begin, len(data)]}
    (directory / "model.safetensors").write_bytes(raw_safetensors(entries, data))
    return directory


@pytest.mark.parametrize(("leaf", "kind"), [("weight_scale_inv", "FP8 in blocks"), ("weight_other", "FP8")])
def test_fp8_is_told_with_and_without_its_scales(leaf: str, kind: str, tmp_path: Path) -> None:
    """By the name of the scales, and by the dtype alone."""
    with pytest.raises(CheckpointError) as refused:
        CheckpointReader(save_fp8(tmp_path / "m", leaf))
    assert f"is of quantised weights ({kind}), though config.json has no quantization_config" in str(refused.value)


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("hf_quant_config.json", "ModelOpt"),
        ("quantize_config.json", "AutoGPTQ"),
        ("quant_config.json", "AutoAWQ"),
        ("quant_model_description.json", "ModelSlim's layout"),
    ],
)
def test_a_file_that_tells_of_quantized_weights_is_named(file: str, method: str, tmp_path: Path) -> None:
    """With such weights the float model is asked for; with float weights, that the file be moved away."""
    quantized = save_fp8(tmp_path / "quantised", "weight_scale")
    (quantized / file).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"^{file} describes quantised weights \({method}\), and .*set model to"):
        CheckpointReader(quantized)
    merged = tiny_checkpoint(tmp_path / "merged")
    (merged / file).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"^{file} speaks .* every tensor is in float, .*; move the file away"):
        CheckpointReader(merged)


def test_a_stale_quantization_config_over_float_weights_is_told_from_a_true_one(tmp_path: Path) -> None:
    """Merging an adapter into a model loaded in 4 bits leaves the key behind; the weights are the float ones."""
    stale = tiny_checkpoint(tmp_path / "stale", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError) as refused:
        CheckpointReader(stale)
    said = str(refused.value)
    assert said.startswith(
        "config.json: quantization_config speaks of quantised weights (bitsandbytes), and every tensor"
    )
    assert "remove the key from config.json" in said
    assert "set model" not in said


def test_a_true_quantization_config_is_refused_by_its_method(tmp_path: Path) -> None:
    """Method and an example are named."""
    directory = save_fp8(tmp_path / "m", "weight_scale_inv")
    (directory / "config.json").write_text(
        json.dumps({**tiny_config(), "quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(CheckpointError, match=r"quantization_config describes quantised weights \(fp8\), and model\.s"):
        CheckpointReader(directory)


def test_an_adapter_directory_has_no_config_and_is_told(tmp_path: Path) -> None:
    """Peft saves two files, and neither is the model's."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"^adapter_config\.json: this is an adapter \(LoRA\), not a model; merge"
    ):
        CheckpointReader(tmp_path)


def test_an_adapter_beside_a_model_is_not_guessed_at(tmp_path: Path) -> None:
    """Transformers with peft installed applies it, without peft it does not."""
    directory = tiny_checkpoint(tmp_path / "m")
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"an adapter .* lies beside the model's weights, and loaders differ"):
        CheckpointReader(directory)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("consolidated.safetensors", "weights under Mistral's own names"),
        ("model.Q4_K_M.gguf", "is a GGUF file"),
        ("diffusion.safetensors", "name the file model.safetensors if it is the only one"),
    ],
)
def test_weights_in_another_form_are_named(file: str, message: str, tmp_path: Path) -> None:
    """A directory without the files that loaders read says what it has instead."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("head", ["regression_layer.weight", "classification_head.weight", "my_head.0.weight"])
def test_a_head_of_a_name_that_nobody_knows_is_told_from_a_tied_one(head: str, tmp_path: Path) -> None:
    """To tie the embedding would lead to the next refusal."""
    config = tiny_config()
    tensors = random_tensors(config)
    del tensors["lm_head.weight"]
    tensors[head] = np.ones((1, 64), np.float32)
    with pytest.raises(CheckpointError, match=f"'{head}' may be a head of another kind") as refused:
        CheckpointReader(save_checkpoint(tmp_path / "m", config, tensors))
    assert "tie_word_embeddings" not in str(refused.value)


def test_files_that_the_index_leaves_out_are_told(tmp_path: Path) -> None:
    """One of another download, and a model.safetensors that loaders take in the index's place."""
    config = tiny_config()
    model = save_checkpoint(tmp_path / "m", config, random_tensors(config), shards=2)
    (model / "model-00003-of-00003.safetensors").write_bytes((model / "model-00001-of-00002.safetensors").read_bytes())
    (note,) = CheckpointReader(model).notes
    assert note == "'model-00003-of-00003.safetensors': left out, since model.safetensors.index.json does not list it"
    (model / "model.safetensors").write_bytes((model / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds the model; .*index\.json .* not read"):
        CheckpointReader(model)
