"""What engines do with a recipe's policies in compressed-tensors, said before any work.

The same rules, on a directory that is written, are `engines/compressed_tensors.py` and `engines/vllm_ascend.py`, which
name the upstream files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gs_dist.checkpoint.dialects.base import Policies
from gs_dist.checkpoint.dialects.compressed_tensors.packed_floats import packed_float
from gs_dist.checkpoint.dialects.compressed_tensors.schemes import actorder, layer_policies, scheme_key
from gs_dist.checkpoint.dialects.description import fused_members, input_settings
from gs_dist.checkpoint.engines.vllm_kernels import PackedWeights, describe_tensor_parallel
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.numbers.integer import INT4, INT8, Integer
from gs_dist.recipe.policy import QuantPolicy

__all__ = ["engine_notes"]


def engine_notes(policies: Policies, architecture: DecoderArchitecture) -> tuple[str, ...]:
    """Notes on what loads somewhere and not everywhere, each with the setting to change."""
    quantized = {name: policy for name, policy, _ in layer_policies(policies, architecture)}
    notes = [f"{_names(quantized, holds)}: {text}" for holds, text in _RULES if any(map(holds, quantized.values()))]
    if any(policy.kvcache_quant_dtype for policy in policies.values() if policy is not None):
        notes.append(
            "kvcache_quant_dtype: int8 in compressed-tensors is one scale for a layer's keys and one for its values, "
            "which transformers runs; vLLM refuses to load them, vLLM-Ascend ignores them: for an int8 KV cache set "
            "format: [ascend]"
        )
    floats = _names(quantized, lambda policy: packed_float(policy) is not None)
    if floats and architecture.dtype != "bfloat16":
        notes.append(
            f"{floats}: compressed-tensors turns floats of 4 bits back into bfloat16, so that transformers runs the "
            "model only if it is loaded with dtype bfloat16"
        )
    notes += _fusion_notes(quantized, architecture)
    integers = {name: policy for name, policy in quantized.items() if isinstance(policy.weight_format, Integer)}
    packed = {name: _packed(policy) for name, policy in integers.items() if policy.act_quant_dtype is None}
    limit = describe_tensor_parallel(packed, architecture)
    return (*notes, limit) if limit is not None else tuple(notes)


Holds = Callable[[QuantPolicy], bool]


def _asymmetric(policy: QuantPolicy, *, activations: bool) -> bool:
    return not policy.weight_symmetric and (policy.act_quant_dtype is not None) is activations


_RULES: tuple[tuple[Holds, str], ...] = (
    (
        lambda policy: actorder(policy) == "group",
        "desc_act: true without static_groups stores a group index (actorder: group), which compressed-tensors reads "
        "up to 0.18 and refuses from 0.19 on, so that neither transformers nor vLLM loads the model: set algo_args "
        "static_groups: true, which loads everywhere",
    ),
    (
        lambda policy: _asymmetric(policy, activations=False),
        "weight_symmetric: false stores packed zero points: vLLM and transformers up to 5.19 load them, transformers "
        "5.24 with compressed-tensors 0.20 only with quantization_config=CompressedTensorsConfig(dequantize=True)",
    ),
    (
        lambda policy: _asymmetric(policy, activations=False) and policy.weight_format is INT8,
        "vLLM has a kernel for int8 weights with zero points on Hopper cards only: set weight_symmetric: true",
    ),
    (
        lambda policy: _asymmetric(policy, activations=True) and policy.weight_format is INT8,
        "weight_symmetric: false with act_quant_dtype: int8 loads in transformers, while vLLM and vLLM-Ascend take "
        "symmetric weights there: set weight_symmetric: true",
    ),
    (
        lambda policy: policy.weight_format is INT4 and policy.act_quant_dtype is not None,
        "qint4x2 weights with act_quant_dtype: int8 load in transformers, while vLLM runs them on CPUs and Intel XPUs "
        "alone: set act_quant_dtype: null (W4A16) or weight_quant_dtype: int8 (W8A8) for other cards",
    ),
    (
        lambda policy: policy.is_static and policy.act_symmetric and policy.weight_symmetric,
        "static activations load in transformers and vLLM, while vLLM-Ascend quantises them with an offset that "
        "nothing sets: for Ascend cards set format: [ascend], or act_quant_granularity: per_token",
    ),
)


def _names(quantized: Mapping[str, QuantPolicy], holds: Holds) -> str:
    """The first linear that a rule holds for, and how many more there are; empty for none."""
    names = [name for name, policy in quantized.items() if holds(policy)]
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" if names else ""


def _packed(policy: QuantPolicy) -> PackedWeights:
    return PackedWeights(
        num_bits=policy.weight_format.bits, group_size=policy.group_size, symmetric=policy.weight_symmetric
    )


def _fusion_notes(quantized: Mapping[str, QuantPolicy], architecture: DecoderArchitecture) -> list[str]:
    """On the first linears that an engine fuses and the recipe treats differently."""
    for _, members in fused_members(architecture):
        found = [quantized.get(name) for name in members]
        others = ", ".join(name.rpartition(".")[2] for name in members[1:])
        if len(set(map(scheme_key, found))) > 1:
            return [
                f"{members[0]} and its neighbours {others} have different schemes: transformers loads them, vLLM fuses "
                "them and needs one: let one entry of layer_policies cover all of them"
            ]
        if found[0] is not None and found[0].is_static and len(set(map(input_settings, found))) > 1:
            return [
                f"{members[0]} and its neighbours {others} get input scales of their own: transformers runs them, vLLM "
                "fuses them into one linear with one input scale: give them the same act_range, outliers_suppression "
                "and algo_args"
            ]
    return []
