"""Golden Stick's dialect against a reader written here from vLLM-MindSpore's sources and the wheel's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dialects
import numpy as np
import pytest
from checkpoints import DTYPES, tiny_config

from gs_dist.checkpoint.dialects.base import Codec
from gs_dist.checkpoint.dialects.compressed_tensors.codec import CompressedTensorsCodec
from gs_dist.checkpoint.dialects.golden_stick.codec import GoldenStickCodec
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import RecipeError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.families import read_architecture
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.results.quantized import QuantizedLayer

FORMAT = GoldenStickCodec()
POLICIES = (None, dialects.W8A8, dialects.W8A16, dialects.W4A16, dialects.W4A16_GROUPS)


def build(
    directory: Path,
    policy: QuantPolicy | None,
    dtype: str = "bfloat16",
    zero_point: int = 0,
    kv_cache: str | None = None,
    model_type: str = "llama",
    **config: Any,
) -> tuple[DecoderArchitecture, QuantizedLayer, dict[str, Any], dict[str, Any]]:
    """Architecture, layer 1 as solved, its stored tensors and the description file, of a saved model."""
    layers = dialects.save_model(directory, FORMAT, policy, dtype, model_type, zero_point, kv_cache, **config)
    reader = CheckpointReader(directory, quantized=True)
    stored = {n: a for n, a in reader.read(reader.tensors).items() if n.startswith("model.layers.1.")}
    description = dialects.load_json(directory / "quantization_description.json")
    return reader.architecture, layers[1], stored, description


def nibble(value: int) -> int:
    """Two's complement of four bits."""
    return value - 16 if value >= 8 else value


def reference_weight(tensors: dict[str, Any], p: str, label: str) -> np.ndarray:
    """The float weight (N, K) that a module's tensors stand for, element by element where bytes are packed."""
    weight, scale = tensors[p + ".weight"], tensors[p + ".weight_scale"].astype(np.float32)
    offset = tensors[p + ".weight_offset"].astype(np.float32)
    if label == "W4A16":
        columns, half = weight.shape
        codes = np.empty((2 * half, columns), dtype=np.float32)
        for k in range(columns):
            for byte in range(half):
                value = int(weight[k, byte]) % 256
                codes[2 * byte, k], codes[2 * byte + 1, k] = nibble(value % 16), nibble(value // 16)
    else:
        codes = weight.astype(np.float32)
    if scale.ndim == 1:
        return (codes - offset[:, None]) * scale[:, None]
    repeat = codes.shape[1] // scale.shape[0]
    return (codes - np.repeat(offset, repeat, axis=0).T) * np.repeat(scale, repeat, axis=0).T


def reader_static(tensors: dict[str, Any], p: str, x: np.ndarray) -> np.ndarray:
    """`A8W8LinearMethod.apply` (golden_stick/a8w8.py): per-channel quantisation, matmul, scale, then the bias."""
    scale = tensors[p + ".input_scale"].astype(np.float64)
    quantized = np.clip(np.rint(x / scale) + tensors[p + ".input_offset"].astype(np.int64), -128, 127)
    accumulated = quantized @ tensors[p + ".weight"].astype(np.int64).T + tensors[p + ".quant_bias"].astype(np.int64)
    out = accumulated * tensors[p + ".deq_scale"].astype(np.float64)
    return out + tensors[p + ".bias"].astype(np.float64) if p + ".bias" in tensors else out


@pytest.mark.parametrize(
    ("policy", "label"),
    [
        (dialects.W8A16, "W8A16"),
        (dialects.W8A8, "W8A8"),
        (dialects.W8A8_DYNAMIC, "W8A8_DYNAMIC"),
        (dialects.W4A16, "W4A16"),
        (dialects.W4A16_GROUPS, "W4A16"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_read_from_the_files_are_the_solvers(
    tmp_path: Path, policy: QuantPolicy, label: str, dtype: str
) -> None:
    """A decoder that shares no code with the writer finds the same weights, and so does the package's own."""
    _, layer, encoded, description = build(tmp_path, policy, dtype, model_type="qwen2")
    dialects.save_model(tmp_path, FORMAT, policy, dtype, "qwen2")
    decoded = FORMAT.decode_layer(CheckpointReader(tmp_path, quantized=True), 1)
    for name, linear in layer.linears.items():
        assert description[f"model.layers.1.{name}.weight"] == label
        reference = reference_weight(encoded, f"model.layers.1.{name}", label)
        np.testing.assert_array_equal(reference, linear.dequantized())
        np.testing.assert_array_equal(decoded.linears[name].dequantized(), linear.dequantized())
        np.testing.assert_array_equal(decoded.linears[name].bias, linear.bias)
        assert decoded.linears[name].input_scale == linear.input_scale
    assert decoded.tensors.keys() == layer.tensors.keys()


@pytest.mark.parametrize("zero_point", [0, -7, 127])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_static_linear_computes_what_the_integers_mean(tmp_path: Path, zero_point: int, model_type: str) -> None:
    """The reader's arithmetic is the dequantised weight times the fake-quantised input plus bias, exactly."""
    _, layer, encoded, _ = build(tmp_path, dialects.W8A8_ASYMMETRIC, zero_point=zero_point, model_type=model_type)
    x = np.random.default_rng(3).standard_normal((5, 64))
    for name, linear in layer.linears.items():
        if linear.codes.shape[1] != 64:
            continue
        assert linear.input_scale is not None
        fake = (np.clip(np.rint(x / linear.input_scale) + zero_point, -128, 127) - zero_point) * linear.input_scale
        expected = fake @ linear.dequantized().astype(np.float64).T + (0 if linear.bias is None else linear.bias)
        np.testing.assert_allclose(reader_static(encoded, f"model.layers.1.{name}", x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "packed", "grouped"),
    [
        (dialects.W8A16, False, False),
        (dialects.W8A8_DYNAMIC, False, False),
        (dialects.W8A8, False, False),
        (dialects.W4A16, True, False),
        (dialects.W4A16_GROUPS, True, True),
    ],
)
def test_tensors_have_the_wheels_shapes(tmp_path: Path, policy: QuantPolicy, packed: bool, grouped: bool) -> None:
    """Shapes and dtypes are those of `save_quantized(backend=ASCEND)` of golden-stick 1.4.1."""
    architecture, _, encoded, _ = build(tmp_path, policy)
    for linear in architecture.linears(0):
        p = f"model.layers.1.{linear.name}."
        n, k = linear.out_features, linear.in_features
        scales = (k // 64, n) if grouped and k > 64 else (n,)
        pd = np.dtype(DTYPES["bfloat16"])
        expected = {
            "weight": (np.dtype(np.int8), (k, n // 2) if packed else (n, k)),
            "weight_scale": (pd, scales),
            "weight_offset": (np.dtype(np.int32), scales),
        }
        if policy.is_static:
            expected |= {
                "deq_scale": (np.dtype(np.float32), (n,)),
                "quant_bias": (np.dtype(np.int32), (n,)),
                "input_scale": (pd, (k,)),
                "input_offset": (np.dtype(np.int8), (k,)),
            }
        found = {name.removeprefix(p): (a.dtype, a.shape) for name, a in encoded.items() if name.startswith(p)}
        assert found == expected


def test_one_label_a_module_and_across_fused_modules(tmp_path: Path) -> None:
    """`_validate_quantization_consistency` (golden_stick.py): biases carry their linear's label, no key is metadata."""
    _, _, encoded, description = build(tmp_path, dialects.W8A8, model_type="qwen2")
    labels: dict[str, set[str]] = {}
    for key, label in description.items():
        module = key.rpartition(".")[0]
        assert module, "every key is a tensor's name"
        for part in ("q_proj", "k_proj", "v_proj"):
            module = module.replace(part, "qkv_proj")
        for part in ("gate_proj", "up_proj"):
            module = module.replace(part, "gate_up_proj")
        labels.setdefault(module, set()).add(label)
    assert all(len(found) == 1 for found in labels.values())
    assert description["model.layers.1.self_attn.q_proj.bias"] == "W8A8"
    assert set(encoded) <= set(description)


def test_the_reader_picks_the_right_method_for_each_fused_linear(tmp_path: Path) -> None:
    """`GoldenStickConfig.get_quant_method` takes the first key that contains the fused prefix."""
    _, _, _, description = build(tmp_path, dialects.W8A8)
    for prefix in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        first = next(
            label
            for key, label in description.items()
            if f"model.layers.1.{prefix}" in key.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj")
        )
        assert first == "W8A8"


@pytest.mark.parametrize(
    ("policy", "advice"),
    [
        (dialects.W4A8, "act_quant_dtype: null"),
        (QuantPolicy(weight_symmetric=False), "weight_symmetric: true"),
        (QuantPolicy(weight_quant_granularity="per_group", group_size=64), "weight_quant_granularity: per_channel"),
        (QuantPolicy(kvcache_quant_dtype="int8"), "kvcache_quant_dtype: null"),
        (
            QuantPolicy(
                weight_quant_dtype="qint4x2",
                weight_quant_granularity="per_group",
                group_size=64,
                precision_recovery="gptq",
                algo_args=AlgoArgs(desc_act=True),
            ),
            "static_groups: true",
        ),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_with_what_to_choose(policy: QuantPolicy, advice: str) -> None:
    """The message names a linear and the setting to change."""
    architecture = read_architecture(tiny_config())
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.self_attn") as caught:
        FORMAT.check_policies(dialects.uniform_policies(architecture, policy), architecture)
    assert advice in str(caught.value)


def test_odd_rows_and_mixed_kinds_are_refused() -> None:
    """An odd number of output channels has no packing, and fused linears have one kind."""
    architecture = read_architecture(tiny_config(intermediate_size=127))
    with pytest.raises(RecipeError, match="this linear has 127"):
        FORMAT.check_policies(dialects.uniform_policies(architecture, dialects.W4A16), architecture)
    mixed = dialects.uniform_policies(architecture, None) | {"model.layers.0.mlp.up_proj": dialects.W8A8}
    with pytest.raises(RecipeError, match="gate_up_proj"):
        FORMAT.check_policies(mixed, architecture)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_expected_tensors_are_what_is_written(tmp_path: Path, policy: QuantPolicy | None, dtype: str) -> None:
    """Names, dtypes and shapes foretold from the policies are those of the encoded layer."""
    architecture, _, encoded, _ = build(tmp_path, policy, dtype, model_type="qwen2")
    policies = dialects.uniform_policies(architecture, policy)
    expected = FORMAT.expected_tensors(1, policies, None, architecture)
    assert {n: (t.dtype or dtype, t.shape) for n, t in expected.items()} == {
        n: (a.dtype.name, a.shape) for n, a in encoded.items()
    }


@pytest.mark.parametrize("dialect", [FORMAT, CompressedTensorsCodec()], ids=["golden-stick", "compressed-tensors"])
def test_a_shift_that_has_no_place_is_told_beforehand(dialect: Codec) -> None:
    """Outlier Suppression Plus then only rescales, and the note names the format that has room for the shift."""
    architecture = read_architecture(tiny_config("llama"))
    notes = dialect.check_policies(dialects.uniform_policies(architecture, dialects.W8A8_PLUS), architecture)
    assert any("outlier-suppression+" in note and "format: [ascend]" in note for note in notes)
    plain = dialect.check_policies(dialects.uniform_policies(architecture, dialects.W8A8), architecture)
    assert not any("outlier-suppression+" in note for note in plain)
