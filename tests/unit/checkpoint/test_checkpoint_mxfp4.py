"""MXFP4 weights from recipe to directory: blocks of 32 four-bit floats with a power of two each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tiny_checkpoint
from pydantic import ValidationError
from quantized_layers import LINEARS, quantize
from safetensors.numpy import load_file, save_file

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import check_policies, codec_of, layout_of
from gs_dist.checkpoint.inventory import take_inventory
from gs_dist.checkpoint.manifest import Fingerprints, publish_layer, publish_outer
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import RecipeError, UserError
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.recipe.sizes import stored_bytes
from gs_dist.results.quantized import QuantizedLayer
from gs_dist.solvers.objective import GramObjective
from gs_dist.solvers.rounding import round_weight

MXFP4 = {"weight_quant_dtype": "mxfp4", "weight_quant_granularity": "per_group", "group_size": 32}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def rounded_layer(reader: CheckpointReader, layer: int, policy: QuantPolicy) -> QuantizedLayer:
    """A layer of the source rounded as the policy says, against inputs that depend on each other."""
    plain = quantize(reader, layer, dict.fromkeys(LINEARS, QuantPolicy()))
    linears = {}
    for name, linear in plain.linears.items():
        weight = reader.read_layer(layer)[f"{name}.weight"].astype(np.float32)
        x = np.random.default_rng(layer).normal(size=(300, weight.shape[1])).astype(np.float32).cumsum(axis=1)
        solved, _ = round_weight(weight, policy, GramObjective(x.T @ x), reader.architecture.dtype)
        linears[name] = replace(solved, bias=linear.bias)
    return replace(plain, linears=linears)


def publish(tmp_path: Path, **policy: Any) -> tuple[Path, list[QuantizedLayer]]:
    source, output = tiny_checkpoint(tmp_path / "m", hidden_size=128), tmp_path / "run"
    reader = CheckpointReader(source)
    used = QuantPolicy(**{**MXFP4, **policy})
    layers = [rounded_layer(reader, n, used) for n in range(reader.architecture.num_layers)]
    output.mkdir()
    prints, dialects = Fingerprints(recipe="r", source="s", data="d"), ("compressed-tensors",)
    manifests = [publish_layer(output, layer, reader.architecture, dialects, prints) for layer in layers]
    outer = publish_outer(output, reader, dialects, prints)
    merge_checkpoint(output, "compressed-tensors", reader, manifests, outer)
    return output / "compressed-tensors", layers


def test_bytes_are_those_of_the_formats_page(tmp_path: Path) -> None:
    """Two E2M1 codes a byte, the even input low, times 2^(byte - 127) of each block, are the weight that was solved."""
    directory, layers = publish(tmp_path, precision_recovery="gptq", weight_clip=True)
    for layer in layers:
        tensors = load_file(directory / f"layer-{layer.layer:05d}.safetensors")
        for name, linear in layer.linears.items():
            packed = tensors[f"model.layers.{layer.layer}.{name}.weight_packed"]
            exponents = tensors[f"model.layers.{layer.layer}.{name}.weight_scale"]
            rows, columns = linear.codes.shape
            assert (packed.dtype, packed.shape, exponents.shape) == (
                np.uint8,
                (rows, columns // 2),
                (rows, columns // 32),
            )
            stored = packed.nbytes + exponents.nbytes
            assert stored == stored_bytes(linear.policy, (rows, columns), "float32")
            values = np.array(E2M1 + [-value for value in E2M1])
            nibbles = np.stack([packed % 16, packed // 16], axis=2).reshape(rows, columns)
            expected = values[nibbles] * np.repeat(2.0 ** (exponents.astype(int) - 127), 32, axis=1)
            np.testing.assert_array_equal(linear.dequantized(), expected)


def test_a_directory_is_described_checked_and_read_back(tmp_path: Path) -> None:
    """config.json names compressed-tensors' MXFP4A16, engines take it, and layers come back as they were."""
    directory, layers = publish(tmp_path)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mxfp4-pack-quantized"
    assert {key: config["config_groups"]["group_0"]["weights"][key] for key in ("num_bits", "type", "group_size")} == {
        "num_bits": 4,
        "type": "float",
        "group_size": 32,
    }
    for engine in (None, "transformers", "vllm"):
        assert check(directory, engine).clean, check(directory, engine).render()
    decoded = codec_of("compressed-tensors").decode_layer(CheckpointReader(directory, quantized=True), 1)
    name = "model.layers.1.mlp.down_proj"
    for short, linear in decoded.linears.items():
        np.testing.assert_array_equal(linear.dequantized(), layers[1].linears[short].dequantized())
        assert linear.policy.weight_quant_dtype == "mxfp4"
    values = layout_of("compressed-tensors").dequantized(take_inventory(directory), name, "MXFP4A16")
    np.testing.assert_array_equal(values, layers[1].linears["mlp.down_proj"].dequantized())

    shard = directory / "layer-00001.safetensors"
    tensors = load_file(shard)
    tensors[f"{name}.weight_scale"][3, 1] = 255
    save_file(tensors, shard)
    assert "scale-exponent" in {problem.rule for problem in check(directory).problems}


def test_searches_choose_among_powers_of_two() -> None:
    """Each method betters the one before; scales are powers of two, above and below that of the plain rule."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(128, 128)) * 0.2 + np.diag(rng.lognormal(size=128))
    x = (rng.normal(size=(512, 128)) @ mixing).astype(np.float32)
    weight, objective = rng.normal(size=(64, 128)).astype(np.float32), GramObjective(x.T @ x)
    results = [
        round_weight(weight, QuantPolicy(**MXFP4, **changes), objective, "float16")[0]
        for changes in (
            {},
            {"weight_clip": True},
            {"precision_recovery": "gptq", "weight_clip": True},
            {"precision_recovery": "coordinate-descent", "weight_clip": True},
        )
    ]
    losses = [objective.error(solved.dequantized() - weight) for solved in results]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert results[-1].policy.label == "wclip-CD-WMXFP4-pergroup"
    mantissa, _ = np.frexp(np.concatenate([solved.scale.ravel() for solved in results]))
    assert (mantissa == 0.5).all()
    moved = results[1].scale / results[0].scale
    assert set(np.unique(moved)) <= {0.5, 1.0, 2.0}
    assert len(np.unique(moved)) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight_quant_granularity": "per_channel", "group_size": 0},
            "weight_quant_dtype is mxfp4 while weight_quant_granularity is per_channel: set "
            "weight_quant_granularity: per_group and group_size: 32",
        ),
        ({"group_size": 64}, "group_size is 64 while weight_quant_granularity is per_group: set group_size: 32"),
        ({"weight_symmetric": False}, "weight_quant_dtype is mxfp4 while weight_symmetric is false"),
        ({"act_quant_dtype": "int8", "act_quant_granularity": "per_token"}, "mxfp4 while act_quant_dtype is int8"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(changes: dict[str, Any], message: str) -> None:
    """A recipe is told which setting to change."""
    with pytest.raises(ValidationError, match=message):
        QuantPolicy(**{**MXFP4, **changes})


def test_dialects_without_it_refuse_it_by_name(tmp_path: Path) -> None:
    """The others name what would do; compressed-tensors refuses an order that it cannot store."""
    architecture = CheckpointReader(tiny_checkpoint(tmp_path / "m", hidden_size=128)).architecture
    name = "model.layers.0.mlp.up_proj"
    for dialect in ("ascend", "golden-stick"):
        with pytest.raises(RecipeError, match=r"cannot hold mxfp4 weights: .* or format: \[compressed-tensors\]"):
            check_policies(dialect, {name: QuantPolicy(**MXFP4)}, architecture)
    notes = check_policies("compressed-tensors", {name: QuantPolicy(**MXFP4)}, architecture)
    assert any("only if it is loaded with dtype bfloat16" in note for note in notes), "the model is float32"
    ordered = QuantPolicy(**MXFP4, precision_recovery="gptq", algo_args=AlgoArgs(desc_act=True))
    with pytest.raises(UserError, match="static_groups: true"):
        check_policies("compressed-tensors", {name: ordered}, architecture)


@pytest.mark.interop
def test_compressed_tensors_reads_the_same_values(tmp_path: Path) -> None:
    """Its own decompressor turns every linear back into the weight that was solved."""
    torch = pytest.importorskip("torch", reason="needs the [interop] extra")
    pytest.importorskip("compressed_tensors", reason="needs the [interop] extra")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    directory, layers = publish(tmp_path, precision_recovery="gptq", weight_clip=True)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    group = dict(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    scheme = QuantizationScheme(**group)
    for layer in layers:
        tensors = load_file(directory / f"layer-{layer.layer:05d}.safetensors")
        for name, linear in layer.linears.items():
            prefix = f"model.layers.{layer.layer}.{name}."
            stored = {part: torch.from_numpy(tensors[prefix + part]) for part in ("weight_packed", "weight_scale")}
            found = compressor.decompress(stored, scheme)["weight"]
            np.testing.assert_array_equal(found.float().numpy(), linear.dequantized())
