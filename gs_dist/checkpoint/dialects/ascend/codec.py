"""The dialect of `vllm serve --quantization ascend`: vLLM-Ascend reading ModelSlim's layout.

Rules are those of vllm-ascend at 182b75e: `quantization/modelslim_config.py` (description file, labels, fused
linears), `quantization/methods/w8a8_static.py`, `w8a8_dynamic.py`, `w8a16.py` (tensors of a linear),
`quantization/methods/kv_c8.py` and `attention/attention_v1.py` (KV cache).

Weight files keep this project's names, one a decoder layer, under `model.safetensors.index.json`: vLLM's
`model_loader/default_loader.py` takes every `*.safetensors` of the directory that this index lists, whatever
its name, and ignores an index of another name. `quant_model_weights-*.safetensors` with
`quant_model_weights.safetensors.index.json`, ModelSlim's own names, would work only because vLLM then reads all
files unfiltered, and transformers would find no index.

Tensors of a linear `<p>` with weight (N, K), pd being the dtype that the model is served in:

* `W8A8`: weight int8 (N, K); input_scale pd (1,); input_offset int8 (1,); deq_scale (N,) float32, or for float16
  models int64 holding the float32's bits; quant_bias int32 (N,) with the linear's bias folded in, because the
  engine ignores `<p>.bias` there; weight_scale, weight_offset pd (N, 1), which the engine does not use; bias pd.
* `W8A8_MIX`: the same (`w8a8_pdmix.py`); weight_scale is read, by the linear that prefills with a scale a token.
* `W8A8_DYNAMIC`, `W8A16`: weight int8 (N, K); weight_scale, weight_offset (zero) pd (N, 1); bias pd.
* `W4A8_DYNAMIC`, experts alone: see `int4_experts`.
* After Outlier Suppression Plus, static, also for a source without biases: a norm's bias pd (hidden_size,), which
  the engine has once a name in the description contains `norm.bias` (`ops/layernorm.py`, made for ModelSlim's
  `anti_method: m4`); and the bias of each linear float32, as ModelSlim writes it. vLLM's `load_weights` passes over a
  bias that is no parameter of its model; the engine computes with quant_bias, where it is folded in.
* KV cache `C8`: `self_attn.{k,v}_proj.kv_cache_scale` pd (num_kv_heads * head_dim,), `kv_cache_offset` (zero) likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gs_dist.checkpoint.dialects.ascend.int4_experts import (
    INT4_EXPERTS,
    decode_expert,
    encode_expert,
    expert_misfit,
    expert_tensors,
)
from gs_dist.checkpoint.dialects.base import Codec, KVKind, Policies
from gs_dist.checkpoint.dialects.description import (
    FLOAT,
    STATIC_LABELS,
    Array,
    cast_scale,
    describe_tensors,
    expected_names,
    kv_layers,
    label_of,
    mixed_experts,
    mixed_fusions,
    policy_of,
    refuse,
    require_shared_input,
    row_sums,
    split_linears,
    static_parameters,
)
from gs_dist.checkpoint.engines.vllm_ascend_cache import CACHE_LOADERS
from gs_dist.checkpoint.header import read_json
from gs_dist.checkpoint.published_config import without_quantization
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.errors import CheckpointError, LayerError
from gs_dist.model.decoder import DecoderArchitecture, LayerSpec, Linear
from gs_dist.model.dtypes import FLOATS
from gs_dist.numbers.integer import INT4, INT8
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import Float32, QuantizedKVCache, QuantizedLayer, QuantizedLinear

__all__ = ["CODEC", "DESCRIPTION_FILE", "KV_BLOCK", "LABELS", "AscendCodec"]

DESCRIPTION_FILE = DIALECTS["ascend"].describing_file
LABELS = (FLOAT, "W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", INT4_EXPERTS)
# Schemes registered for "moe" that need no more than a linear has (methods/registry.py).
_EXPERT_LABELS = (FLOAT, "W8A8_DYNAMIC", INT4_EXPERTS)
KV_BLOCK = 32  # last dimension of the NZ view of an int8 KV cache (attention_v1.py, NZ_FMT_LAST_DIM)

_INT32 = np.iinfo(np.int32)


class AscendCodec:
    """Writes and reads vLLM-Ascend's ModelSlim layout; see the module's page for the tensors."""

    name = "ascend"
    number_formats = (INT8, INT4)
    makes_biases = True

    def check_policies(self, policies: Policies, architecture: DecoderArchitecture) -> tuple[str, ...]:
        """Refuses what vLLM-Ascend cannot load, naming what to choose in its place; returns notes.

        Raises:
            RecipeError: dense int4 weights, weights per group or with zero points, a KV cache per token, or
                linears that the engine fuses with different policies.
        """
        reasons: dict[str, list[str]] = {}
        experts = dict(_expert_linears(architecture))
        for name, policy in policies.items():
            for reason in _unloadable(policy, experts.get(name)):
                reasons.setdefault(reason, []).append(name)
        for layer in kv_layers(policies, architecture):
            for reason in _unloadable_kv(architecture):
                reasons.setdefault(reason, []).append(architecture.layer_prefix(layer) + "self_attn")
        for name in experts:
            if label_of(policies.get(name)) not in _EXPERT_LABELS:
                reason = (
                    f"vLLM-Ascend runs int8 and int4 experts with activations per token only, and these are "
                    f"{label_of(policies.get(name))}: set act_quant_dtype: int8 and act_quant_granularity: per_token "
                    "for them under layer_policies"
                )
                reasons.setdefault(reason, []).append(name)
        refuse(self.name, {**reasons, **mixed_fusions(policies, architecture), **mixed_experts(policies, architecture)})
        notes = []
        if architecture.dtype == "float32":
            notes.append(
                "ascend: the model is float32, which the engine computes in bfloat16: serve with --dtype bfloat16"
            )
        static = any(policy is not None and policy.is_static for policy in policies.values())
        if static and architecture.dtype != "float16":
            notes.append(
                "ascend: static W8A8 of a model that is not float16 is for serving in bfloat16; with --dtype float16, "
                "as 310P cards serve everything, its scales load as zeros: set serving_dtype: float16 for those, or "
                "act_quant_granularity: per_token"
            )
        if kv_layers(policies, architecture) and architecture.model_type not in CACHE_LOADERS:
            notes.append(
                "ascend: an int8 KV cache of this model loads in vllm-ascend from 0.25.1rc1 on; up to 0.23 Qwen3 alone "
                "has a loader for its scales"
            )
        return tuple(notes)

    def encode_layer(self, layer: QuantizedLayer, architecture: DecoderArchitecture) -> dict[str, Array]:
        """Tensors of a decoder layer under their full names.

        Raises:
            LayerError: fused linears with different input scales, or a value that its dtype cannot hold.
        """
        require_shared_input(layer)
        prefix = architecture.layer_prefix(layer.layer)
        dtype = FLOATS[architecture.dtype]
        tensors: dict[str, Array] = {prefix + name: np.asarray(array) for name, array in layer.tensors.items()}
        norms, linears = _made_biases(
            {name: linear.policy for name, linear in layer.linears.items()}, "", architecture.layers[layer.layer]
        )
        none = np.zeros(architecture.hidden_size, dtype)
        tensors |= {f"{prefix}{n}.bias": np.asarray(layer.tensors.get(f"{n}.bias", none)).astype(dtype) for n in norms}
        for name, linear in layer.linears.items():
            encoded = _encode_linear(linear, dtype, prefix + name, makes_bias=name in linears)
            tensors.update({f"{prefix}{name}.{leaf}": array for leaf, array in encoded.items()})
        if layer.kv_cache is not None:
            tensors.update(_encode_kv(layer.kv_cache, dtype, prefix))
        return tensors

    def expected_tensors(
        self, layer: int, policies: Policies, kv_cache: KVKind, architecture: DecoderArchitecture
    ) -> dict[str, StoredTensor]:
        """See `Codec.expected_tensors`."""
        prefix, model_dtype = architecture.layer_prefix(layer), architecture.dtype
        shapes = architecture.layer_tensors(layer)
        found: dict[str, StoredTensor] = {}
        norms, made = _made_biases(policies, prefix, architecture.layers[layer])
        for linear in architecture.linears(layer):
            policy = policies.get(prefix + linear.name)
            if policy is None or not policy.quantizes_linear:
                continue
            rows = (linear.out_features,)
            if label_of(policy) == INT4_EXPERTS:
                del shapes[linear.name + ".weight"]
                made_of = expert_tensors(linear.name, linear.out_features, linear.in_features)
                found |= {f"{prefix}{linear.name}.{leaf}": stored for leaf, stored in made_of.items()}
                continue
            leaves = {
                "weight": ("int8", shapes.pop(linear.name + ".weight")),
                "weight_scale": (model_dtype, (*rows, 1)),
                "weight_offset": (model_dtype, (*rows, 1)),
            }
            if shapes.pop(linear.name + ".bias", None) is not None:
                leaves["bias"] = (model_dtype, rows)
            if linear.name in made:
                leaves["bias"] = ("float32", rows)
            if policy.is_static:
                leaves |= {
                    "input_scale": (model_dtype, (1,)),
                    "input_offset": ("int8", (1,)),
                    "deq_scale": ("int64" if model_dtype == "float16" else "float32", rows),
                    "quant_bias": ("int32", rows),
                }
            found |= {
                f"{prefix}{linear.name}.{leaf}": StoredTensor(dtype=dtype, shape=shape)
                for leaf, (dtype, shape) in leaves.items()
            }
        found |= {
            f"{prefix}{norm}.bias": StoredTensor(dtype=model_dtype, shape=(architecture.hidden_size,)) for norm in norms
        }
        if kv_cache is not None:
            stored = StoredTensor(dtype=model_dtype, shape=(architecture.kv_size,))
            found |= {
                f"{prefix}self_attn.{linear}.kv_cache_{leaf}": stored
                for linear in ("k_proj", "v_proj")
                for leaf in ("scale", "offset")
            }
        return found | {prefix + name: StoredTensor(dtype="", shape=shape) for name, shape in shapes.items()}

    def config(
        self,
        source: Mapping[str, Any],
        policies: Policies,
        kv_cache: Mapping[int, KVKind],
        architecture: DecoderArchitecture,
    ) -> dict[str, Any]:
        """config.json without `quantization_config`, which the engine would take for another method's."""
        return without_quantization(source)

    def extra_files(
        self, policies: Policies, kv_cache: Mapping[int, KVKind], architecture: DecoderArchitecture
    ) -> dict[str, dict[str, Any]]:
        """`quant_model_description.json`: file name to content.

        Every tensor is named, and `lm_head.weight` even where it is tied to the embedding and has no tensor: the
        engine looks the head up by direct indexing.
        """
        labels = describe_tensors(policies, expected_names(self, policies, kv_cache, architecture))
        labels.setdefault("lm_head.weight", FLOAT)
        kinds = Counter(label for name, label in labels.items() if name.endswith(".weight") and label != FLOAT)
        description: dict[str, Any] = {
            "version": "1.0.0",
            "model_quant_type": kinds.most_common(1)[0][0] if kinds else FLOAT,
            "group_size": 0,
            "metadata": {},
            "optional": {},
        }
        if "C8" in labels.values():
            description |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
        return {DESCRIPTION_FILE: description | labels}

    def decode_layer(self, reader: CheckpointReader, layer: int) -> QuantizedLayer:
        """Inverse of `encode_layer`; policies are rebuilt from the description file's labels.

        A W8A8 linear's bias is what quant_bias holds, since that is what the engine adds; it is rounded to
        deq_scale steps.

        Raises:
            CheckpointError: a tensor or the description is missing, or a label is not one of this dialect.
        """
        description = read_json(reader.directory / DESCRIPTION_FILE, DESCRIPTION_FILE)
        linears, rest = split_linears(reader.read_layer(layer), description, reader.architecture, layer)
        prefix = reader.architecture.layer_prefix(layer)
        return QuantizedLayer(
            layer=layer,
            linears={name: _decode_linear(leaves, label, prefix + name) for name, (label, leaves) in linears.items()},
            kv_cache=_decode_kv(rest),
            tensors=rest,
        )


CODEC: Codec = AscendCodec()


def _made_biases(policies: Policies, prefix: str, layer: LayerSpec) -> tuple[list[str], list[str]]:
    """Norms and linears of a layer, by name within it, that the source model gives no bias and this dialect does."""
    linears = {linear.name for linear in layer.linears if not linear.bias}
    made = {n.name for n in layer.linears if (p := policies.get(prefix + n.name)) is not None and p.makes_bias}
    names = {linear.name for linear in layer.linears}
    sources = {i.source for i in layer.inputs if i.source not in names and made.issuperset(i.linears)}
    return sorted(norm for norm in sources if norm is not None), sorted(made & linears)


def _expert_linears(architecture: DecoderArchitecture) -> Iterator[tuple[str, Linear]]:
    for layer, kind in enumerate(architecture.layers):
        for linear in (linear for expert in kind.mlp.experts for linear in expert):
            yield architecture.layer_prefix(layer) + linear.name, linear


def _unloadable(policy: QuantPolicy | None, expert: Linear | None) -> list[str]:
    """Reasons against the policy of a linear, of an expert's where one is given."""
    if policy is None or not policy.quantizes_linear:
        return []
    label = label_of(policy)
    if policy.weight_format is INT4 and expert is None:
        return [
            f"vLLM-Ascend loads {label} for mixture-of-experts layers only, not for dense linears: set "
            "weight_quant_dtype: int8 (with act_quant_dtype: null for W8A16), or format: [compressed-tensors] "
            "for an engine that takes int4"
        ]
    reasons = []
    if policy.weight_quant_granularity != "per_channel":
        reasons.append(f"vLLM-Ascend loads {label} per channel only: set weight_quant_granularity: per_channel")
    if not policy.weight_symmetric:
        reasons.append(f"vLLM-Ascend's {label} takes weights without zero points: set weight_symmetric: true")
    if policy.weight_format is INT4 and expert is not None:
        misfit = expert_misfit(expert.name, expert.out_features, expert.in_features)
        reasons += [] if misfit is None else [f"an expert's linear {misfit}"]
    return reasons


def _unloadable_kv(architecture: DecoderArchitecture) -> list[str]:
    if architecture.head_dim % KV_BLOCK == 0:
        return []
    return [
        f"vLLM-Ascend stores an int8 cache in blocks of {KV_BLOCK} channels and head_dim is "
        f"{architecture.head_dim}: set kvcache_quant_dtype: null"
    ]


def _encode_linear(linear: QuantizedLinear, dtype: np.dtype[Any], where: str, *, makes_bias: bool) -> dict[str, Array]:
    """Tensors by last name, with a bias in any case where one is made that the source lacks."""
    if label_of(linear.policy) == INT4_EXPERTS:
        return encode_expert(where, linear.codes, linear.scale.reshape(-1, 1).astype(np.float32))
    scale = cast_scale(linear.scale.reshape(-1, 1), dtype, where + " weight_scale")
    tensors: dict[str, Array] = {
        "weight": np.ascontiguousarray(linear.codes),
        "weight_scale": scale,
        "weight_offset": np.zeros_like(scale),
    }
    if makes_bias:
        tensors["bias"] = np.zeros(len(scale), np.float32) if linear.bias is None else linear.bias
    elif linear.bias is not None:
        tensors["bias"] = linear.bias.astype(dtype)
    if not linear.policy.is_static:
        return tensors
    input_scale, zero_point, deq_scale = static_parameters(linear, dtype, where)
    if dtype == np.float16 and 1 / float(input_scale[0]) > np.finfo(np.float16).max:
        raise LayerError(
            f"{where}: the engine multiplies inputs by 1 / {float(input_scale[0]):.4g}, which is beyond float16; set "
            "serving_dtype: bfloat16, or act_quant_granularity: per_token for this linear"
        )
    bias = 0.0 if linear.bias is None else linear.bias.astype(np.float64) / deq_scale.astype(np.float64)
    quant_bias = np.rint(bias - float(zero_point) * row_sums(linear.codes))
    if quant_bias.min() < _INT32.min or quant_bias.max() > _INT32.max:
        channel = int(np.argmax(np.abs(quant_bias)))
        raise LayerError(
            f"{where}, output channel {channel}: bias / deq_scale is {quant_bias[channel]:.4g}, outside int32, because "
            f"the channel's deq_scale is {deq_scale[channel]:.4g}; set act_quant_granularity: per_token for this linear"
        )
    # The NPU's quantised matmul reads a float16 model's scale as a 64-bit word with the float32 in its low half.
    stored = deq_scale.view(np.int32).astype(np.int64) if dtype == np.float16 else deq_scale
    return tensors | {
        "input_scale": input_scale,
        "input_offset": np.array([zero_point], dtype=np.int8),
        "deq_scale": stored,
        "quant_bias": quant_bias.astype(np.int32),
    }


def _encode_kv(cache: QuantizedKVCache, dtype: np.dtype[Any], prefix: str) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for linear, scale in (("k_proj", cache.key_scale), ("v_proj", cache.value_scale)):
        where = f"{prefix}self_attn.{linear}.kv_cache"
        if scale is None:
            raise LayerError(f"{where}: no static scale; set kvcache_quant_granularity: per_channel")
        tensors[where + "_scale"] = cast_scale(scale, dtype, where + "_scale")
        tensors[where + "_offset"] = np.zeros(scale.shape, dtype=dtype)
    return tensors


def _decode_linear(leaves: Mapping[str, Array], label: str, where: str) -> QuantizedLinear:
    if label not in LABELS:
        raise CheckpointError(f"{DESCRIPTION_FILE}: {where} is {label!r}; this dialect knows {', '.join(LABELS)}")
    try:
        if label == INT4_EXPERTS:
            codes, scale = decode_expert(leaves["weight"], leaves["weight_scale"])
            return QuantizedLinear(policy=policy_of(label), codes=codes, scale=scale)
        codes, scale = leaves["weight"], leaves["weight_scale"].astype(np.float32).reshape(-1, 1)
        bias: Float32 | None = leaves["bias"].astype(np.float32) if "bias" in leaves else None
        if label not in STATIC_LABELS:
            return QuantizedLinear(policy=policy_of(label), codes=codes, scale=scale, bias=bias)
        zero_point = int(leaves["input_offset"][0])
        deq_scale = leaves["deq_scale"]
        if deq_scale.dtype == np.int64:
            deq_scale = deq_scale.astype(np.int32).view(np.float32)
        folded = leaves["quant_bias"].astype(np.int64) + zero_point * row_sums(codes)
        if bias is not None or folded.any():
            bias = (folded * deq_scale.astype(np.float64)).astype(np.float32)
        return QuantizedLinear(
            policy=policy_of(label, act_symmetric=zero_point == 0),
            codes=codes,
            scale=scale,
            bias=bias,
            input_scale=float(leaves["input_scale"].astype(np.float32)[0]),
            input_zero_point=zero_point,
        )
    except KeyError as missing:
        raise CheckpointError(f"{where} is {label} and has no tensor {where}.{missing.args[0]}") from missing


def _decode_kv(own: dict[str, Array]) -> QuantizedKVCache | None:
    scales = [own.pop(f"self_attn.{linear}.kv_cache_scale", None) for linear in ("k_proj", "v_proj")]
    for linear in ("k_proj", "v_proj"):
        own.pop(f"self_attn.{linear}.kv_cache_offset", None)
    key, value = (None if scale is None else scale.astype(np.float32) for scale in scales)
    return None if key is None and value is None else QuantizedKVCache(key_scale=key, value_scale=value)
