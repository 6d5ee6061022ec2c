"""`check`: clean directories pass, and every way to break one is caught by the name of its rule."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dialects
import numpy as np
import pytest
from checkpoints import random_tensors, save_checkpoint, save_safetensors, tiny_config
from dialects import load_json, save_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gs_dist.checkpoint.check import check, check_all, judge
from gs_dist.checkpoint.dialects.ascend.codec import AscendCodec
from gs_dist.checkpoint.dialects.compressed_tensors.codec import CompressedTensorsCodec
from gs_dist.checkpoint.dialects.golden_stick.codec import GoldenStickCodec
from gs_dist.checkpoint.engines import ENGINES
from gs_dist.checkpoint.manifest import Fingerprints, publish_layer, publish_outer, read_manifest
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.provenance import write_provenance
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import UserError
from gs_dist.model.families import read_architecture
from gs_dist.recipe.policy import AlgoArgs, PrecisionRecovery, QuantPolicy

INDEX, OTHER_INDEX = "model.safetensors.index.json", "quant_model_weights.safetensors.index.json"
ASCEND, GOLDEN = "quant_model_description.json", "quantization_description.json"
LAYER, RUN_LAYER = "model-00001.safetensors", "layer-00001.safetensors"
OUTER = "model-outer.safetensors"
P = "model.layers.1."
UP = P + "mlp.up_proj."

W4_GROUPS_OF_256 = QuantPolicy(weight_quant_dtype="qint4x2", weight_quant_granularity="per_group", group_size=256)
W4_ZERO_POINTS = dialects.W4A16_GROUPS.model_copy(update={"weight_symmetric": False})
W4_GROUP_INDEX = dialects.W4A16_GROUPS.model_copy(
    update={"precision_recovery": PrecisionRecovery.GPTQ, "algo_args": AlgoArgs(desc_act=True)}
)


def two_sizes() -> dict[str, QuantPolicy | None]:
    """Gates in groups of 128, everything else in groups of 64."""
    policies = dialects.uniform_policies(read_architecture(tiny_config()), dialects.W4A16_GROUPS)
    wide = dialects.W4A16_GROUPS.model_copy(update={"group_size": 128})
    return {name: wide if name.endswith("gate_proj") else policy for name, policy in policies.items()}


Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One clean directory a name; tests break copies of them."""
    root = tmp_path_factory.mktemp("pristine")
    asymmetric = dialects.W8A8_ASYMMETRIC
    model = {"model_type": "qwen2", "hidden_size": 128, "zero_point": 9}
    odd = {"hidden_size": 68, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 34}
    specs: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "ascend": (AscendCodec(), asymmetric, {**model, "kv_cache": "per_channel"}),
        "ascend-float16": (AscendCodec(), asymmetric, {**model, "dtype": "float16"}),
        "ascend-no-bias": (AscendCodec(), dialects.W8A8, {}),
        "ascend-tied": (AscendCodec(), dialects.W8A16, {"tie_word_embeddings": True}),
        "golden": (GoldenStickCodec(), asymmetric, model),
        "golden-w4": (GoldenStickCodec(), dialects.W4A16_GROUPS, {"hidden_size": 128}),
        "golden-w8a16": (GoldenStickCodec(), dialects.W8A16, {}),
        "ct": (CompressedTensorsCodec(), dialects.W8A8, {}),
        "ct-asymmetric": (CompressedTensorsCodec(), asymmetric, {}),
        "ct-w4": (CompressedTensorsCodec(), dialects.W4A16_GROUPS, {"hidden_size": 128}),
        "ct-w4-odd": (CompressedTensorsCodec(), dialects.W4A16, odd),
        "ct-dynamic": (CompressedTensorsCodec(), dialects.W8A8_DYNAMIC, {}),
        "ct-cache": (CompressedTensorsCodec(), dialects.W8A16, {"hidden_size": 128, "kv_cache": "per_channel"}),
        "ct-w4-zero-points": (CompressedTensorsCodec(), W4_ZERO_POINTS, {"hidden_size": 128}),
        "ct-w8-zero-points": (CompressedTensorsCodec(), QuantPolicy(weight_symmetric=False), {"hidden_size": 128}),
        "ct-w8a8-zero-points": (
            CompressedTensorsCodec(),
            QuantPolicy(weight_symmetric=False, act_quant_dtype="int8", act_quant_granularity="per_token"),
            {},
        ),
        "ct-w4a8": (CompressedTensorsCodec(), dialects.W4A8, {}),
        "ct-wide": (CompressedTensorsCodec(), W4_GROUPS_OF_256, {"hidden_size": 256, "intermediate_size": 256}),
        "ct-wide-float16": (
            CompressedTensorsCodec(),
            W4_GROUPS_OF_256,
            {"hidden_size": 256, "intermediate_size": 256, "dtype": "float16"},
        ),
        "ct-two-sizes": (CompressedTensorsCodec(), two_sizes(), {"hidden_size": 128}),
        "ct-group-index": (CompressedTensorsCodec(), W4_GROUP_INDEX, {"hidden_size": 128}),
    }
    for name, (dialect, policy, options) in specs.items():
        dialects.save_model(root / name, dialect, policy, **options)
    return {name: root / name for name in specs}


def edit_json(file: str, edit: Callable[[dict[str, Any]], object]) -> Break:
    """Loads a JSON file of the directory, edits it in place, saves it."""

    def apply(directory: Path) -> None:
        content = load_json(directory / file)
        edit(content)
        save_json(directory / file, content)

    return apply


def edit_tensors(edit: Callable[[dict[str, np.ndarray]], object], file: str = LAYER, total: bool = True) -> Break:
    """Loads a shard's tensors as writable arrays, edits them, saves them; the index follows."""

    def apply(directory: Path) -> None:
        reader = CheckpointReader(directory, quantized=True)
        names = [name for name, info in reader.tensors.items() if info.file == file]
        tensors = {name: array.copy() for name, array in reader.read(names).items()}
        before = sum(array.nbytes for array in tensors.values())
        edit(tensors)
        save_safetensors(directory / file, tensors)
        index = load_json(directory / INDEX)
        if total:
            index["metadata"]["total_size"] += sum(array.nbytes for array in tensors.values()) - before
        kept = {name: held for name, held in index["weight_map"].items() if held != file or name in tensors}
        index["weight_map"] = {**kept, **dict.fromkeys(tensors, file)}
        save_json(directory / INDEX, index)

    return apply


def replace(name: str, change: Callable[[np.ndarray], np.ndarray], file: str = LAYER) -> Break:
    """Replaces a tensor by a function of it."""
    return edit_tensors(lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))}), file)


def put(name: str, value: float, position: int = 3, file: str = LAYER) -> Break:
    """Writes one number into a tensor."""

    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[min(position, array.size - 1)] = value
        return array

    return replace(name, change, file)


def cut(file: str, nbytes: int) -> Break:
    """Cuts bytes off a file's end, or appends them where negative."""

    def apply(directory: Path) -> None:
        data = (directory / file).read_bytes()
        (directory / file).write_bytes(data[:-nbytes] if nbytes > 0 else data + b"\0" * -nbytes)

    return apply


def write(file: str, data: bytes) -> Break:
    """Replaces a file's content."""
    return lambda directory: (directory / file).write_bytes(data) and None


def remove(file: str) -> Break:
    """Deletes a file."""
    return lambda directory: (directory / file).unlink()


def copy(file: str, to: str) -> Break:
    """Copies a file within the directory."""
    return lambda directory: shutil.copy(directory / file, directory / to) and None


def rename(file: str, to: str) -> Break:
    """Renames a file within the directory."""
    return lambda directory: (directory / file).rename(directory / to) and None


def without_entry(file: str, key: str) -> Break:
    """Deletes a key of a JSON file."""
    return edit_json(file, lambda content: content.pop(key))


def with_entry(file: str, **entries: Any) -> Break:
    """Sets keys of a JSON file."""
    return edit_json(file, lambda content: content.update(entries))


def labelled(file: str, **labels: str) -> Break:
    """Sets labels of layer 1's tensors; dots are spelt as double underscores."""
    return with_entry(file, **{P + name.replace("__", "."): label for name, label in labels.items()})


def duplicate_tensor(directory: Path) -> None:
    """Puts a tensor of the layer into outer.safetensors as well."""
    norm = CheckpointReader(directory, quantized=True).read([P + "input_layernorm.weight"])
    edit_tensors(lambda tensors: tensors.update(norm), OUTER)(directory)


def scheme(edit: Callable[[dict[str, Any]], object]) -> Break:
    """Edits the first config group of a compressed-tensors config."""
    return edit_json("config.json", lambda content: edit(content["quantization_config"]["config_groups"]["group_0"]))


def quantization(**entries: Any) -> Break:
    """Sets keys of quantization_config."""
    return edit_json("config.json", lambda content: content["quantization_config"].update(entries))


def unfold_bias(tensors: dict[str, np.ndarray]) -> None:
    """What a writer that forgets the bias would leave in quant_bias."""
    sums = tensors[P + "self_attn.q_proj.weight"].astype(np.int64).sum(axis=1)
    tensors[P + "self_attn.q_proj.quant_bias"] = (-9 * sums).astype(np.int32)


def fold_bias(tensors: dict[str, np.ndarray]) -> None:
    """What a writer of the other dialect would leave in quant_bias."""
    bias, deq = tensors[P + "self_attn.q_proj.bias"].astype(np.float32), tensors[P + "self_attn.q_proj.deq_scale"]
    tensors[P + "self_attn.q_proj.quant_bias"] += np.rint(bias / deq).astype(np.int32)


# name of the case: (directory, engine, rule, how to break it)
BROKEN: dict[str, tuple[str, str | None, str, Break]] = {
    # files
    "truncated shard": ("ascend", None, "file-truncated", cut(LAYER, 100)),
    "shard cut within its header": ("ascend", None, "file-truncated", write(LAYER, b"\x00\x10\0\0\0\0\0\0{")),
    "bytes after the data": ("ascend", None, "file-sound", cut(LAYER, -8)),
    "shard that is a pointer": ("ascend", None, "file-sound", write(LAYER, b"version https://git-lfs")),
    "missing shard": ("ascend", None, "file-present", remove(LAYER)),
    "stray shard": ("ascend", None, "file-listed", copy(LAYER, "model-old.safetensors")),
    "two index files": ("ascend", None, "index-single", copy(INDEX, OTHER_INDEX)),
    "index of another name": (
        "ascend",
        None,
        "index-name",
        rename(INDEX, OTHER_INDEX),
    ),
    "no index": ("ascend", None, "index-present", remove(INDEX)),
    "index that is no JSON": ("ascend", None, "json-valid", write(INDEX, b"{")),
    "index without a map": ("ascend", None, "index-map", with_entry(INDEX, weight_map=[])),
    "index total": ("ascend", None, "index-total-size", with_entry(INDEX, metadata={"total_size": 7})),
    "index that leads outside": (
        "ascend",
        None,
        "file-inside",
        edit_json(INDEX, lambda c: c["weight_map"].update({P + "input_layernorm.weight": "../a.safetensors"})),
    ),
    "index entry of another file": (
        "ascend",
        None,
        "index-entry",
        edit_json(INDEX, lambda c: c["weight_map"].update({P + "input_layernorm.weight": OUTER})),
    ),
    "tensor the index forgets": (
        "ascend",
        None,
        "index-entry",
        edit_json(INDEX, lambda c: c["weight_map"].pop(P + "input_layernorm.weight")),
    ),
    "tensor in two files": ("ascend", None, "tensor-unique", duplicate_tensor),
    # config
    "no config": ("ascend", None, "config-present", remove("config.json")),
    "config of another size": ("ascend", None, "tensor-shape", with_entry("config.json", num_key_value_heads=4)),
    "config of fewer layers": ("ascend", None, "tensor-expected", with_entry("config.json", num_hidden_layers=1)),
    "config of more layers": ("ascend", None, "tensor-present", with_entry("config.json", num_hidden_layers=3)),
    "config that contradicts itself": ("ascend", None, "config-values", with_entry("config.json", hidden_size="wide")),
    "quantization_config left": (
        "ascend",
        None,
        "config-no-quantization",
        with_entry("config.json", quantization_config={"quant_method": "ascend"}),
    ),
    # tensors
    "missing tensor": ("ascend", None, "tensor-present", edit_tensors(lambda t: t.pop(UP + "deq_scale"))),
    "missing norm": ("ascend", None, "tensor-present", edit_tensors(lambda t: t.pop(P + "input_layernorm.weight"))),
    "tensor of no linear": (
        "ascend",
        None,
        "tensor-expected",
        edit_tensors(lambda t: t.update({UP + "smooth_scale": np.ones(4, np.float32)})),
    ),
    "swapped shape": ("ascend", None, "tensor-shape", replace(P + "self_attn.k_proj.weight", lambda a: a.T)),
    "flat weight scale": ("ascend", None, "tensor-shape", replace(UP + "weight_scale", lambda a: a[:, 0])),
    "float weight": (
        "ascend",
        None,
        "tensor-dtype",
        replace(UP + "weight", lambda a: a.astype(np.float32)),
    ),
    "integer norm": (
        "ascend",
        None,
        "tensor-dtype",
        replace(P + "input_layernorm.weight", lambda a: a.astype(np.int8)),
    ),
    "NaN scale": ("ascend", None, "value-finite", put(UP + "weight_scale", float("nan"))),
    "infinite embedding": (
        "ascend",
        None,
        "value-finite",
        put("model.embed_tokens.weight", float("inf"), 1000, OUTER),
    ),
    "zero scale": ("ascend", None, "scale-positive", put(UP + "weight_scale", 0.0)),
    "negative scale": ("ascend", None, "scale-positive", put(UP + "deq_scale", -1e-3)),
    "offset 200": (
        "ascend",
        None,
        "offset-range",
        replace(UP + "input_offset", lambda a: np.array([200], np.float32)),
    ),
    "offset of a half": (
        "ascend",
        None,
        "offset-range",
        replace(UP + "input_offset", lambda a: np.array([0.5], np.float32)),
    ),
    "weights with an offset": ("ascend", None, "offset-zero", put(UP + "weight_offset", 3)),
    "asymmetric cache": ("ascend", None, "offset-zero", put(P + "self_attn.v_proj.kv_cache_offset", 1)),
    "deq_scale of another linear": ("ascend", None, "deq-scale", replace(UP + "deq_scale", lambda a: a * 2)),
    "bias that was not folded": ("ascend", None, "quant-bias", edit_tensors(unfold_bias)),
    "quant_bias without the offset": (
        "ascend",
        None,
        "quant-bias",
        replace(UP + "quant_bias", lambda a: a * 0),
    ),
    "input scales that differ": (
        "ascend",
        None,
        "shared-input",
        edit_tensors(
            lambda t: t.update(
                {
                    UP + "input_scale": t[UP + "input_scale"] * 2,
                    UP + "deq_scale": t[UP + "deq_scale"] * 2,
                }
            )
        ),
    ),
    "float32 deq_scale in a float16 model": (
        "ascend-float16",
        None,
        "tensor-dtype",
        replace(UP + "deq_scale", lambda a: a.astype(np.uint32).view(np.float32)),
    ),
    "deq_scale shifted by a word": (
        "ascend-float16",
        None,
        "deq-scale-bits",
        put(UP + "deq_scale", 1 << 40),
    ),
    "deq_scale converted by value": ("ascend-float16", None, "deq-scale-bits", put(UP + "deq_scale", 0)),
    "tied head of other values": (
        "ascend-tied",
        None,
        "tied-weights",
        edit_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}), OUTER),
    ),
    # descriptions
    "missing FLOAT entry": ("ascend", None, "description-entry", without_entry(ASCEND, P + "input_layernorm.weight")),
    "missing entry of a linear": ("ascend", None, "description-entry", without_entry(ASCEND, UP + "weight")),
    "entry of no tensor": ("ascend", None, "description-extra", labelled(ASCEND, mlp__side_proj__weight="FLOAT")),
    "unknown label": ("ascend", None, "description-label", labelled(ASCEND, mlp__up_proj__weight="W3A3")),
    "float label on integers": ("ascend", None, "tensor-dtype", labelled(ASCEND, mlp__up_proj__weight="FLOAT")),
    "two descriptions": ("ascend", None, "description-single", copy(ASCEND, GOLDEN)),
    "no description": ("ascend", None, "description-present", remove(ASCEND)),
    "description that is no JSON": ("ascend", None, "json-valid", write(ASCEND, b"not json")),
    "cache scales without C8": ("ascend", None, "description-kv", without_entry(ASCEND, "kv_cache_type")),
    "another kind of the whole": (
        "ascend",
        None,
        "description-kind",
        with_entry(ASCEND, model_quant_type="W4A8_DYNAMIC"),
    ),
    "no version": ("ascend", None, "description-version", without_entry(ASCEND, "version")),
    # golden-stick
    "one input scale for all": (
        "golden",
        None,
        "tensor-shape",
        replace(UP + "input_scale", lambda a: a[:1]),
    ),
    "column scale": ("golden", None, "tensor-shape", replace(UP + "weight_scale", lambda a: a[:, None])),
    "folded bias": ("golden", None, "quant-bias", edit_tensors(fold_bias)),
    "unpacked int4": (
        "golden-w4",
        None,
        "tensor-shape",
        replace(UP + "weight", lambda a: np.repeat(a, 2, 1)),
    ),
    "groups the wrong way round": (
        "golden-w4",
        None,
        "tensor-shape",
        replace(UP + "weight_scale", lambda a: a.T),
    ),
    "float weight offset": (
        "golden-w4",
        None,
        "tensor-dtype",
        replace(UP + "weight_offset", lambda a: a.astype(np.float32)),
    ),
    # compressed-tensors
    "weight_shape": ("ct-w4", None, "weight-shape", put(UP + "weight_shape", 5, 0)),
    "bits in the padding": ("ct-w4-odd", None, "packing-padding", put(UP + "weight_packed", -1, 8)),
    "group size": ("ct-w4", None, "group-size", scheme(lambda g: g["weights"].update(group_size=100))),
    "three bits": ("ct", None, "scheme", scheme(lambda g: g["weights"].update(num_bits=3))),
    "four bits over codes of eight": ("ct", None, "code-range", scheme(lambda g: g["weights"].update(num_bits=4))),
    "eight bits over codes of four": ("ct-w4a8", None, "code-range", scheme(lambda g: g["weights"].update(num_bits=8))),
    "a format that is not the groups'": ("ct", None, "format", quantization(format="pack-quantized")),
    "a float head that is targeted": ("ct", None, "head", quantization(ignore=[])),
    "a pattern that could take for ever": ("ct", None, "config-groups", quantization(ignore=["re:(?!a)b", "lm_head"])),
    "another packing": ("ct", None, "scheme", scheme(lambda g: g.update(format="marlin-24"))),
    "linear that should be ignored": (
        "ct",
        None,
        "tensor-dtype",
        quantization(ignore=["lm_head", r"re:.*\.up_proj$"]),
    ),
    # engines
    "mixed labels in fused linears": (
        "ascend",
        "vllm-ascend",
        "fused-label",
        labelled(ASCEND, mlp__up_proj__weight="W8A16"),
    ),
    "head not listed as float": ("ascend-tied", "vllm-ascend", "float-entry", without_entry(ASCEND, "lm_head.weight")),
    "embedding not listed": (
        "ascend",
        "vllm-ascend",
        "float-entry",
        without_entry(ASCEND, "model.embed_tokens.weight"),
    ),
    "static input with a zero point": ("ct-asymmetric", "vllm-ascend", "engine-kind", lambda directory: None),
    "dense W4A16 on Ascend": ("ct-w4", "vllm-ascend", "engine-kind", lambda directory: None),
    "Golden Stick's files in vLLM-Ascend": ("golden", "vllm-ascend", "engine-format", lambda directory: None),
    "cache heads of 16": (
        "ascend",
        "vllm-ascend",
        "kv-head-dim",
        with_entry("config.json", num_attention_heads=8, num_key_value_heads=4),
    ),
    "float label on a bias": (
        "golden",
        "vllm-mindspore",
        "module-label",
        labelled(GOLDEN, self_attn__q_proj__bias="FLOAT"),
    ),
    "ModelSlim's layout in vLLM-MindSpore": (
        "ascend-no-bias",
        "vllm-mindspore",
        "engine-format",
        lambda directory: None,
    ),
    "a kind without a method in MindFormers": ("golden-w8a16", "mindformers", "engine-kind", lambda directory: None),
    "ModelSlim's layout in MindFormers": ("ascend-no-bias", "mindformers", "engine-format", lambda directory: None),
    "an int8 cache that vllm-ascend 0.23 has no loader for": (
        "ascend",
        "vllm-ascend==0.23.0",
        "engine-kv",
        lambda directory: None,
    ),
    "kind without a method": ("golden-w8a16", "vllm-mindspore", "engine-kind", lambda directory: None),
    "float32 input scale": (
        "golden",
        "vllm-mindspore",
        "engine-dtype",
        replace(P + "self_attn.o_proj.input_scale", lambda a: a.astype(np.float32)),
    ),
    "description by the end of its name": (
        "golden",
        "vllm-mindspore",
        "description-single",
        copy(GOLDEN, "old_quantization_description.json"),
    ),
    "argument the library refuses": ("ct", "transformers", "scheme", scheme(lambda g: g["weights"].update(zero="no"))),
    "weights that would be quantised again": (
        "ct",
        "transformers",
        "status",
        quantization(quantization_status="initialized"),
    ),
    "ascend files in transformers": ("ascend", "transformers", "engine-format", lambda directory: None),
    "fused schemes in vLLM": (
        "ct",
        "vllm",
        "fused-label",
        quantization(ignore=["lm_head", r"re:.*\.k_proj$"]),
    ),
    "groups of two sizes in vLLM": ("ct-two-sizes", "vllm", "fused-label", lambda directory: None),
    "an int8 cache in vLLM, which would be FP8": ("ct-cache", "vllm", "engine-kv", lambda directory: None),
    "a cache that vLLM-Ascend ignores": ("ct-cache", "vllm-ascend", "engine-kv", lambda directory: None),
    "static input on Ascend, where its offset is not set": (
        "ct",
        "vllm-ascend",
        "engine-static",
        lambda directory: None,
    ),
    "a group index in transformers": ("ct-group-index", "transformers", "actorder", lambda directory: None),
    "a group index in vLLM": ("ct-group-index", "vllm", "actorder", lambda directory: None),
    "a group index by its older spelling": (
        "ct-w4",
        "transformers",
        "actorder",
        scheme(lambda g: g["weights"].update(actorder=True)),
    ),
    "weights with zero points beside int8 inputs": (
        "ct-w8a8-zero-points",
        "vllm",
        "engine-kind",
        lambda directory: None,
    ),
    "W4A8 in vLLM": ("ct-w4a8", "vllm", "engine-kind", lambda directory: None),
    "input scales that differ in vLLM": ("ct", "vllm", "shared-input", replace(UP + "input_scale", lambda a: a * 2)),
    "input zero points that differ in vLLM": (
        "ct-asymmetric",
        "vllm",
        "shared-input",
        replace(UP + "input_zero_point", lambda a: a + 1),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_caught_by_the_name_of_its_rule(
    case: str, pristine: dict[str, Path], tmp_path: Path
) -> None:
    """The rule is among the problems, which name a file, what was found and what was expected; exit code 2."""
    base, engine, rule, break_it = BROKEN[case]
    directory = tmp_path / "model"
    shutil.copytree(pristine[base], directory)
    break_it(directory)
    report = check(directory, engine)
    problems = [problem for problem in report.problems if problem.rule == rule]
    assert problems, f"found instead: {[str(p) for p in report.problems]}"
    assert all(problem.file and problem.found and problem.expected for problem in report.problems)
    assert report.exit_code == 2
    assert f"[{rule}]" in report.render()


@pytest.mark.parametrize(
    ("name", "rule", "change"),
    [
        ("ct", "weight-zero", replace(UP + "weight", np.zeros_like)),
        ("ascend", "weight-zero", replace(P + "self_attn.o_proj.weight", np.zeros_like)),
        ("ct", "scale-outlier", put(UP + "weight_scale", 100)),
        ("ct", "shared-input", replace(UP + "input_scale", lambda a: a * 2)),
    ],
)
def test_what_is_odd_and_may_be_meant_is_noted(
    name: str, rule: str, change: Break, pristine: dict[str, Path], tmp_path: Path
) -> None:
    """A weight of zeros, a scale far from its neighbours', static inputs that differ where vLLM fuses: no rule breaks
    where the weights' owner wants them so.
    """
    directory = tmp_path / "model"
    shutil.copytree(pristine[name], directory)
    assert check(directory).notes == ()
    change(directory)
    assert rule in {note.rule for note in check(directory).notes}


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("ascend", "vllm-ascend"),
        ("ascend-float16", "vllm-ascend"),
        ("ascend-no-bias", "vllm-ascend"),
        ("ascend-tied", "vllm-ascend"),
        ("golden", "vllm-mindspore"),
        ("golden", "mindformers"),
        ("golden-w4", None),
        ("golden-w8a16", None),
        ("ct", "vllm"),
        ("ct", "transformers"),
        ("ct-dynamic", "vllm-ascend"),
        ("ct-dynamic", "vllm"),
        ("ct-asymmetric", "transformers"),
        ("ct-asymmetric", "vllm"),
        ("ct-cache", "transformers"),
        ("ct-group-index", None),
        ("ct-w4", "vllm"),
        ("ct-w4-odd", None),
        ("ct-w4-zero-points", "transformers"),
        ("ct-w4-zero-points", "vllm"),
        ("ct-w8-zero-points", "vllm"),
        ("ct-w8a8-zero-points", "transformers"),
        ("ct-w4a8", "transformers"),
        ("ct-wide", "transformers"),
        ("ct-wide", "vllm"),
        ("ct-wide-float16", "vllm"),
    ],
)
def test_a_clean_directory_passes(name: str, engine: str | None, pristine: dict[str, Path]) -> None:
    """No problem, exit code 0, and the report says what the directory is."""
    report = check(pristine[name], engine)
    assert report.problems == ()
    assert report.exit_code == 0
    assert report.dialect in report.render()
    assert "2 layers" in report.facts["model"]


@pytest.mark.parametrize(
    ("name", "engine", "rule", "text"),
    [
        ("ct-w4-zero-points", "transformers", "dequantize", "CompressedTensorsConfig(dequantize=True)"),
        ("ct-w8-zero-points", "vllm", "zero-points", "Hopper"),
        ("ascend", "vllm-ascend", "kv-version", "0.25.1rc1 or later"),
        ("ascend", "vllm-ascend", "serving-dtype", "served with --dtype float16, as 310P cards serve everything"),
        ("ascend-float16", "vllm-ascend", "serving-dtype", "served with --dtype bfloat16 it loads"),
        ("ct-w4", "vllm", "tensor-parallel", "up to tensor_parallel_size 2, then"),
    ],
)
def test_what_a_user_must_know_is_noted_of_a_clean_directory(
    name: str, engine: str, rule: str, text: str, pristine: dict[str, Path]
) -> None:
    """A directory that loads in a certain way only has no problem and exit code 0, and the report says which way."""
    report = check(pristine[name], engine)
    assert (report.problems, report.exit_code) == ((), 0)
    (note,) = [note for note in report.notes if note.rule == rule]
    assert text in note.text
    assert f"note: [{rule}] {note.text}" in report.render().splitlines()
    assert check(pristine[name]).notes == ()


def test_input_scales_of_their_own_are_no_matter_to_transformers(pristine: dict[str, Path], tmp_path: Path) -> None:
    """It runs linears one by one, each with its input scale, so what stops vLLM is clean there."""
    directory = tmp_path / "model"
    shutil.copytree(pristine["ct"], directory)
    replace(UP + "input_scale", lambda a: a * 2)(directory)
    assert check(directory, "transformers").problems == ()


def test_an_fp8_cache_is_what_vllm_makes_of_its_scheme(pristine: dict[str, Path], tmp_path: Path) -> None:
    """The rule is about int8 steps: a scheme of type float is run as it says."""
    directory = tmp_path / "model"
    shutil.copytree(pristine["ct-cache"], directory)
    scheme_of_floats = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    quantization(kv_cache_scheme=scheme_of_floats)(directory)
    assert check(directory, "vllm").problems == ()


def test_an_engines_verdict_reads_no_weights(pristine: dict[str, Path], tmp_path: Path) -> None:
    """Its problems and notes are those of the check, told without the format's rules on values."""
    directory = tmp_path / "model"
    shutil.copytree(pristine["ct-w8a8-zero-points"], directory)
    put(UP + "weight_scale", float("nan"))(directory)
    verdict = judge(directory, "vllm")
    assert {problem.rule for problem in verdict.problems} == {"engine-kind"}
    assert {problem.rule for problem in check(directory, "vllm").problems} == {"engine-kind", "value-finite"}
    assert [note.rule for note in judge(pristine["ct-w4-zero-points"], "transformers").notes] == ["dequantize"]


def test_only_the_broken_tensor_is_reported(pristine: dict[str, Path], tmp_path: Path) -> None:
    """One wrong number gives one problem, with the file, the tensor and the position."""
    directory = tmp_path / "model"
    shutil.copytree(pristine["ascend"], directory)
    put(P + "self_attn.o_proj.weight_scale", float("nan"), 5)(directory)
    (problem,) = check(directory).problems
    assert (problem.file, problem.tensor) == (LAYER, P + "self_attn.o_proj.weight_scale")
    assert problem.found == "nan at (5, 0)"


def test_an_unknown_engine_or_directory_is_the_users_mistake(pristine: dict[str, Path], tmp_path: Path) -> None:
    """Known engines are listed; a path that is no directory is named."""
    with pytest.raises(UserError, match="vllm-mindspore"):
        check(pristine["ascend"], "vllm-gpu")
    with pytest.raises(UserError, match="nowhere"):
        check(tmp_path / "nowhere")
    assert set(ENGINES) == {"vllm-ascend", "vllm-mindspore", "mindformers", "vllm", "transformers"}


def test_a_float_checkpoint_is_not_a_quantized_one(tmp_path: Path) -> None:
    """A source model has no description of a quantisation, and the report says which would be known."""
    config = tiny_config()
    save_checkpoint(tmp_path / "float", config, random_tensors(config))
    (problem,) = check(tmp_path / "float").problems
    assert problem.rule == "description-present"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A job's output: two layers in the golden-stick dialect with manifests, merged."""
    content = tiny_config(torch_dtype="bfloat16")
    tensors = random_tensors(content, "bfloat16")
    reader = CheckpointReader(save_checkpoint(tmp_path / "source", content, tensors))
    architecture = read_architecture(content)
    policies = dialects.uniform_policies(architecture, dialects.W8A8)
    made_from = Fingerprints(recipe="r", source="s", data="d")
    (tmp_path / "run").mkdir()
    layers = [
        publish_layer(
            tmp_path / "run",
            dialects.round_layer(architecture, tensors, layer, policies),
            architecture,
            ("golden-stick", "ascend"),
            made_from,
        )
        for layer in range(2)
    ]
    outer = publish_outer(tmp_path / "run", reader, ("golden-stick", "ascend"), made_from)
    for name in ("golden-stick", "ascend"):
        merge_checkpoint(tmp_path / "run", name, reader, layers, outer)
    return tmp_path / "run"


def test_a_merged_run_is_clean_in_every_format(run: Path) -> None:
    """What publish and merge leave passes its format's rules, its engine's and the manifests' hashes."""
    assert check(run / "golden-stick", "vllm-mindspore").problems == ()
    assert check(run / "ascend", "vllm-ascend").problems == ()
    with pytest.raises(UserError, match="ascend, golden-stick"):
        check(run)
    assert {name: report.problems for name, report in check_all(run).items()} == {"ascend": (), "golden-stick": ()}
    shutil.rmtree(run / "ascend")
    assert check(run).dialect == "golden-stick"


def test_an_engine_is_asked_about_the_formats_it_reads(run: Path) -> None:
    """Of a job with several formats those that are for other engines are left out, unless there is no other."""
    assert list(check_all(run, "vllm-ascend")) == ["ascend"]
    for report in check_all(run, "transformers").values():
        assert {problem.rule for problem in report.problems} == {"engine-format"}
    assert not check_all(run / "golden-stick", "vllm-ascend")["golden-stick"].clean


def test_a_changed_code_is_caught_by_the_manifests_hash(run: Path) -> None:
    """Any int8 code is a valid one, so only the hash tells that a byte was flipped after writing."""
    path = run / "golden-stick" / RUN_LAYER
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert {problem.rule for problem in check(run / "golden-stick").problems} == {"shard-hash"}


@pytest.fixture
def alone(run: Path, tmp_path: Path) -> Path:
    """A model directory taken out of the run, with its provenance."""
    made_from = Fingerprints(recipe="r", source="s", data="d")
    parts = [read_manifest(run, layer) for layer in (0, 1, None)]
    directory = run / "golden-stick"
    write_provenance(directory, [part for part in parts if part], recipe={"model": "m"}, versions={"numpy": "1"})
    content = json.loads((directory / "provenance.json").read_text())
    assert content["fingerprints"] == dataclasses.asdict(made_from)
    assert {file for file, _ in content["shards"].items()} == {path.name for path in directory.glob("*.safetensors")}
    return Path(shutil.move(directory, tmp_path / "elsewhere"))


def test_a_directory_on_its_own_is_compared_with_its_provenance(alone: Path) -> None:
    """A model that was copied out of its run still tells a flipped byte and a shard that was left behind."""
    assert check(alone).problems == ()
    path = alone / RUN_LAYER
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    (problem,) = check(alone).problems
    assert (problem.file, problem.rule) == (RUN_LAYER, "shard-hash")
    assert "provenance.json" in problem.expected
    path.unlink()
    assert {problem.rule for problem in check(alone).problems if problem.file == RUN_LAYER} == {"file-present"}
    (alone / "model.safetensors.index.json").unlink()
    assert {problem.rule for problem in check(alone).problems if problem.file == RUN_LAYER} == {"shard-present"}


def test_a_truncated_shard_is_told_once(alone: Path) -> None:
    """It is there, so provenance.json, which names it, has nothing to add."""
    cut(RUN_LAYER, 100)(alone)
    assert [problem.rule for problem in check(alone).problems if problem.file == RUN_LAYER] == ["file-truncated"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "shards": []}', "[" * 100_000])
def test_a_damaged_provenance_is_named(alone: Path, content: str) -> None:
    """Whatever the file holds, it is a problem of its own and no crash."""
    (alone / "provenance.json").write_text(content)
    assert {(problem.file, problem.rule) for problem in check(alone).problems} == {
        ("provenance.json", "provenance-valid")
    }


def test_missing_and_damaged_manifests_are_named(run: Path) -> None:
    """A run directory has a readable manifest for every shard."""
    (run / "manifests" / "layer-00000.json").unlink()
    (run / "manifests" / "layer-00001.json").write_text("{}")
    rules = {(problem.file, problem.rule) for problem in check(run / "golden-stick").problems}
    assert rules == {
        ("manifests/layer-00000.json", "manifest-present"),
        ("manifests/layer-00001.json", "manifest-valid"),
    }


def test_a_report_shows_no_more_problems_than_asked(pristine: dict[str, Path], tmp_path: Path) -> None:
    """A directory with hundreds of problems prints the first ones and how many are left."""
    directory = tmp_path / "model"
    shutil.copytree(pristine["ascend"], directory)
    (directory / LAYER).unlink()
    report = check(directory)
    assert len(report.problems) > 20
    text = report.render(limit=3)
    assert text.count("\n[") == 0
    assert f"and {len(report.problems) - 3} more" in text


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all nodes of a JSON document but its root."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in children for found in [(*path, key), *nodes(child, (*path, key))]]


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "engine", "file"),
    [
        ("ascend", "vllm-ascend", "config.json"),
        ("ascend", "vllm-ascend", ASCEND),
        ("ascend", None, INDEX),
        ("golden-w4", "vllm-mindspore", GOLDEN),
        ("ct-w4", "vllm", "config.json"),
        ("ct", "vllm", "config.json"),
        ("ct", "vllm-ascend", "config.json"),
    ],
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_json_value_makes_the_check_itself_fail(
    pristine: dict[str, Path], tmp_path: Path, name: str, engine: str | None, file: str, data: st.DataObject
) -> None:
    """Any value in place of any other comes back as a report, not as an exception."""
    directory = tmp_path / "model"
    if not directory.exists():
        shutil.copytree(pristine[name], directory)
    content = load_json(pristine[name] / file)
    *parents, last = data.draw(st.sampled_from(nodes(content)))
    node: Any = content
    for key in parents:
        node = node[key]
    node[last] = data.draw(JSON_VALUES)
    save_json(directory / file, content)
    assert check(directory, engine).render()


def single_scales(tensors: dict[str, np.ndarray]) -> None:
    """Scales as float32, from which loaders cast."""
    tensors.update({name: array.astype(np.float32) for name, array in tensors.items() if "scale" in name})


def test_scales_that_float16_loses_are_computed(tmp_path: Path) -> None:
    """A note where bfloat16 is served, a problem where float16 is what config.json says."""
    dialects.save_model(tmp_path / "m", CompressedTensorsCodec(), dialects.W8A8_DYNAMIC)
    assert "scale-dtype" not in {note.rule for note in check(tmp_path / "m").notes}
    name = UP + "weight_scale"
    put(name, 2.0**-25)(tmp_path / "m")
    (note,) = [note for note in check(tmp_path / "m").notes if note.rule == "scale-dtype"]
    assert note.text.startswith(f"{name} holds scales down to 2.98e-08, which float16 makes 0: serve with --dtype bf")
    put(name, 1.5 * 2.0**-21)(tmp_path / "m")
    assert "scale-dtype" not in {note.rule for note in check(tmp_path / "m").notes}
    put(name, 1.1 * 2.0**-21)(tmp_path / "m")  # below float16's normal numbers: three binary digits are left of it
    (note,) = [note for note in check(tmp_path / "m").notes if note.rule == "scale-dtype"]
    assert note.text.startswith(f"{name} holds scales down to 5.253e-07, which float16 makes 5.364e-07: serve with")
    half = tmp_path / "half"
    dialects.save_model(half, CompressedTensorsCodec(), dialects.W8A8_DYNAMIC)
    edit_json("config.json", lambda config: config.update(torch_dtype="float16"))(half)
    for file in ("model-00000.safetensors", LAYER):
        edit_tensors(single_scales, file)(half)
    put(name, 2.0**-24)(half)
    assert check(half).clean
    put(name, 2.0**-25)(half)
    (problem,) = check(half).problems
    assert (problem.rule, problem.tensor) == ("scale-dtype", name)
    assert problem.found == "2.98e-08, which float16 makes 0"


def test_a_static_input_whose_reciprocal_float16_loses_is_computed(tmp_path: Path) -> None:
    """vLLM-Ascend multiplies by it in the served dtype; no other format has a reciprocal taken."""
    for codec, told in ((AscendCodec(), True), (CompressedTensorsCodec(), False)):
        directory = tmp_path / codec.name
        dialects.save_model(directory, codec, dialects.W8A8)
        put(UP + "input_scale", 2.0**-15)(directory)
        assert "scale-dtype" not in {note.rule for note in check(directory).notes}
        put(UP + "input_scale", 2.0**-17)(directory)
        texts = [note.text for note in check(directory).notes if note.rule == "scale-dtype"]
        assert [("down to 7.629e-06, whose reciprocal, by which inputs are multiplied" in text) for text in texts] == [
            True
        ] * told


@pytest.mark.parametrize(
    ("attention", "symmetric", "loads"), [(None, True, True), (None, False, False), (1, True, False)]
)
def test_experts_alone_are_served_in_four_bits_on_ascend(
    tmp_path: Path, attention: int | None, symmetric: bool, loads: bool
) -> None:
    """vllm_ascend/quantization/methods/w4a16.py is registered for experts alone, and fills no zero points."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64}
    four = dialects.W4A16_GROUPS.model_copy(update={"weight_symmetric": symmetric})
    architecture = read_architecture(tiny_config("qwen3_moe", **sizes))
    policies = {
        name: four if ".experts." in name or (attention and "self_attn" in name) else None
        for name in architecture.linear_names()
    }
    dialects.save_model(tmp_path / "m", CompressedTensorsCodec(), policies, model_type="qwen3_moe", **sizes)
    assert check(tmp_path / "m").clean
    rules = {problem.rule for problem in check(tmp_path / "m", "vllm-ascend").problems}
    assert rules == (set() if loads else {"engine-kind"})


def test_rules_are_those_of_a_version(pristine: dict[str, Path]) -> None:
    """Known ones are applied, by their beginning too; others are refused with what is known."""
    told = {
        version: {note.rule for note in check(pristine["ct-w4-zero-points"], f"transformers=={version}").notes}
        for version in ("5.17", "5.24")
    }
    assert "dequantize" not in told["5.17"]
    assert "dequantize" in told["5.24"]
    assert check(pristine["ct-dynamic"], "vllm==0.32").clean
    assert check(pristine["golden"], "mindformers==2.1.0").clean
    with pytest.raises(UserError, match=r"--for vllm==0\.9: known versions of vllm are 0\.32\.0; name the one nearest"):
        check(pristine["ct-dynamic"], "vllm==0.9")
