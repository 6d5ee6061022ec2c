"""vLLM-Ascend's dialect against a reader written here from that engine's sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dialects
import numpy as np
import pytest
from checkpoints import DTYPES, tiny_config

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.dialects.ascend.codec import AscendCodec
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import LayerError, RecipeError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.families import read_architecture
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedLayer

FORMAT = AscendCodec()
POLICIES = (None, dialects.W8A8, dialects.W8A8_PLUS, dialects.W8A8_DYNAMIC, dialects.W8A8_MIX, dialects.W8A16)
STATIC = {"weight", "weight_scale", "weight_offset", "input_scale", "input_offset", "deq_scale", "quant_bias"}
DYNAMIC = {"weight", "weight_scale", "weight_offset"}


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
    description = dialects.load_json(directory / "quant_model_description.json")
    return reader.architecture, layers[1], stored, description


def engine_static(tensors: dict[str, Any], p: str, x: np.ndarray) -> np.ndarray:
    """`AscendW8A8LinearMethod.apply` (methods/w8a8_static.py): multiply by the reciprocal, add the offset, round;
    integer matmul; quant_bias added before the scale; the float bias is not used.
    """
    scale = np.float64(tensors[p + ".input_scale"].astype(np.float32)[0])
    quantized = np.clip(np.rint(x / scale) + tensors[p + ".input_offset"].astype(np.int64), -128, 127)
    deq = engine_deq_scale(tensors[p + ".deq_scale"])
    accumulated = quantized @ tensors[p + ".weight"].astype(np.int64).T
    return (accumulated + tensors[p + ".quant_bias"].astype(np.int64)) * deq


def engine_deq_scale(stored: np.ndarray) -> np.ndarray:
    """Float32, or as the float16 kernel reads it: the low half of an int64."""
    if stored.dtype == np.int64:
        stored = np.array([np.frombuffer(int(v).to_bytes(4, "little"), np.float32)[0] for v in stored])
    return stored.astype(np.float64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("zero_point", [0, -7, 127])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_static_linear_computes_what_the_integers_mean(
    tmp_path: Path, dtype: str, zero_point: int, model_type: str
) -> None:
    """The engine computes the dequantised weight times the fake-quantised input, plus bias, from W8A8 tensors."""
    _, layer, encoded, _ = build(tmp_path, dialects.W8A8_ASYMMETRIC, dtype, zero_point, model_type=model_type)
    x = np.random.default_rng(3).standard_normal((5, 64))
    for name, linear in layer.linears.items():
        if linear.codes.shape[1] != 64:
            continue
        scale = np.float64(encoded[f"model.layers.1.{name}.input_scale"].astype(np.float32)[0])
        assert scale == pytest.approx(linear.input_scale, rel=2**-8)
        fake = (np.clip(np.rint(x / scale) + zero_point, -128, 127) - zero_point) * scale
        weight = linear.codes.astype(np.float64) * linear.scale
        expected = fake @ weight.T + (0 if linear.bias is None else linear.bias)
        half_step = 0.5 * scale * linear.scale[:, 0]
        error = np.abs(engine_static(encoded, f"model.layers.1.{name}", x) - expected)
        assert (error <= half_step + 1e-5).all()


def test_folded_bias_is_not_lost(tmp_path: Path) -> None:
    """A W8A8 linear's quant_bias differs from that of the same linear without a bias by bias / deq_scale."""
    _, layer, encoded, _ = build(tmp_path, dialects.W8A8, model_type="qwen2")
    bias = layer.linears["self_attn.q_proj"].bias
    assert bias is not None
    p = "model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(encoded[p + ".quant_bias"], np.rint(bias / encoded[p + ".deq_scale"]))
    assert np.abs(encoded[p + ".quant_bias"]).max() > 10


@pytest.mark.parametrize(
    ("policy", "leaves"),
    [
        (dialects.W8A8, STATIC),
        (dialects.W8A8_MIX, STATIC),
        (dialects.W8A8_DYNAMIC, DYNAMIC),
        (dialects.W8A16, DYNAMIC),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_fit_the_parameters_that_the_engine_registers(
    tmp_path: Path, policy: QuantPolicy, leaves: set[str], dtype: str
) -> None:
    """Names, shapes and dtypes are those of get_weight, get_pertensor_param and get_perchannel_param.

    vllm_ascend/quantization/methods/{w8a8_static,w8a8_dynamic,w8a16}.py.
    """
    architecture, _, encoded, _ = build(tmp_path, policy, dtype)
    pd = np.dtype(DTYPES[dtype])
    for linear in architecture.linears(0):
        p = f"model.layers.1.{linear.name}."
        n, k = linear.out_features, linear.in_features
        registered = {
            "weight": (np.dtype(np.int8), (n, k)),
            "weight_scale": (pd, (n, 1)),
            "weight_offset": (pd, (n, 1)),
            "input_scale": (pd, (1,)),
            "input_offset": (np.dtype(np.int8), (1,)),
            "deq_scale": (np.dtype(np.int64 if dtype == "float16" else np.float32), (n,)),
            "quant_bias": (np.dtype(np.int32), (n,)),
        }
        found = {name.removeprefix(p): (a.dtype, a.shape) for name, a in encoded.items() if name.startswith(p)}
        assert found == {leaf: registered[leaf] for leaf in leaves}
        assert not encoded[p + "weight_offset"].astype(np.float32).any()


@pytest.mark.parametrize("policy", [dialects.W8A8_DYNAMIC, dialects.W8A16])
def test_weights_decode_to_the_same_values(tmp_path: Path, policy: QuantPolicy) -> None:
    """Weight x weight_scale, read with no help from the package, is the solver's dequantised weight."""
    _, layer, encoded, _ = build(tmp_path, policy)
    for name, linear in layer.linears.items():
        p = f"model.layers.1.{name}."
        weight = encoded[p + "weight"].astype(np.float32) * encoded[p + "weight_scale"].astype(np.float32)
        np.testing.assert_array_equal(weight, linear.dequantized())


def test_every_linear_is_found_by_the_engines_look_ups(tmp_path: Path) -> None:
    """Direct indexing of fused linears, one label each, and FLOAT for embedding and head.

    `get_linear_quant_type` and `is_layer_skipped_ascend` in vllm_ascend/quantization/modelslim_config.py.
    """
    _, _, _, description = build(tmp_path, dialects.W8A8, tie_word_embeddings=True)
    for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert {description[f"model.layers.1.{name}.weight"] for name in fused} == {"W8A8"}
    for module in ("lm_head", "model.embed_tokens"):
        skipped = any(k.startswith(module) and k.endswith(".weight") and v == "FLOAT" for k, v in description.items())
        assert skipped
    assert description["model.layers.1.self_attn.o_proj.weight"] == "W8A8"
    assert description["model_quant_type"] == "W8A8"
    assert description["version"] == "1.0.0"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_and_linears_get_a_place_for_the_biases_of_a_shift(tmp_path: Path, dtype: str) -> None:
    """The engine's norms have a bias once the description names one; a layer that was not shifted has zeros there.

    `AscendRMSNorm` in vllm_ascend/ops/layernorm.py looks for `norm.bias` in the description.
    """
    architecture, layer, encoded, description = build(tmp_path, dialects.W8A8_PLUS, dtype)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        name = f"model.layers.1.{norm}.bias"
        assert description[name] == "FLOAT"
        assert any("norm.bias" in key for key in description)
        assert (encoded[name].dtype, encoded[name].shape) == (DTYPES[dtype], (architecture.hidden_size,))
        assert not encoded[name].astype(np.float32).any()
    linear = replace(layer.linears["mlp.up_proj"], bias=np.linspace(-3, 3, 128, dtype=np.float32))
    shift = np.arange(architecture.hidden_size, dtype=np.float32)
    shifted = replace(
        layer,
        linears={**layer.linears, "mlp.up_proj": linear},
        tensors={**layer.tensors, "post_attention_layernorm.bias": shift},
    )
    encoded = FORMAT.encode_layer(shifted, architecture)
    up = "model.layers.1.mlp.up_proj."
    np.testing.assert_array_equal(encoded["model.layers.1.post_attention_layernorm.bias"], shift.astype(DTYPES[dtype]))
    np.testing.assert_array_equal(encoded[up + "bias"], linear.bias)
    unshifted = FORMAT.encode_layer(layer, architecture)
    deq_scale = engine_deq_scale(encoded[up + "deq_scale"])
    difference = (encoded[up + "quant_bias"] - unshifted[up + "quant_bias"]) * deq_scale
    assert np.abs(difference - linear.bias).max() <= 0.51 * deq_scale.max()


def test_kv_scales_are_named_as_the_cache_scale_mapper_expects(tmp_path: Path) -> None:
    """C8 scales sit beside k_proj and v_proj, one a channel of the KV heads, symmetric, and switch C8 on.

    `get_cache_scale_mapper` and `_add_kvcache_quant_metadata` in modelslim_config.py; attention_v1.py views the
    scale as (1, num_kv_heads, head_dim).
    """
    architecture, layer, encoded, description = build(tmp_path, None, kv_cache="per_channel", hidden_size=128)
    assert layer.kv_cache is not None
    for linear, scale in (("k_proj", layer.kv_cache.key_scale), ("v_proj", layer.kv_cache.value_scale)):
        stored = encoded[f"model.layers.1.self_attn.{linear}.kv_cache_scale"]
        assert stored.reshape(1, architecture.num_kv_heads, architecture.head_dim).dtype == DTYPES["bfloat16"]
        np.testing.assert_array_equal(stored.astype(np.float32), scale)
        assert not encoded[f"model.layers.1.self_attn.{linear}.kv_cache_offset"].any()
        assert description[f"model.layers.1.self_attn.{linear}.kv_cache_scale"] == "C8"
        assert description[f"model.layers.1.self_attn.{linear}.weight"] == "FLOAT"
    assert description["kv_cache_type"] == "C8"


def test_config_loses_its_quantization_config() -> None:
    """`quantization_config` is removed at the top and in text_config, and the given config is left as it was."""
    architecture = read_architecture(tiny_config())
    config = {"model_type": "llama", "quantization_config": {}, "text_config": {"quantization_config": {}, "a": 1}}
    assert FORMAT.config(config, {}, {}, architecture) == {"model_type": "llama", "text_config": {"a": 1}}
    assert "quantization_config" in config


@pytest.mark.parametrize("policy", [dialects.W8A8_ASYMMETRIC, dialects.W8A8_DYNAMIC, dialects.W8A16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decoding_gives_the_layer_back(tmp_path: Path, policy: QuantPolicy, dtype: str) -> None:
    """Codes, scales, zero points and untouched tensors survive the way through the files; biases to half a step."""
    layer = dialects.save_model(tmp_path, FORMAT, policy, dtype, "qwen2", 11, "per_channel", hidden_size=128)[1]
    decoded = FORMAT.decode_layer(CheckpointReader(tmp_path, quantized=True), 1)
    assert decoded.tensors.keys() == layer.tensors.keys()
    assert decoded.linears.keys() == layer.linears.keys()
    for name, linear in layer.linears.items():
        found = decoded.linears[name]
        np.testing.assert_array_equal(found.codes, linear.codes)
        np.testing.assert_array_equal(found.scale, linear.scale)
        assert found.input_zero_point == linear.input_zero_point
        assert found.policy.is_static == policy.is_static
        assert (found.bias is None) == (linear.bias is None)
        if linear.bias is not None and found.bias is not None:
            step = (linear.input_scale or 0) * linear.scale.max()
            np.testing.assert_allclose(found.bias, linear.bias, atol=0.51 * step + 0.004 * np.abs(linear.bias).max())
    assert decoded.kv_cache is not None
    assert layer.kv_cache is not None
    np.testing.assert_array_equal(decoded.kv_cache.key_scale, layer.kv_cache.key_scale)


def refusal(policies: dict[str, QuantPolicy | None], **config: Any) -> str:
    architecture = read_architecture(tiny_config(**config))
    everything = dialects.uniform_policies(architecture, None) | policies
    with pytest.raises(RecipeError) as caught:
        FORMAT.check_policies(everything, architecture)
    return str(caught.value)


@pytest.mark.parametrize(
    ("policy", "advice"),
    [
        (dialects.W4A16, "weight_quant_dtype: int8"),
        (dialects.W4A16_GROUPS, "weight_quant_dtype: int8"),
        (dialects.W4A8, "weight_quant_dtype: int8"),
        (QuantPolicy(weight_quant_granularity="per_group", group_size=64), "weight_quant_granularity: per_channel"),
        (QuantPolicy(weight_symmetric=False), "weight_symmetric: true"),
        (
            QuantPolicy(kvcache_quant_dtype="int8", kvcache_quant_granularity="per_token"),
            "kvcache_quant_granularity: per_channel",
        ),
    ],
)
def test_what_the_engine_cannot_load_is_refused_with_what_to_choose(policy: QuantPolicy, advice: str) -> None:
    """The message names a linear, how many more there are, and the setting to change."""
    architecture = read_architecture(tiny_config())
    message = refusal(dict(dialects.uniform_policies(architecture, policy)), hidden_size=128)
    assert advice in message
    assert "model.layers.0.self_attn" in message


def test_mixed_kinds_within_fused_linears_are_refused() -> None:
    """q/k/v, or gate and up, of different kinds are named together (ValueError in `get_linear_quant_type`)."""
    message = refusal({"model.layers.1.self_attn.q_proj": dialects.W8A8})
    assert "model.layers.1.self_attn.qkv_proj" in message
    assert "W8A8, FLOAT, FLOAT" in message
    gate_up = {"model.layers.0.mlp.gate_proj": dialects.W8A8, "model.layers.0.mlp.up_proj": dialects.W8A8_ASYMMETRIC}
    assert "one input scale" in refusal(gate_up)


def test_a_kv_cache_that_does_not_fill_the_engines_blocks_is_refused() -> None:
    """An int8 cache needs head_dim in multiples of 32 (NZ_FMT_LAST_DIM in attention_v1.py)."""
    policy = QuantPolicy(weight_quant_dtype=None, kvcache_quant_dtype="int8")
    assert "head_dim is 16" in refusal({"model.layers.0.self_attn.k_proj": policy})


@pytest.mark.parametrize("policy", [dialects.W8A8, dialects.W8A8_ASYMMETRIC, dialects.W8A8_DYNAMIC, dialects.W8A16])
def test_what_the_engine_loads_is_accepted(policy: QuantPolicy) -> None:
    """All int8 schemes pass, with a KV cache and with some layers left alone."""
    architecture = read_architecture(tiny_config(hidden_size=128))
    with_kv = QuantPolicy(**{**policy.model_dump(), "kvcache_quant_dtype": "int8"})
    policies = dialects.uniform_policies(architecture, with_kv)
    policies.update({name: None for name in policies if "layers.0." in name or name.endswith("down_proj")})
    FORMAT.check_policies(policies, architecture)


def test_fused_linears_with_two_input_scales_are_not_written(tmp_path: Path) -> None:
    """The engine would keep the last input scale it reads; the layer and linears are named instead."""
    architecture, layer, _, _ = build(tmp_path, dialects.W8A8)
    linears = dict(layer.linears)
    changed = {**vars(linears["self_attn.k_proj"]), "input_scale": 9.0}
    linears["self_attn.k_proj"] = type(linears["self_attn.k_proj"])(**changed)
    with pytest.raises(LayerError, match=r"layer 1, self_attn\.q_proj, self_attn\.k_proj"):
        FORMAT.encode_layer(QuantizedLayer(layer=1, linears=linears, tensors=layer.tensors), architecture)


def test_an_input_whose_reciprocal_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    """The engine multiplies by it, in the dtype that it serves: all codes would be infinite."""
    architecture, layer, _, _ = build(tmp_path, dialects.W8A8, "float16")
    linears = {
        name: type(linear)(**{**vars(linear), "input_scale": 2.0**-17 if name == "mlp.down_proj" else 0.5})
        for name, linear in layer.linears.items()
    }
    with pytest.raises(LayerError, match=r"mlp\.down_proj: the engine multiplies inputs by 1 / 7\.629e-06, which"):
        FORMAT.encode_layer(QuantizedLayer(layer=1, linears=linears, tensors=layer.tensors), architecture)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_linear_of_mixed_phases_holds_what_both_need(tmp_path: Path, model_type: str) -> None:
    """Tensors of a static linear, byte for byte, whose weight_scale a missing one of is no trifle: prefilling reads it.

    Other formats, experts and shifted inputs have no such linear.
    """
    architecture, layer, encoded, description = build(tmp_path / "mix", dialects.W8A8_MIX, model_type=model_type)
    _, _, static, labels = build(tmp_path / "static", dialects.W8A8, model_type=model_type)
    assert {name: array.tobytes() for name, array in encoded.items()} == {n: a.tobytes() for n, a in static.items()}
    assert description["model_quant_type"] == "W8A8_MIX"
    assert {n for n, label in description.items() if label == "W8A8_MIX"} == {
        n for n, label in labels.items() if label == "W8A8"
    }
    decoded = FORMAT.decode_layer(CheckpointReader(tmp_path / "mix", quantized=True), 1)
    assert {linear.policy.act_quant_granularity for linear in decoded.linears.values()} == {"pd_mix"}
    assert {name: linear.input_scale for name, linear in decoded.linears.items()} == {
        name: linear.input_scale for name, linear in layer.linears.items()
    }
    for engine in (None, "vllm-ascend", "vllm-ascend==0.23"):
        assert check(tmp_path / "mix", engine).clean
    assert not check(tmp_path / "mix", "sglang").clean
    policies = dialects.uniform_policies(architecture, dialects.W8A8_MIX)
    for dialect in ("compressed-tensors", "golden-stick"):
        with pytest.raises(RecipeError, match=r"pd_mix is W8A8_MIX, which vLLM-Ascend alone serves: set format: .asc"):
            codec_of(dialect).check_policies(policies, architecture)
    with pytest.raises(ValueError, match="pd_mix prefills without the corrections"):
        QuantPolicy(**{**dialects.W8A8_MIX.model_dump(), "outliers_suppression": "outlier-suppression+"})


def test_a_bias_that_int32_cannot_hold_is_named(tmp_path: Path) -> None:
    """A channel whose deq_scale is too small for its bias is an error with the linear's name, not a wrapped integer."""
    architecture, layer, _, _ = build(tmp_path, dialects.W8A8, "float32", model_type="qwen2")
    linear = layer.linears["self_attn.q_proj"]
    changed = type(linear)(**{**vars(linear), "scale": np.full_like(linear.scale, 1e-12)})
    with pytest.raises(LayerError, match=r"layers\.1\.self_attn\.q_proj, output channel .* outside int32"):
        FORMAT.encode_layer(
            QuantizedLayer(layer=1, linears={**layer.linears, "self_attn.q_proj": changed}, tensors=layer.tensors),
            architecture,
        )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_expected_tensors_are_what_is_written(
    tmp_path: Path, policy: QuantPolicy | None, dtype: str, model_type: str
) -> None:
    """Names, dtypes and shapes foretold from the policies are those of the encoded layer."""
    architecture, _, encoded, _ = build(tmp_path, policy, dtype, model_type=model_type)
    policies = dialects.uniform_policies(architecture, policy)
    expected = FORMAT.expected_tensors(1, policies, None, architecture)
    assert {n: (t.dtype or dtype, t.shape) for n, t in expected.items()} == {
        n: (a.dtype.name, a.shape) for n, a in encoded.items()
    }
