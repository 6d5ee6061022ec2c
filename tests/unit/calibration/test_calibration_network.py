"""The decoder against transformers (golden values) and against plain NumPy."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import tiny_checkpoint
from safetensors import safe_open

from gs_dist.calibration.device import Device, open_device
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.families import read_architecture
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedKVCache, QuantizedLayer, QuantizedLinear

DATA = Path(__file__).parents[2] / "data"
sys.path.insert(0, str(DATA))

import make_golden_logits as golden  # noqa: E402  (lies beside the values it made)

Array = npt.NDArray[Any]


class Tiny(NamedTuple):
    network: DecoderNetwork
    tensors: dict[str, Array]
    layer: dict[str, Array]
    hidden: Array


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device("cpu")


def load(directory: Path) -> tuple[DecoderArchitecture, dict[str, Any]]:
    """Architecture and tensors of a checkpoint of one file."""
    config = json.loads((directory / "config.json").read_text())
    with safe_open(directory / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping: has no __iter__)
    return read_architecture(config), tensors


def within(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: array for name, array in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", golden.CASES)
def test_logits_are_those_of_transformers(name: str, device: Device, tmp_path: Path) -> None:
    """Every served model type gives the logits of the independent implementation, to float32 rounding."""
    directory = golden.build(name, tmp_path)
    with safe_open(DATA / "golden_logits.safetensors", "np") as file:
        expected = file.get_tensor(name)
        digests = json.loads(file.metadata()["digests"])
    assert golden.digest(directory) == digests[name], "the weights changed: run tests/data/make_golden_logits.py again"
    architecture, tensors = load(directory)
    network = DecoderNetwork(architecture, device)
    outer = network.outer_weights(tensors)
    hidden = network.embed(outer, golden.input_ids())
    for layer in range(architecture.num_layers):
        weights = network.layer_weights(layer, within(tensors, architecture.layer_prefix(layer)))
        hidden, _ = network.forward_layer(weights, hidden, capture=False)
    logits = device.to_numpy(network.logits(outer, hidden))[:, golden.POSITIONS]
    assert np.abs(logits - expected).max() < 4e-6 * np.abs(expected).max()  # frequencies differ by a float32 ulp


@pytest.fixture(scope="module")
def tiny(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """One layer of a Llama with biases, and hidden states of 2 x 20 tokens that went in."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("tiny"), attention_bias=True, mlp_bias=True, num_layers=1)
    architecture, tensors = load(directory)
    hidden = np.random.default_rng(5).standard_normal((2, 20, 64)).astype(np.float32)
    return Tiny(DecoderNetwork(architecture, device), tensors, within(tensors, "model.layers.0."), hidden)


def test_captured_activations_are_what_the_linears_read(tiny: Tiny, device: Device) -> None:
    """Each captured activation, put through its linears by hand, gives what follows it in the layer."""
    network, layer = tiny.network, tiny.layer
    output, captured = network.forward_layer(network.layer_weights(0, layer), device.to_tensor(tiny.hidden))
    seen = {name: device.to_numpy(tensor) for name, tensor in captured.items()}
    shapes = {i.name: (2, 20, i.channels) for i in network.architecture.inputs(0)}
    assert {name: array.shape for name, array in seen.items()} == shapes | {"key": (2, 20, 32), "value": (2, 20, 32)}
    seen["output"] = device.to_numpy(output)
    for name, expected in reference_layer(tiny, {}, None, {}).items():
        np.testing.assert_allclose(seen[name], expected, atol=5e-5, err_msg=name)


def test_a_layer_that_captures_nothing_gives_the_same_bits(tiny: Tiny, device: Device) -> None:
    """Capturing changes no bit of the output, and neither do the other samples of the micro-batch."""
    weights = tiny.network.layer_weights(0, tiny.layer)
    hidden = device.to_tensor(tiny.hidden)
    plain, nothing = tiny.network.forward_layer(weights, hidden, capture=False)
    captured, _ = tiny.network.forward_layer(weights, hidden)
    alone, _ = tiny.network.forward_layer(weights, device.to_tensor(tiny.hidden[1:]), capture=False)
    assert nothing == {}
    np.testing.assert_array_equal(device.to_numpy(plain), device.to_numpy(captured))
    np.testing.assert_array_equal(device.to_numpy(plain)[1:], device.to_numpy(alone))


def test_later_tokens_change_nothing_before_them(tiny: Tiny, device: Device) -> None:
    """Attention is causal: replacing the last tokens leaves every earlier output as it was."""
    weights = tiny.network.layer_weights(0, tiny.layer)
    changed = tiny.hidden.copy()
    changed[:, 15:] = 7.0
    first, second = (
        device.to_numpy(tiny.network.forward_layer(weights, device.to_tensor(hidden), capture=False)[0])
        for hidden in (tiny.hidden, changed)
    )
    np.testing.assert_array_equal(first[:, :15], second[:, :15])
    assert (first[:, 15:] != second[:, 15:]).any(axis=-1).all()


def test_weights_are_not_copied_from_a_float32_checkpoint(tiny: Tiny, device: Device) -> None:
    """A float32 weight stays where the checkpoint's reader put it."""
    weights = tiny.network.layer_weights(0, tiny.layer)
    for linear, tensors in zip(
        tiny.network.architecture.linears(0), (*weights.attention[0], *weights.mlp[0]), strict=True
    ):
        assert np.shares_memory(device.to_numpy(tensors[0]), tiny.layer[f"{linear.name}.weight"])


STATIC = {"act_quant_dtype": "int8"}
DYNAMIC = {"act_quant_dtype": "int8", "act_quant_granularity": "per_token"}


def quantize(tiny: Tiny, policies: Mapping[str, dict[str, Any]], kv_cache: QuantizedKVCache | None) -> QuantizedLayer:
    """int8 weights per channel, static inputs on a grid that clips a few values, all other tensors as they are."""
    linears = {}
    for number, (name, fields) in enumerate(policies.items()):
        weight = tiny.layer[f"{name}.weight"]
        scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127.5)
        policy = QuantPolicy(**fields)
        linears[name] = QuantizedLinear(
            policy=policy,
            codes=np.clip(np.round(weight / scale), -128, 127).astype(np.int8),
            scale=scale,
            bias=tiny.layer[f"{name}.bias"] * np.float32(1.5),
            input_scale=0.02 if policy.is_static else None,
            input_zero_point=10 * number if policy.is_static and number % 2 else None,
        )
    rest = {name: array for name, array in tiny.layer.items() if name.rpartition(".")[0] not in linears}
    return QuantizedLayer(layer=0, linears=linears, tensors=rest, kv_cache=kv_cache)


def round_to(x: Array, scale: Any, zero_point: float = 0.0) -> Array:
    codes = np.clip(np.round(x.astype(np.float32) / scale) + np.float32(zero_point), -128, 127)
    return np.asarray((codes - np.float32(zero_point)) * scale, dtype=np.float32)


def round_rows(x: Array) -> Array:
    return round_to(x, np.abs(x.astype(np.float32)).max(axis=-1, keepdims=True) / np.float32(127.5))


def reference_layer(
    tiny: Tiny,
    linears: Mapping[str, QuantizedLinear],
    kv_cache: QuantizedKVCache | None,
    seen: Mapping[str, Array],
) -> dict[str, Array]:
    """The layer in float64, one head and one token at a time: captured activations and `output`.

    What follows an activation is computed from its value in `seen`, where that has it: otherwise values
    on the edge between two integers would round one way in float32 and another way here.
    """
    architecture, layer = tiny.network.architecture, tiny.layer
    heads, groups, size = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim

    def norm(x: Array, name: str) -> Array:
        root = np.sqrt((x * x).mean(axis=-1, keepdims=True) + architecture.rms_norm_eps)
        return np.asarray(x / root * layer[f"{name}.weight"].astype(np.float64))

    def linear(x: Array, name: str) -> Array:
        found = linears.get(name)
        if found is None:
            return np.asarray(x @ layer[f"{name}.weight"].astype(np.float64).T + layer[f"{name}.bias"])
        if found.policy.is_static:
            x = round_to(x, np.float32(found.input_scale), found.input_zero_point or 0)
        elif found.policy.act_quant_dtype is not None:
            x = round_rows(x)
        return np.asarray(x @ (found.codes * found.scale.astype(np.float64)).T + found.bias)

    def rotate(x: Array) -> Array:
        turned = np.empty_like(x)
        for position in range(x.shape[1]):
            for head in range(x.shape[2] // size):
                for pair in range(size // 2):
                    first, second = head * size + pair, head * size + pair + size // 2
                    angle = position * architecture.layers[0].attention.rotary.theta ** (-2 * pair / size)
                    a, b = x[:, position, first], x[:, position, second]
                    turned[:, position, first] = a * np.cos(angle) - b * np.sin(angle)
                    turned[:, position, second] = b * np.cos(angle) + a * np.sin(angle)
        return turned

    computed: dict[str, Array] = {}

    def step(name: str, value: Array) -> Array:
        computed[name] = value
        return seen.get(name, value)

    hidden = tiny.hidden.astype(np.float64)
    attention_input = step("attention_input", norm(hidden, "input_layernorm"))
    query = rotate(linear(attention_input, "self_attn.q_proj"))
    key = step("key", rotate(linear(attention_input, "self_attn.k_proj")))
    value = step("value", linear(attention_input, "self_attn.v_proj"))
    if kv_cache is not None:
        key = round_rows(key) if kv_cache.key_scale is None else round_to(key, kv_cache.key_scale)
        value = round_rows(value) if kv_cache.value_scale is None else round_to(value, kv_cache.value_scale)
    attended = np.zeros_like(query)
    for sample, position, head in np.ndindex(*query.shape[:2], heads):
        mine = slice(head * size, (head + 1) * size)
        group = head // (heads // groups)
        its = slice(group * size, (group + 1) * size)
        scores = key[sample, : position + 1, its] @ query[sample, position, mine] / np.sqrt(size)
        weights = np.exp(scores - scores.max())
        attended[sample, position, mine] = weights / weights.sum() @ value[sample, : position + 1, its]
    hidden = hidden + linear(step("attention_output", attended), "self_attn.o_proj")
    mlp_input = step("mlp_input", norm(hidden, "post_attention_layernorm"))
    gate = linear(mlp_input, "mlp.gate_proj")
    activation = step("mlp_activation", gate / (1 + np.exp(-gate)) * linear(mlp_input, "mlp.up_proj"))
    computed["output"] = hidden + linear(activation, "mlp.down_proj")
    return computed


QUANTIZED: dict[str, tuple[dict[str, dict[str, Any]], tuple[str, str] | None]] = {
    "weights alone": ({"self_attn.q_proj": {}, "mlp.down_proj": {}}, None),
    "one scheme a linear": (
        {
            "self_attn.q_proj": DYNAMIC,
            "self_attn.k_proj": STATIC,
            "self_attn.v_proj": {},
            "self_attn.o_proj": STATIC,
            "mlp.up_proj": DYNAMIC,
            "mlp.down_proj": STATIC,
        },
        None,
    ),
    "keys per channel, values per token": ({"mlp.gate_proj": DYNAMIC}, ("per_channel", "per_token")),
    "keys per token, values per channel": ({"mlp.gate_proj": STATIC}, ("per_token", "per_channel")),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_layer_computes_what_its_integers_would(case: str, tiny: Tiny, device: Device) -> None:
    """Weights, inputs, keys and values are rounded as each linear's policy and the cache say, and nothing else is."""
    policies, granularities = QUANTIZED[case]
    scales = np.linspace(0.01, 0.03, 32, dtype=np.float32)
    kv_cache = None
    if granularities is not None:
        key_scale, value_scale = (scales if granularity == "per_channel" else None for granularity in granularities)
        kv_cache = QuantizedKVCache(key_scale=key_scale, value_scale=value_scale)
    quantized = quantize(tiny, policies, kv_cache)
    weights = tiny.network.layer_weights(0, {}, quantized)
    output, captured = tiny.network.forward_layer(weights, device.to_tensor(tiny.hidden))
    seen = {"output": output, **captured}
    seen = {name: device.to_numpy(tensor) for name, tensor in seen.items()}
    for name, expected in reference_layer(tiny, quantized.linears, kv_cache, seen).items():
        np.testing.assert_allclose(seen[name], expected, atol=5e-5, err_msg=name)
    original = reference_layer(tiny, {}, None, {})["output"]
    assert np.median(np.abs(seen["output"] - original)) > 1e-3


def test_a_row_of_zeros_survives_rounding_per_token(tiny: Tiny, device: Device) -> None:
    """A token whose activation is zero keeps finite outputs under dynamic rounding."""
    quantized = quantize(tiny, {"self_attn.q_proj": DYNAMIC}, QuantizedKVCache(key_scale=None, value_scale=None))
    output, _ = tiny.network.forward_layer(
        tiny.network.layer_weights(0, {}, quantized), device.to_tensor(np.zeros_like(tiny.hidden)), capture=False
    )
    assert np.isfinite(device.to_numpy(output)).all()


def test_losses_are_the_negative_log_likelihood_of_the_next_token(
    tiny: Tiny, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sample's loss sums over pairs of neighbouring unmasked tokens, however the logits are cut into chunks."""
    network = tiny.network
    outer = network.outer_weights(tiny.tensors)
    ids = np.random.default_rng(3).integers(0, 128, (2, 20)).astype(np.int32)
    mask = np.ones((2, 20), bool)
    mask[0, 13:] = False
    mask[1] = False
    hidden = device.to_tensor(tiny.hidden)
    logits = device.to_numpy(network.logits(outer, hidden)).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = sum(-np.log(probabilities[0, p, ids[0, p + 1]]) for p in range(12))
    for limit in (1 << 20, 1):  # all rows at once; 16 at a time, the last chunk overlapping
        monkeypatch.setattr("gs_dist.calibration.network._LOGITS_BYTES", limit)
        sums, counts = network.token_losses(outer, hidden, ids, mask)
        assert (sums.dtype, counts.tolist(), sums[1]) == (np.float64, [12, 0], 0.0)
        assert sums[0] == pytest.approx(expected, rel=1e-6)


def test_a_stage_takes_the_outer_weights_it_has(tiny: Tiny, device: Device) -> None:
    """A first stage embeds without a norm, a middle stage needs neither, and a tied head waits for the norm."""
    network = tiny.network
    embedding = tiny.tensors["model.embed_tokens.weight"]
    first = network.outer_weights({"model.embed_tokens.weight": embedding})
    ids = np.array([[5, 0], [127, 5]], np.int32)
    np.testing.assert_array_equal(device.to_numpy(network.embed(first, ids)), embedding[ids])
    assert first.norm is first.head is None
    empty = network.outer_weights({})
    assert (empty.embedding, empty.norm, empty.head) == (None, None, None)
    tied = DecoderNetwork(dataclasses.replace(network.architecture, tie_word_embeddings=True), device)
    assert tied.outer_weights({"model.embed_tokens.weight": embedding}).head is None
    both = tied.outer_weights({name: tiny.tensors[name] for name in ("model.embed_tokens.weight", "model.norm.weight")})
    assert np.shares_memory(device.to_numpy(both.head), embedding)


def test_a_missing_tensor_is_named(tiny: Tiny) -> None:
    """A layer without one of its tensors is refused by that tensor's name."""
    partial = {name: array for name, array in tiny.layer.items() if name != "mlp.up_proj.weight"}
    with pytest.raises(KeyError, match=r"mlp\.up_proj\.weight"):
        tiny.network.layer_weights(0, partial)
