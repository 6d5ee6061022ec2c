"""compressed-tensors: the dialect that transformers and vLLM load.

Formats: `int-quantized` where activations are quantised too, `pack-quantized` for weights alone,
`mixed-precision` where a model has both (https://github.com/vllm-project/compressed-tensors). Only keys
that the library of October 2025 and today's both accept are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.dialects.base import Codec, KVKind, Policies
from gs_dist.checkpoint.dialects.compressed_tensors.notes import engine_notes
from gs_dist.checkpoint.dialects.compressed_tensors.packed_floats import PACKED_FLOATS, packed_float
from gs_dist.checkpoint.dialects.compressed_tensors.packing import (
    pack_int32,
    packed_size,
    unpack_int32,
)
from gs_dist.checkpoint.dialects.compressed_tensors.schemes import (
    actorder,
    config_groups,
    layer_policies,
    matching_group,
    policy_of,
    quantization_args,
)
from gs_dist.checkpoint.dialects.description import MIX_REASON, kv_layers, mixed_experts, refuse, shift_notes
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.errors import CheckpointError, UserError
from gs_dist.model.decoder import DecoderArchitecture, Linear
from gs_dist.model.dtypes import FLOATS
from gs_dist.numbers.groups import num_groups
from gs_dist.numbers.integer import INT4, INT8
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedKVCache, QuantizedLayer, QuantizedLinear

__all__ = ["CODEC", "CompressedTensorsCodec"]

Array = npt.NDArray[Any]

_KV_PARTS = ("k_scale", "v_scale")


class CompressedTensorsCodec:
    """Writes and reads back compressed-tensors checkpoints."""

    name = "compressed-tensors"
    number_formats = (INT8, INT4, *(packed.form for packed in PACKED_FLOATS.values()))
    makes_biases = False

    def check_policies(self, policies: Policies, architecture: DecoderArchitecture) -> tuple[str, ...]:
        """See `Codec.check_policies`."""
        for linear_name, policy, linear in layer_policies(policies, architecture):
            try:
                num_groups(linear.in_features, policy.group_size, policy.weight_format.group_sizes)
            except UserError as error:
                raise UserError(f"{linear_name}: {error}, for {linear.name} in layer_policies") from None
            if policy.column_order == "group" and packed_float(policy) is not None:
                raise UserError(
                    f"{linear_name}: {policy.weight_format.name} in compressed-tensors has no group index: set "
                    "algo_args static_groups: true, or desc_act: false"
                )
        mixing = [name for name, policy in policies.items() if policy is not None and policy.mixes_phases]
        refuse(self.name, mixed_experts(policies, architecture) | ({MIX_REASON: mixing} if mixing else {}))
        _check_kv(policies, architecture)
        return (*shift_notes(self.name, policies), *engine_notes(policies, architecture))

    def encode_layer(self, layer: QuantizedLayer, architecture: DecoderArchitecture) -> dict[str, Array]:
        """See `Codec.encode_layer`. Scales are stored in the model's dtype.

        A KV cache scaled per channel is stored with one scale for the keys and one for the values, the
        largest: the dialect knows no finer one that engines load.

        Raises:
            ValueError: a solver's result that no dialect could hold (a scale not rounded to the model's
                dtype, a group index the policy does not call for, a bias or a rescaling of the input that
                the architecture has no place for).
        """
        prefix = architecture.layer_prefix(layer.layer)
        scale_dtype = FLOATS[architecture.dtype]
        tensors: dict[str, Array] = {prefix + name: array for name, array in layer.tensors.items()}
        biased = {linear.name for linear in architecture.linears(layer.layer) if linear.bias}
        for name, linear in layer.linears.items():
            if linear.bias is not None and name not in biased:
                raise ValueError(f"{prefix}{name}: has a bias, and {architecture.model_type} has no place for it")
            if linear.smooth_scale is not None or linear.smooth_shift is not None:
                raise ValueError(f"{prefix}{name}: reads a rescaled input, and nothing in the model rescales it")
            parts = _encode_linear(prefix + name, linear, scale_dtype, _largest_scale(name, layer, architecture))
            tensors.update({f"{prefix}{name}.{part}": array for part, array in parts.items()})
        if layer.kv_cache is not None:
            for part, scale in zip(_KV_PARTS, (layer.kv_cache.key_scale, layer.kv_cache.value_scale), strict=True):
                if scale is None:
                    raise ValueError(f"{prefix}self_attn: compressed-tensors holds no KV cache scaled per token")
                tensors[f"{prefix}self_attn.{part}"] = np.array([scale.max()]).astype(scale_dtype)
        return tensors

    def expected_tensors(
        self, layer: int, policies: Policies, kv_cache: KVKind, architecture: DecoderArchitecture
    ) -> dict[str, StoredTensor]:
        """See `Codec.expected_tensors`."""
        prefix = architecture.layer_prefix(layer)
        floats = architecture.layer_tensors(layer)
        expected = {prefix + name: StoredTensor(dtype="", shape=shape) for name, shape in floats.items()}
        for linear in architecture.linears(layer):
            policy = policies.get(prefix + linear.name)
            if policy is None or not policy.quantizes_linear:
                continue
            del expected[f"{prefix}{linear.name}.weight"]
            if linear.bias:
                shape = (linear.out_features,)
                expected[f"{prefix}{linear.name}.bias"] = StoredTensor(dtype=architecture.dtype, shape=shape)
            parts = _linear_tensors(linear, policy, architecture.dtype)
            expected.update({f"{prefix}{linear.name}.{part}": stored for part, stored in parts.items()})
        if kv_cache is not None:
            scale = StoredTensor(dtype=architecture.dtype, shape=(1,))
            expected.update({f"{prefix}self_attn.k_scale": scale, f"{prefix}self_attn.v_scale": scale})
        return expected

    def config(
        self,
        source: Mapping[str, Any],
        policies: Policies,
        kv_cache: Mapping[int, KVKind],
        architecture: DecoderArchitecture,
    ) -> dict[str, Any]:
        """See `Codec.config`."""
        groups, ignore = config_groups(policies, architecture)
        formats = {group["format"] for group in groups.values()}
        quantization = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore,
            "kv_cache_scheme": quantization_args(8, strategy="tensor") if any(kv_cache.values()) else None,
            "global_compression_ratio": None,
        }
        return {**source, "quantization_config": quantization}

    def extra_files(
        self, policies: Policies, kv_cache: Mapping[int, KVKind], architecture: DecoderArchitecture
    ) -> dict[str, dict[str, Any]]:
        """None: config.json says everything."""
        return {}

    def decode_layer(self, reader: CheckpointReader, layer: int) -> QuantizedLayer:
        """See `Codec.decode_layer`."""
        architecture = reader.architecture
        config = reader.quantization_config
        if not isinstance(config, Mapping) or config.get("quant_method") != self.name:
            raise CheckpointError(f"config.json: quantization_config is {config!r:.100}, not one of {self.name}")
        prefix = architecture.layer_prefix(layer)
        rest = dict(reader.read_layer(layer))
        linears = {}
        for linear in architecture.linears(layer):
            group = matching_group(config, prefix + linear.name)
            if group is not None:
                parts = {
                    name.removeprefix(f"{linear.name}."): rest.pop(name)
                    for name in list(rest)
                    if name.startswith(f"{linear.name}.")
                }
                linears[linear.name] = _decode_linear(prefix + linear.name, linear, group, parts)
        kv_cache = None
        if config.get("kv_cache_scheme") is not None:
            scales = [_one(rest.pop(f"self_attn.{part}", None), f"{prefix}self_attn.{part}") for part in _KV_PARTS]
            key, value = (np.full(architecture.kv_size, scale, dtype=np.float32) for scale in scales)
            kv_cache = QuantizedKVCache(key_scale=key, value_scale=value)
        _check_float_rest(rest, linears, architecture.layer_tensors(layer), prefix)
        return QuantizedLayer(layer=layer, linears=linears, tensors=rest, kv_cache=kv_cache)


CODEC: Codec = CompressedTensorsCodec()


def _check_kv(policies: Policies, architecture: DecoderArchitecture) -> None:
    kv_layers(policies, architecture)  # refuses a cache with a scale a token
    kinds: dict[str | None, str] = {}
    for layer in range(architecture.num_layers):
        for projection in ("k_proj", "v_proj"):
            name = f"{architecture.layer_prefix(layer)}self_attn.{projection}"
            policy = policies.get(name)
            kinds.setdefault(policy.kvcache_quant_dtype if policy else None, name)
    if len(kinds) > 1:
        one, other = kinds.values()
        raise UserError(
            f"{one} and {other} differ in kvcache_quant_dtype; compressed-tensors quantises the KV cache of all layers "
            "or of none: give k_proj and v_proj of every layer the same"
        )


def _linear_tensors(linear: Linear, policy: QuantPolicy, dtype: str) -> dict[str, StoredTensor]:
    rows, columns, bits = linear.out_features, linear.in_features, policy.weight_format.bits
    groups = columns // policy.group_size if policy.group_size else 1
    packed = packed_float(policy)
    if packed is not None:
        return packed.tensors(rows, columns)
    parts = {"weight_scale": StoredTensor(dtype=dtype, shape=(rows, groups))}
    if policy.act_quant_dtype is None:
        parts["weight_packed"] = StoredTensor(dtype="int32", shape=(rows, packed_size(columns, bits)))
        parts["weight_shape"] = StoredTensor(dtype="int64", shape=(2,))
        zero_point = StoredTensor(dtype="int32", shape=(packed_size(rows, bits), groups))
    else:
        parts["weight"] = StoredTensor(dtype="int8", shape=(rows, columns))
        zero_point = StoredTensor(dtype="int8", shape=(rows, groups))
    if not policy.weight_symmetric:
        parts["weight_zero_point"] = zero_point
    if actorder(policy) == "group":
        parts["weight_g_idx"] = StoredTensor(dtype="int32", shape=(columns,))
    if policy.is_static:
        parts["input_scale"] = StoredTensor(dtype=dtype, shape=(1,))
        if not policy.act_symmetric:
            parts["input_zero_point"] = StoredTensor(dtype="int8", shape=(1,))
    return parts


def _largest_scale(name: str, layer: QuantizedLayer, architecture: DecoderArchitecture) -> float:
    """Of a linear and of those that read the same input in the same number format, which engines fuse with it."""
    form = layer.linears[name].policy.weight_format
    readers = next(found.linears for found in architecture.inputs(layer.layer) if name in found.linears)
    solved = [layer.linears[reader] for reader in readers if reader in layer.linears]
    return max(float(linear.scale.max()) for linear in solved if linear.policy.weight_format is form)


def _encode_linear(
    name: str, linear: QuantizedLinear, scale_dtype: np.dtype[Any], largest_scale: float
) -> dict[str, Array]:
    policy, codes = linear.policy, linear.codes
    packed_form = packed_float(policy)
    if packed_form is not None:
        if linear.group_index is not None:
            raise ValueError(f"{name}: has a group index, which {policy.weight_format.title} has no place for")
        bias = {} if linear.bias is None else {"bias": linear.bias.astype(scale_dtype)}
        return {**packed_form.encode(linear, largest_scale), **bias}
    scale = linear.scale.astype(scale_dtype)
    if not np.array_equal(scale.astype(np.float32), linear.scale):
        raise ValueError(f"{name}: its scales are not rounded to {scale_dtype.name}, so codes and scales disagree")
    parts: dict[str, Array] = {"weight_scale": scale}
    zero_point = linear.zero_point if linear.zero_point is not None else np.zeros(linear.scale.shape, dtype=np.int8)
    if policy.act_quant_dtype is None:
        parts["weight_packed"] = pack_int32(codes, policy.weight_format.bits)
        parts["weight_shape"] = np.array(codes.shape, dtype=np.int64)
        zero_point_stored: Array = np.ascontiguousarray(
            pack_int32(np.ascontiguousarray(zero_point.T), policy.weight_format.bits).T
        )
    else:
        parts["weight"] = codes
        zero_point_stored = zero_point
    if not policy.weight_symmetric:
        parts["weight_zero_point"] = zero_point_stored
    elif zero_point.any():
        raise ValueError(f"{name}: has zero points although its policy is symmetric")
    if actorder(policy) == "group":
        natural = np.arange(codes.shape[1], dtype=np.int32) // policy.group_size
        parts["weight_g_idx"] = natural if linear.group_index is None else linear.group_index
    elif linear.group_index is not None:
        raise ValueError(f"{name}: has a group index, and its policy does not order columns by group")
    if policy.is_static:
        if linear.input_scale is None:
            raise ValueError(f"{name}: static activations, and no input scale")
        parts["input_scale"] = np.array([linear.input_scale]).astype(scale_dtype)
        if not policy.act_symmetric:
            parts["input_zero_point"] = np.array([linear.input_zero_point or 0], dtype=np.int8)
    if linear.bias is not None:
        parts["bias"] = linear.bias.astype(scale_dtype)
    return parts


def _decode_linear(name: str, linear: Linear, group: Mapping[str, Any], parts: dict[str, Array]) -> QuantizedLinear:
    policy = policy_of(name, group)
    for part, stored in _linear_tensors(linear, policy, "").items():
        array = parts.get(part)
        found = "nothing" if array is None else f"{array.dtype.name} {array.shape}"
        if array is None or array.shape != stored.shape or (stored.dtype and array.dtype.name != stored.dtype):
            raise CheckpointError(
                f"{name}.{part}: {stored.dtype or 'a scale'} {stored.shape} is called for, found {found}"
            )
    packed_form = packed_float(policy)
    if packed_form is not None:
        return packed_form.decode(parts)
    bits, rows, columns = policy.weight_format.bits, linear.out_features, linear.in_features
    packed = policy.act_quant_dtype is None
    zero_point = parts.get("weight_zero_point")
    if zero_point is not None and packed:
        zero_point = np.ascontiguousarray(unpack_int32(zero_point.T, bits, rows).T)
    input_scale, input_zero_point = parts.get("input_scale"), parts.get("input_zero_point")
    bias = parts.get("bias")
    return QuantizedLinear(
        policy=policy,
        codes=unpack_int32(parts["weight_packed"], bits, columns) if packed else parts["weight"],
        scale=parts["weight_scale"].astype(np.float32),
        zero_point=zero_point,
        group_index=parts.get("weight_g_idx"),
        bias=None if bias is None else bias.astype(np.float32),
        input_scale=None if input_scale is None else float(input_scale[0]),
        input_zero_point=None if input_zero_point is None else int(input_zero_point[0]),
    )


def _one(array: Array | None, name: str) -> float:
    if array is None or array.size != 1:
        raise CheckpointError(f"{name}: one scale is called for, found {'nothing' if array is None else array.shape}")
    return float(array.reshape(-1)[0])


def _check_float_rest(
    rest: Mapping[str, Array], linears: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> None:
    """What no linear took must be the float tensors that remain of the layer."""
    for name, shape in shapes.items():
        taken = name.rpartition(".")[0] in linears
        if not taken and (name not in rest or rest[name].shape != shape):
            found = rest[name].shape if name in rest else "nothing"
            raise CheckpointError(f"{prefix}{name}: shape {shape} is called for, found {found}")
