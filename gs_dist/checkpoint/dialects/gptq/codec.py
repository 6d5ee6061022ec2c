"""GPTQ checkpoints, `quant_method: gptq`: what AutoGPTQ began, GPTQModel keeps and vLLM serves with Marlin.

Sources: AutoGPTQ `qlinear_cuda.py` (pack, unpack) and vLLM `layers/quantization/auto_gptq.py` (parameters, config).

Tensors of a linear `<p>` with weight (N, K) of b bits, G = K / group_size (1 per channel), f = 32 / b values a word:

* qweight int32 (K / f, N): value k of a column in bits [k % f * b, ...) of word k / f, made unsigned by 2^(b - 1);
* qzeros int32 (G, N / f): likewise along N, each 2^(b - 1) - 1: a reader adds 1, and weights are symmetric;
* scales (G, N) in the model's dtype; g_idx int32 (K,): the group of each input channel; bias (N,).

One scheme holds for all linears; `dynamic` names, by patterns behind `-:`, those that stay in float.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gs_dist.checkpoint.dialects.base import Codec, KVKind, Policies
from gs_dist.checkpoint.dialects.compressed_tensors.packing import pack_int32, packed_size, unpack_int32
from gs_dist.checkpoint.dialects.description import Array, cast_scale, kv_layers, mixed_fusions, refuse, shift_notes
from gs_dist.checkpoint.engines.vllm_kernels import MARLIN_GROUP_SIZES
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.errors import CheckpointError, RecipeError
from gs_dist.model.decoder import DecoderArchitecture, Linear
from gs_dist.model.dtypes import FLOATS
from gs_dist.numbers.integer import INT4, INT8
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.results.quantized import QuantizedLayer, QuantizedLinear

__all__ = ["CODEC", "GPTQCodec"]

_LEAVES = ("qweight", "qzeros", "scales", "g_idx")


class GPTQCodec:
    """Writes and reads back GPTQ checkpoints; see the module's page for the tensors."""

    name = "gptq"
    number_formats = (INT4, INT8)
    makes_biases = False

    def check_policies(self, policies: Policies, architecture: DecoderArchitecture) -> tuple[str, ...]:
        """Refuses what the layout has no place for, naming what to choose in its place; returns notes.

        Raises:
            RecipeError: experts, quantised activations or cache, weights with zero points, sizes that fill no words,
                or linears that differ in more than being quantised.
        """
        if any(kind.mlp.experts for kind in architecture.kinds):
            raise RecipeError("format gptq is written for dense models here: write format: [compressed-tensors]")
        reasons: dict[str, list[str]] = {}
        forms: dict[tuple[str, int], str] = {}
        for name, linear, policy in _quantized(policies, architecture):
            forms.setdefault((policy.weight_format.name, policy.group_size), name)
            for reason in _unwritable(policy, linear):
                reasons.setdefault(reason, []).append(name)
        for layer in kv_layers(policies, architecture):
            reason = "the layout has no scales of a KV cache: set kvcache_quant_dtype: null"
            reasons.setdefault(reason, []).append(architecture.layer_prefix(layer) + "self_attn")
        if len(forms) > 1:
            (one, other), *_ = zip(forms.values(), list(forms.values())[1:], strict=False)
            reason = (
                f"one number format and group size holds for the whole model, and {one} has others: give all linears "
                "the same, or null, or write format: [compressed-tensors]"
            )
            reasons.setdefault(reason, []).append(other)
        refuse(self.name, {**reasons, **mixed_fusions(policies, architecture)})
        return (*shift_notes(self.name, policies), *_engine_notes(policies, architecture))

    def encode_layer(self, layer: QuantizedLayer, architecture: DecoderArchitecture) -> dict[str, Array]:
        """See `Codec.encode_layer`. Scales are stored in the model's dtype."""
        prefix, dtype = architecture.layer_prefix(layer.layer), FLOATS[architecture.dtype]
        tensors: dict[str, Array] = {prefix + name: np.asarray(array) for name, array in layer.tensors.items()}
        for name, linear in layer.linears.items():
            encoded = _encode_linear(linear, dtype, prefix + name)
            tensors.update({f"{prefix}{name}.{leaf}": array for leaf, array in encoded.items()})
        return tensors

    def expected_tensors(
        self, layer: int, policies: Policies, kv_cache: KVKind, architecture: DecoderArchitecture
    ) -> dict[str, StoredTensor]:
        """See `Codec.expected_tensors`."""
        prefix, shapes = architecture.layer_prefix(layer), dict(architecture.layer_tensors(layer))
        found: dict[str, StoredTensor] = {}
        for linear in architecture.linears(layer):
            policy = policies.get(prefix + linear.name)
            if policy is None or not policy.quantizes_linear:
                continue
            del shapes[linear.name + ".weight"]
            if shapes.pop(linear.name + ".bias", None) is not None:
                found[f"{prefix}{linear.name}.bias"] = StoredTensor(
                    dtype=architecture.dtype, shape=(linear.out_features,)
                )
            for leaf, stored in _stored(linear, policy, architecture.dtype).items():
                found[f"{prefix}{linear.name}.{leaf}"] = stored
        return found | {prefix + name: StoredTensor(dtype="", shape=shape) for name, shape in shapes.items()}

    def config(
        self,
        source: Mapping[str, Any],
        policies: Policies,
        kv_cache: Mapping[int, KVKind],
        architecture: DecoderArchitecture,
    ) -> dict[str, Any]:
        """See `Codec.config`."""
        quantized = {name: policy for name, _, policy in _quantized(policies, architecture)}
        one = next(iter(quantized.values()), QuantPolicy())
        floats = [
            architecture.layer_prefix(layer) + linear.name
            for layer in range(architecture.num_layers)
            for linear in architecture.linears(layer)
        ]
        quantization = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": one.weight_format.bits,
            "group_size": one.group_size or -1,
            "sym": True,
            "desc_act": any(policy.column_order == "group" for policy in quantized.values()),
            "lm_head": False,
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in floats if name not in quantized},
        }
        return {**source, "quantization_config": quantization}

    def extra_files(
        self, policies: Policies, kv_cache: Mapping[int, KVKind], architecture: DecoderArchitecture
    ) -> dict[str, dict[str, Any]]:
        """None: config.json says everything."""
        return {}

    def decode_layer(self, reader: CheckpointReader, layer: int) -> QuantizedLayer:
        """See `Codec.decode_layer`."""
        config = reader.quantization_config
        if not isinstance(config, Mapping) or config.get("quant_method") != self.name:
            raise CheckpointError(f"config.json: quantization_config is {config!r:.100}, not one of {self.name}")
        policy = _policy_of(config)
        prefix, rest = reader.architecture.layer_prefix(layer), dict(reader.read_layer(layer))
        linears = {}
        for linear in reader.architecture.linears(layer):
            if f"{linear.name}.qweight" not in rest:
                continue
            leaves = {leaf: rest.pop(f"{linear.name}.{leaf}", None) for leaf in (*_LEAVES, "bias")}
            linears[linear.name] = _decode_linear(leaves, linear, policy, prefix + linear.name)
        return QuantizedLayer(layer=layer, linears=linears, tensors=rest)


CODEC: Codec = GPTQCodec()


def _quantized(policies: Policies, architecture: DecoderArchitecture) -> list[tuple[str, Linear, QuantPolicy]]:
    """Full name, linear and policy of what is quantised."""
    found = []
    for layer in range(architecture.num_layers):
        for linear in architecture.linears(layer):
            name = architecture.layer_prefix(layer) + linear.name
            policy = policies.get(name)
            if policy is not None and policy.quantizes_linear:
                found.append((name, linear, policy))
    return found


def _engine_notes(policies: Policies, architecture: DecoderArchitecture) -> list[str]:
    """On what the layout holds and vLLM refuses; `engines/vllm.py` says the same of a directory."""
    quantized = _quantized(policies, architecture)
    notes = []
    ordered = [name for name, _, policy in quantized if policy.column_order == "group"]
    if ordered:
        notes.append(
            f"{ordered[0]}: desc_act: true without static_groups stores groups in activation order, which vLLM 0.32 "
            "refuses to load: set algo_args static_groups: true"
        )
    odd = [(name, policy.group_size) for name, _, policy in quantized if policy.group_size not in MARLIN_GROUP_SIZES]
    if odd:
        notes.append(
            f"{odd[0][0]}: vLLM loads this layout in groups of 32, 64 or 128, or per channel, and these are of "
            f"{odd[0][1]}: set another group_size"
        )
    return notes


def _unwritable(policy: QuantPolicy, linear: Linear) -> list[str]:
    reasons = []
    if policy.act_quant_dtype is not None:
        reasons.append("the layout holds weights alone: set act_quant_dtype: null, or format: [compressed-tensors]")
    if not policy.weight_symmetric:
        reasons.append(
            "vLLM's Marlin kernels take this layout without zero points: set weight_symmetric: true, or format: "
            "[compressed-tensors]"
        )
    a_word = 32 // policy.weight_format.bits
    for what, size in (("input", linear.in_features), ("output", linear.out_features)):
        if size % a_word:
            reasons.append(
                f"{a_word} {what} channels share a word and this linear has {size}: set it to null in layer_policies"
            )
    return reasons


def _stored(linear: Linear, policy: QuantPolicy, dtype: str) -> dict[str, StoredTensor]:
    rows, columns, bits = linear.out_features, linear.in_features, policy.weight_format.bits
    groups = columns // policy.group_size if policy.group_size else 1
    return {
        "qweight": StoredTensor(dtype="int32", shape=(packed_size(columns, bits), rows)),
        "qzeros": StoredTensor(dtype="int32", shape=(groups, packed_size(rows, bits))),
        "scales": StoredTensor(dtype=dtype, shape=(groups, rows)),
        "g_idx": StoredTensor(dtype="int32", shape=(columns,)),
    }


def _encode_linear(linear: QuantizedLinear, dtype: np.dtype[Any], where: str) -> dict[str, Array]:
    rows, columns = linear.codes.shape
    bits, groups = linear.policy.weight_format.bits, linear.scale.shape[1]
    natural = np.arange(columns, dtype=np.int32) // np.int32(columns // groups)
    tensors: dict[str, Array] = {
        "qweight": np.ascontiguousarray(pack_int32(np.ascontiguousarray(linear.codes), bits).T),
        "qzeros": pack_int32(np.full((groups, rows), -1, dtype=np.int8), bits),  # one below the middle
        "scales": np.ascontiguousarray(cast_scale(linear.scale, dtype, where + " scales").T),
        "g_idx": natural if linear.group_index is None else linear.group_index.astype(np.int32),
    }
    if linear.bias is not None:
        tensors["bias"] = linear.bias.astype(dtype)
    return tensors


def _policy_of(config: Mapping[str, Any]) -> QuantPolicy:
    """As much of the recipe as a checkpoint tells."""
    formats = {form.bits: form.name for form in CODEC.number_formats}
    bits, size = config.get("bits"), config.get("group_size")
    if bits not in formats or not isinstance(size, int) or config.get("sym") is not True:
        raise CheckpointError(f"config.json: quantization_config is {config!r:.200}; read are symmetric 4 or 8 bits")
    fields: dict[str, Any] = {"weight_quant_dtype": formats[bits]}
    if size > 0:
        fields |= {"weight_quant_granularity": "per_group", "group_size": size}
    if config.get("desc_act"):
        fields |= {"precision_recovery": "gptq", "algo_args": AlgoArgs(desc_act=True, static_groups=False)}
    return QuantPolicy(**fields)


def _decode_linear(
    leaves: Mapping[str, Array | None], linear: Linear, policy: QuantPolicy, where: str
) -> QuantizedLinear:
    held: dict[str, Array] = {}
    for leaf, stored in _stored(linear, policy, "").items():
        array = leaves[leaf]
        if array is None or array.shape != stored.shape or (stored.dtype and array.dtype.name != stored.dtype):
            found = "nothing" if array is None else f"{array.dtype.name} {array.shape}"
            raise CheckpointError(
                f"{where}.{leaf}: {stored.dtype or 'a scale'} {stored.shape} is called for, found {found}"
            )
        held[leaf] = array
    bits, columns, bias = policy.weight_format.bits, linear.in_features, leaves["bias"]
    return QuantizedLinear(
        policy=policy,
        codes=unpack_int32(np.ascontiguousarray(held["qweight"].T), bits, columns),
        scale=np.ascontiguousarray(held["scales"].T.astype(np.float32)),
        group_index=held["g_idx"] if policy.column_order == "group" else None,
        bias=None if bias is None else bias.astype(np.float32),
    )
