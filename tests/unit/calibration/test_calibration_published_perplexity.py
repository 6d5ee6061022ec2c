"""Every scheme in every format that holds it: the evaluation network against a decoder of the files written here.

The decoders below follow the formats' rules and share no code with the writers or readers of the package; the model
around them is plain NumPy in float64. Static linears compute as their engines do, from the integer product with its
correction and its one scale, so that a wrong `deq_scale` or `quant_bias` shows as well as a wrong weight.

A value on a rounding edge falls to one side or the other by the last digit of a float32, and the most negative value
of a token lies on one by construction, at -127.5 steps. So whatever is rounded must first equal what the network
rounds but for those digits, and is then taken from the network: the sides are the same, and all else is compared.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import tiny_checkpoint
from quantized_layers import GROUP, LINEARS, SCHEMES, quantize, round_linear
from safetensors import safe_open

from gs_dist.calibration.device import open_device
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.header import DTYPES, SPELLINGS
from gs_dist.checkpoint.manifest import Fingerprints, publish_layer, publish_outer
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.results.quantized import QuantizedKVCache, QuantizedLayer, QuantizedLinear

Array = npt.NDArray[Any]
Apply = Callable[[Array], Array]

GROUP_INDEX = {
    "weight_quant_dtype": "qint4x2",
    **GROUP,
    "precision_recovery": "gptq",
    "algo_args": AlgoArgs(desc_act=True, static_groups=False),
}
ALL: dict[str, dict[str, Any]] = {
    **SCHEMES,
    "W4A16 with group index": GROUP_INDEX,
    "W8A16 with KV cache": {"kvcache_quant_dtype": "int8"},
    "W8A8 static with made biases": {"act_quant_dtype": "int8", "outliers_suppression": "outlier-suppression+"},
}
STATIC_AND_DYNAMIC = ("W8A16", "W8A8 static", "W8A8 static asymmetric", "W8A8 dynamic")
HOLDS = {
    "compressed-tensors": tuple(name for name in ALL if "made" not in name),
    "ascend": (*STATIC_AND_DYNAMIC, "W8A16 with KV cache", "W8A8 static with made biases"),
    "golden-stick": (*STATIC_AND_DYNAMIC, "W4A16 per channel", "W4A16 per group", "W4A16 ordered by activation"),
}
CASES = [(name, scheme) for name, schemes in HOLDS.items() for scheme in schemes]
# Scales that no bfloat16 or float16 holds exactly, one for each tensor that linears read.
INPUT_SCALES = {"q_proj": 0.0637, "o_proj": 0.0119, "gate_proj": 0.0661, "down_proj": 0.0523}
INPUT_OF = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


# The formats' rules, read from the files.


def stored_tensors(directory: Path) -> dict[str, Array]:
    """All tensors that the index lists, floats widened to float64, integers as they are."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for file in set(weight_map.values()):
        with safe_open(directory / file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping, it has keys() alone
                array = opened.get_tensor(name)
                tensors[name] = array if array.dtype.kind == "i" else array.astype(np.float64)
    return tensors


def rounded(x: Array, scale: Any, zero: Any = 0.0) -> Array:
    """Codes of int8, in float32 as engines compute them."""
    single = np.float32
    return np.clip(np.rint(single(x) / single(scale) + single(zero)), -128, 127).astype(np.float64)


def float_linear(weight: Array, bias: Array | None, *, per_token: bool = False) -> Apply:
    """Dequantised weight; `per_token` rounds each token to steps of absmax / 127.5 first."""

    def apply(x: Array) -> Array:
        if per_token:
            scale = np.abs(np.float32(x)).max(axis=-1, keepdims=True) / np.float32(127.5)
            x = rounded(x, scale) * scale
        y = x @ weight.T
        return y if bias is None else y + bias

    return apply


def integer_linear(t: Mapping[str, Array], deq_scale: Array, bias: Array | None) -> Apply:
    """(codes x integer weight + quant_bias) x deq_scale, then the bias where the engine adds one."""

    def apply(x: Array) -> Array:
        codes = rounded(x, t["input_scale"], t["input_offset"].astype(np.float64))
        y = (codes @ t["weight"].astype(np.float64).T + t["quant_bias"]) * deq_scale
        return y if bias is None else y + bias

    return apply


def ascend_linear(t: Mapping[str, Array], label: str, model_dtype: str) -> Apply:
    """vLLM-Ascend, quantization/methods/w8a8_static.py, w8a8_dynamic.py, w8a16.py."""
    if label == "FLOAT":
        return float_linear(t["weight"], t.get("bias"))
    if label == "W8A8":
        deq_scale = t["deq_scale"]
        if model_dtype == "float16":
            assert deq_scale.dtype == np.int64
            words = [int(value).to_bytes(8, "little")[:4] for value in deq_scale]
            deq_scale = np.array([np.frombuffer(word, np.float32)[0] for word in words], np.float64)
        return integer_linear(t, deq_scale, None)
    weight = (t["weight"] - t["weight_offset"]) * t["weight_scale"]
    return float_linear(weight, t.get("bias"), per_token=label == "W8A8_DYNAMIC")


def golden_stick_linear(t: Mapping[str, Array], label: str, model_dtype: str) -> Apply:
    """vLLM-MindSpore, golden_stick/a8w8.py; shapes and packing of the golden-stick wheel."""
    if label == "FLOAT":
        return float_linear(t["weight"], t.get("bias"))
    if label == "W8A8":
        return integer_linear(t, t["deq_scale"], t.get("bias"))
    codes = t["weight"].astype(np.float64)
    if label == "W4A16":  # (K, N / 2), even output channel in the low half
        halves = [t["weight"].astype(np.int64) % 16, t["weight"].astype(np.int64) // 16 % 16]
        codes = np.stack(halves, axis=-1).reshape(codes.shape[0], -1).T
        codes = np.where(codes >= 8, codes - 16, codes).astype(np.float64)
    scale, offset = np.atleast_2d(t["weight_scale"]), np.atleast_2d(t["weight_offset"])  # (G, N)
    repeat = codes.shape[1] // scale.shape[0]
    weight = (codes - np.repeat(offset, repeat, axis=0).T) * np.repeat(scale, repeat, axis=0).T
    return float_linear(weight, t.get("bias"), per_token=label == "W8A8_DYNAMIC")


def unpacked(packed: Array, bits: int, columns: int) -> Array:
    """int32 words (rows, words) to signed codes (rows, columns): little end first, 2^(bits - 1) taken off."""
    words = packed.astype(np.int64) % 2**32
    parts = [words // 2 ** (bits * place) % 2**bits for place in range(32 // bits)]
    return (np.stack(parts, axis=-1).reshape(len(packed), -1)[:, :columns] - 2 ** (bits - 1)).astype(np.float64)


def compressed_tensors_linear(t: Mapping[str, Array], group: Mapping[str, Any] | None) -> Apply:
    """compressed-tensors, compressors/quantized_compressors/pack_quantized.py and quantization/lifecycle/forward.py."""
    if group is None:
        return float_linear(t["weight"], t.get("bias"))
    weights, activations = group["weights"], group["input_activations"]
    scale = t["weight_scale"]
    zero = np.zeros_like(scale)
    if activations is None:
        rows, columns = (int(size) for size in t["weight_shape"])
        codes = unpacked(t["weight_packed"], weights["num_bits"], columns)
        if not weights["symmetric"]:
            zero = unpacked(t["weight_zero_point"].T, weights["num_bits"], rows).T
    else:
        codes = t["weight"].astype(np.float64)
        zero = zero if weights["symmetric"] else t["weight_zero_point"].astype(np.float64)
    columns = codes.shape[1]
    index = t["weight_g_idx"] if "weight_g_idx" in t else np.arange(columns) // (columns // scale.shape[1])
    weight = (codes - zero[:, index]) * scale[:, index]
    if activations is None or activations["dynamic"]:
        return float_linear(weight, t.get("bias"), per_token=activations is not None)
    input_zero = np.float64(0 if activations["symmetric"] else t["input_zero_point"][0])
    linear = float_linear(weight, t.get("bias"))
    return lambda x: linear((rounded(x, t["input_scale"], input_zero) - input_zero) * t["input_scale"])


class Files:
    """A model directory of one of the formats: each linear as a function, and the KV cache's scales."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.config = json.loads((directory / "config.json").read_text())
        self.tensors = stored_tensors(directory)
        described = {"ascend": "quant_model_description.json", "golden-stick": "quantization_description.json"}
        self.labels = json.loads((directory / described[name]).read_text()) if name in described else {}

    def linear(self, module: str) -> Apply:
        own = {n.rpartition(".")[2]: a for n, a in self.tensors.items() if n.rpartition(".")[0] == module}
        if self.name == "compressed-tensors":
            quantization = self.config["quantization_config"]
            assert quantization["ignore"] == ["lm_head"]
            (group,) = quantization["config_groups"].values()
            assert group["targets"] == ["Linear"]
            return compressed_tensors_linear(own, None if module == "lm_head" else group)
        decode = ascend_linear if self.name == "ascend" else golden_stick_linear
        return decode(own, self.labels[f"{module}.weight"], self.config["torch_dtype"])

    def cache_scales(self, attention: str) -> tuple[Array | float, Array | float]:
        """Scale of keys and of values by channel; infinitely fine where the cache is float."""
        if self.name == "ascend":
            names = [f"{attention}.{projection}.kv_cache_scale" for projection in ("k_proj", "v_proj")]
        else:
            names = [f"{attention}.{part}" for part in ("k_scale", "v_scale")]
        found = [self.tensors.get(name, 0.0) for name in names]
        return found[0], found[1]


# The model around the linears.


def normed(x: Array, name: str, files: Files) -> Array:
    """RMSNorm, with a bias where the files give it one (vLLM-Ascend, ops/layernorm.py)."""
    scaled = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + files.config["rms_norm_eps"])
    return scaled * files.tensors[f"{name}.weight"] + files.tensors.get(f"{name}.bias", 0.0)


def rotated(x: Array, theta: float) -> Array:
    """Rotary embedding of (tokens, heads, size), halves as coordinates."""
    tokens, _, size = x.shape
    angle = np.arange(tokens)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    cosine, sine = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def settled(x: Array, seen: Array) -> Array:
    """What the network rounds, if it is `x` but for the last digits of a float32."""
    np.testing.assert_allclose(x, seen, rtol=0, atol=1e-5 * np.abs(seen).max())
    return seen.astype(np.float64)


def cached(x: Array, scale: Array | float) -> Array:
    return rounded(x, scale) * scale if np.any(scale) else x


def attention(files: Files, prefix: str, x: Array, seen: Mapping[str, Array]) -> Array:
    """What o_proj reads, (tokens, channels)."""
    config = files.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size, tokens = config["hidden_size"] // heads, len(x)
    query, key, value = (files.linear(f"{prefix}.{name}")(x) for name in ("q_proj", "k_proj", "v_proj"))
    key = rotated(key.reshape(tokens, kv_heads, size), config["rope_theta"]).reshape(tokens, -1)
    key_scale, value_scale = files.cache_scales(prefix)
    key, value = cached(settled(key, seen["key"]), key_scale), cached(settled(value, seen["value"]), value_scale)
    query = rotated(query.reshape(tokens, heads, size), config["rope_theta"])
    key, value = (np.repeat(a.reshape(tokens, kv_heads, size), heads // kv_heads, axis=1) for a in (key, value))
    scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(size)
    scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, value).reshape(tokens, -1)


def reference_logits(files: Files, ids: Array, seen: list[dict[str, Array]]) -> Array:
    """Logits (tokens, vocabulary) of one sample; `seen` holds what the network rounds, by layer."""
    x = files.tensors["model.embed_tokens.weight"][ids]
    for layer, own in enumerate(seen):
        prefix = f"model.layers.{layer}"
        read = settled(normed(x, f"{prefix}.input_layernorm", files), own["attention_input"])
        mixed = settled(attention(files, f"{prefix}.self_attn", read, own), own["attention_output"])
        x = x + files.linear(f"{prefix}.self_attn.o_proj")(mixed)
        read = settled(normed(x, f"{prefix}.post_attention_layernorm", files), own["mlp_input"])
        gate, up = (files.linear(f"{prefix}.mlp.{name}")(read) for name in ("gate_proj", "up_proj"))
        activated = settled(gate / (1 + np.exp(-gate)) * up, own["mlp_activation"])
        x = x + files.linear(f"{prefix}.mlp.down_proj")(activated)
    return files.linear("lm_head")(normed(x, "model.norm", files))


def reference_perplexity(logits: Array, ids: Array) -> float:
    logits = logits[:, :-1]
    top = logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    taken = np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return float(np.exp((log_sum - taken).mean()))


# What is published, and what the package makes of it.


def solved(reader: CheckpointReader, layer: int, policy: QuantPolicy) -> QuantizedLayer:
    """A layer rounded plainly, with input scales of its own, group index and KV cache scales as the policy says."""
    rough = quantize(reader, layer, dict.fromkeys(LINEARS, policy))
    dtype = DTYPES[SPELLINGS[reader.architecture.dtype]]
    rng = np.random.default_rng(layer)
    linears: dict[str, QuantizedLinear] = {}
    for name, linear in rough.linears.items():
        if policy.is_static:
            leaf = name.rpartition(".")[2]
            scale = INPUT_SCALES[INPUT_OF.get(leaf, leaf)] * (1 + layer / 8)
            linear = dataclasses.replace(linear, input_scale=float(scale))
        if policy.makes_bias:
            linear = dataclasses.replace(linear, bias=rng.normal(0, 0.1, len(linear.codes)).astype(np.float32))
        if policy.precision_recovery == "gptq" and not policy.algo_args.static_groups:
            order = rng.permutation(linear.codes.shape[1])
            place = np.argsort(order)
            weight = reader.read_layer(layer)[f"{name}.weight"][:, order]
            sorted_linear = round_linear(weight, linear.bias, policy, reader.architecture.dtype)
            index = (place // policy.group_size).astype(np.int32)
            codes = np.ascontiguousarray(sorted_linear.codes[:, place])
            linear = dataclasses.replace(sorted_linear, codes=codes, group_index=index)
        linears[name] = linear
    cache = None
    if policy.kvcache_quant_dtype is not None:
        scales = rng.uniform(0.03, 0.09, (2, reader.architecture.kv_size)).astype(dtype).astype(np.float32)
        cache = QuantizedKVCache(key_scale=scales[0], value_scale=scales[1])
    tensors = dict(rough.tensors)
    for norm in ("input_layernorm", "post_attention_layernorm") if policy.makes_bias else ():
        tensors[f"{norm}.bias"] = rng.normal(0, 0.2, reader.architecture.hidden_size).astype(dtype)
    return dataclasses.replace(rough, linears=linears, tensors=tensors, kv_cache=cache)


def published(source: Path, output: Path, name: str, policy: QuantPolicy) -> Path:
    """The model directory that a run writes."""
    reader = CheckpointReader(source)
    prints = Fingerprints(recipe="r", source="s", data="d")
    output.mkdir()
    layers = [solved(reader, layer, policy) for layer in range(reader.architecture.num_layers)]
    manifests = [publish_layer(output, layer, reader.architecture, [name], prints) for layer in layers]
    merge_checkpoint(output, name, reader, manifests, publish_outer(output, reader, [name], prints))
    return output / name


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """By the network of `gs-dist evaluate`: logits, perplexity, roundings of inputs and cache, and what is rounded."""

    logits: Array
    perplexity: float
    roundings: set[tuple[str, ...]]
    seen: list[dict[str, Array]]


def evaluate(directory: Path, name: str, ids: Array) -> Evaluated:
    reader = CheckpointReader(directory, quantized=True)
    network = DecoderNetwork(reader.architecture, open_device("cpu", threads=1))
    outer = network.outer_weights(reader.read_outer())
    hidden = network.embed(outer, ids)
    roundings, seen = set(), []
    for layer in range(reader.architecture.num_layers):
        weights = network.layer_weights(layer, {}, quantized=codec_of(name).decode_layer(reader, layer))
        roundings.add((*weights.attention_schemes, *weights.mlp_schemes, *weights.kv_schemes))
        hidden, captured = network.forward_layer(weights, hidden)
        seen.append({key: tensor.asnumpy() for key, tensor in captured.items()})
    losses, tokens = network.token_losses(outer, hidden, ids, np.ones(ids.shape, dtype=bool))
    perplexity = float(np.exp(losses.sum() / tokens.sum()))
    return Evaluated(network.logits(outer, hidden).asnumpy(), perplexity, roundings, seen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_perplexity_is_that_of_the_files(tmp_path: Path, name: str, scheme: str, dtype: str) -> None:
    """The evaluation's perplexity equals an independent decoding's within 0.1 %, and so do logits and activations."""
    # Linears of q, k and v have a bias here, so that it is seen whether one is folded, added, or added twice.
    source = tiny_checkpoint(tmp_path / "source", "qwen2", dtype, hidden_size=128)
    policy = QuantPolicy(**ALL[scheme])
    directory = published(source, tmp_path / "run", name, policy)
    ids = np.random.default_rng(3).integers(0, 128, (4, 48)).astype(np.int32)
    found = evaluate(directory, name, ids)
    inputs = "none" if policy.act_quant_dtype is None else policy.act_quant_granularity
    cache = "none" if policy.kvcache_quant_dtype is None else "per_channel"
    assert found.roundings == {(inputs,) * 7 + (cache,) * 2}
    files = Files(directory, name)
    samples = [[{key: a[number] for key, a in own.items()} for own in found.seen] for number in range(len(ids))]
    wanted = np.stack([reference_logits(files, sample, seen) for sample, seen in zip(ids, samples, strict=True)])
    np.testing.assert_allclose(found.logits, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert found.perplexity == pytest.approx(reference_perplexity(wanted, ids), rel=1e-3)
