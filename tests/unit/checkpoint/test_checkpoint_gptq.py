"""GPTQ checkpoints from policies to directory, held against a decoder that is written here from AutoGPTQ's forward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tiny_checkpoint
from quantized_layers import LINEARS, quantize
from safetensors.numpy import load_file, save_file

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import check_policies, codec_of, layout_of
from gs_dist.checkpoint.inventory import take_inventory
from gs_dist.checkpoint.manifest import Fingerprints, publish_layer, publish_outer
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import RecipeError
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.results.quantized import QuantizedLayer

W4 = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}
ORDERED = {"precision_recovery": "gptq", "algo_args": AlgoArgs(desc_act=True, static_groups=False)}
FLOAT = "model.layers.0.mlp.down_proj"


def publish(tmp_path: Path, **fields: Any) -> tuple[Path, list[QuantizedLayer]]:
    """A directory whose first down_proj stays in float; columns are in a random order where the policy asks for one."""
    source, output = tiny_checkpoint(tmp_path / "m", model_type="qwen2", hidden_size=128), tmp_path / "run"
    reader, policy = CheckpointReader(source), QuantPolicy(**fields)
    layers = []
    for n in range(reader.architecture.num_layers):
        kept = {name: policy for name in LINEARS if f"model.layers.{n}.{name}" != FLOAT}
        layer = quantize(reader, n, kept)
        for linear in layer.linears.values():
            if policy.column_order == "group":
                columns = linear.codes.shape[1]
                order = np.random.default_rng(n).permutation(columns) // policy.group_size
                object.__setattr__(linear, "group_index", order.astype(np.int32))
        layers.append(layer)
    output.mkdir()
    prints = Fingerprints(recipe="r", source="s", data="d")
    manifests = [publish_layer(output, layer, reader.architecture, ("gptq",), prints) for layer in layers]
    outer = publish_outer(output, reader, ("gptq",), prints)
    merge_checkpoint(output, "gptq", reader, manifests, outer)
    return output / "gptq", layers


def forward_weight(tensors: dict[str, Any], name: str, bits: int) -> np.ndarray:
    """`scales[g_idx] * (weight - zeros[g_idx])` with zeros + 1, one value at a time; (in, out)."""
    words, zeros, scales = (tensors[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales"))
    a_word, mask = 32 // bits, (1 << bits) - 1

    def value(word: np.int32, place: int) -> int:
        return (int(word) & 0xFFFFFFFF) >> (place * bits) & mask

    groups, (rows, columns) = tensors[f"{name}.g_idx"], (words.shape[1], words.shape[0] * a_word)
    weight = np.empty((columns, rows))
    for k in range(columns):
        for n in range(rows):
            zero = value(zeros[groups[k], n // a_word], n % a_word) + 1
            weight[k, n] = float(scales[groups[k], n]) * (value(words[k // a_word, n], k % a_word) - zero)
    return weight


@pytest.mark.parametrize("fields", [W4, {**W4, **ORDERED}, {"weight_quant_dtype": "qint4x2"}, {}], ids=str)
def test_words_are_those_that_autogptq_unpacks(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Every bit pattern, group and scale gives the weight that was solved, of 4 and of 8 bits."""
    directory, layers = publish(tmp_path, **fields)
    bits = layers[0].linears["mlp.up_proj"].policy.weight_format.bits
    tensors = load_file(directory / "layer-00001.safetensors")
    for short in ("self_attn.k_proj", "mlp.down_proj"):
        found = forward_weight(tensors, f"model.layers.1.{short}", bits)
        np.testing.assert_allclose(found.T, layers[1].linears[short].dequantized(), rtol=1e-6)
    assert "model.layers.1.self_attn.q_proj.bias" in tensors
    decoded = codec_of("gptq").decode_layer(CheckpointReader(directory, quantized=True), 1)
    for short, linear in decoded.linears.items():
        np.testing.assert_array_equal(linear.dequantized(), layers[1].linears[short].dequantized())
        assert linear.policy.column_order == layers[1].linears[short].policy.column_order
    values = layout_of("gptq").dequantized(take_inventory(directory), "model.layers.1.mlp.up_proj", f"W{bits}A16")
    np.testing.assert_array_equal(values, layers[1].linears["mlp.up_proj"].dequantized())


def test_config_says_what_a_loader_asks_for(tmp_path: Path) -> None:
    """VLLM's keys, the linear that stays in float by name, and checks that pass, as stored and for vLLM."""
    directory, _ = publish(tmp_path, **W4, **ORDERED)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "lm_head")} == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": True,
        "lm_head": False,
    }
    assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.down_proj$": {}}
    assert check(directory).clean, check(directory).render()
    assert "engine-format" in {problem.rule for problem in check(directory, "transformers").problems}


def test_vllm_refuses_groups_in_activation_order(tmp_path: Path) -> None:
    """As its own loader does (`normalize_and_validate_gptq_desc_act`); with static groups nothing is in its way."""
    directory, _ = publish(tmp_path / "ordered", **W4, **ORDERED)
    assert [problem.rule for problem in check(directory, "vllm").problems] == ["actorder"]
    static = {"precision_recovery": "gptq", "algo_args": AlgoArgs(desc_act=True, static_groups=True)}
    directory, _ = publish(tmp_path / "static", **W4, **static)
    assert check(directory, "vllm").clean, check(directory, "vllm").render()


def test_another_models_weights_are_told_of(tmp_path: Path) -> None:
    """`--model` turns words back and compares them, and names the tensor that holds them."""
    directory, _ = publish(tmp_path, **W4)
    assert check(directory, model=tmp_path / "m").clean, check(directory, model=tmp_path / "m").render()
    other = tiny_checkpoint(tmp_path / "other", model_type="qwen2", hidden_size=128, seed=1)
    told = [problem.tensor for problem in check(directory, model=other).problems if problem.rule == "source-weight"]
    assert "model.layers.1.mlp.up_proj.qweight" in told


def _set(key: str, value: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"][key] = value
        (directory / "config.json").write_text(json.dumps(config))

    return edit


def _change(leaf: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        shard, name = directory / "layer-00001.safetensors", f"model.layers.1.mlp.up_proj.{leaf}"
        tensors = load_file(shard)
        save_file({**tensors, name: np.ascontiguousarray(change(tensors[name]))}, shard)

    return edit


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (_set("bits", 3), "scheme"),
        (_set("sym", False), "scheme"),
        (_set("checkpoint_format", "gptq_v2"), "scheme"),
        (_set("group_size", 96), "group-size"),
        (_set("dynamic", {"+:.*": {"bits": 8}}), "scheme"),
        (_set("dynamic", {}), "tensor-present"),
        (_change("qzeros", lambda zeros: zeros + 1), "offset-zero"),
        (_change("g_idx", lambda index: index[::-1]), "group-index"),
        (_change("g_idx", np.zeros_like), "group-index"),
        (_change("scales", lambda scales: -scales), "scale-positive"),
        (_change("qweight", lambda words: words.T), "tensor-shape"),
    ],
)
def test_what_does_not_fit_its_description_is_told_of(
    tmp_path: Path, damage: Callable[[Path], None], rule: str
) -> None:
    """Each part of the description, and each tensor, is looked at."""
    directory, _ = publish(tmp_path, **W4)
    damage(directory)
    assert rule in {problem.rule for problem in check(directory).problems}


def test_vllm_has_kernels_for_marlins_groups(tmp_path: Path) -> None:
    """Whatever the model's dtype: `AutoGPTQLinearMethod` asks for them before it chooses a kernel."""
    directory, _ = publish(tmp_path, **W4)
    assert check(directory, "vllm").clean
    _set("group_size", 16)(directory)
    assert "engine-kind" in {problem.rule for problem in check(directory, "vllm").problems}


@pytest.mark.parametrize(
    ("fields", "told"),
    [({**W4, **ORDERED}, "static_groups: true"), ({**W4, "group_size": 256}, "32, 64 or 128"), (W4, "")],
)
def test_a_plan_says_what_vllm_would_refuse(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    """Before the work, with the setting to change; nothing is said where it loads."""
    architecture = CheckpointReader(tiny_checkpoint(tmp_path / "m", hidden_size=128)).architecture
    notes = check_policies("gptq", {"model.layers.0.mlp.down_proj": QuantPolicy(**fields)}, architecture)
    assert (told in "".join(notes)) if told else not notes


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"act_quant_dtype": "int8"}, "act_quant_dtype: null"),
        ({"weight_symmetric": False}, "weight_symmetric: true"),
        ({"kvcache_quant_dtype": "int8"}, "kvcache_quant_dtype: null"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_with_what_to_set(
    tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    """Before any work, by name."""
    architecture = CheckpointReader(tiny_checkpoint(tmp_path / "m")).architecture
    policies = {
        architecture.layer_prefix(layer) + linear.name: QuantPolicy(**fields)
        for layer in range(architecture.num_layers)
        for linear in architecture.linears(layer)
    }
    with pytest.raises(RecipeError, match=match):
        check_policies("gptq", policies, architecture)


def test_two_schemes_in_one_model_are_refused(tmp_path: Path) -> None:
    """config.json has room for one."""
    architecture = CheckpointReader(tiny_checkpoint(tmp_path / "m")).architecture
    policies = {"model.layers.0.mlp.down_proj": QuantPolicy(), "model.layers.1.mlp.down_proj": QuantPolicy(**W4)}
    with pytest.raises(RecipeError, match="one number format and group size holds for the whole model"):
        check_policies("gptq", policies, architecture)
