"""What the two dialects with a description file share: labels, fused linears, rules on policies.

The ascend and golden-stick dialects name every tensor of a checkpoint in one JSON file, with the kind of
quantisation as a word (`W8A8`, `FLOAT`, ...), and their engines fuse q/k/v and gate/up into one linear each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.dialects.base import Codec, KVKind, Policies
from gs_dist.errors import LayerError, RecipeError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.dtypes import BFLOAT16
from gs_dist.recipe.policy import AlgoArgs, PrecisionRecovery, QuantPolicy
from gs_dist.results.quantized import Float32, Int8, QuantizedLayer, QuantizedLinear

__all__ = [
    "FLOAT",
    "MIX_REASON",
    "STATIC_LABELS",
    "FUSED_LINEARS",
    "Array",
    "cast_scale",
    "describe_tensors",
    "expected_names",
    "fused_members",
    "input_settings",
    "kv_layers",
    "label_of",
    "mixed_experts",
    "mixed_fusions",
    "policy_of",
    "refuse",
    "require_shared_input",
    "row_sums",
    "shift_notes",
    "split_linears",
    "static_parameters",
]

Array = npt.NDArray[Any]

MIX_REASON = (
    "act_quant_granularity pd_mix is W8A8_MIX, which vLLM-Ascend alone serves: set format: [ascend], or per_tensor or "
    "per_token"
)

FLOAT = "FLOAT"
FUSED_LINEARS: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.fused_qkv_a_proj": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}

STATIC_LABELS = ("W8A8", "W8A8_MIX")
"""Those of linears with a static scale of their inputs."""
_POLICIES: Mapping[str, Mapping[str, Any]] = {
    "W8A8": {"act_quant_dtype": "int8"},
    "W8A8_DYNAMIC": {"act_quant_dtype": "int8", "act_quant_granularity": "per_token"},
    "W8A8_MIX": {"act_quant_dtype": "int8", "act_quant_granularity": "pd_mix"},
    "W8A16": {},
    "W4A16": {"weight_quant_dtype": "qint4x2"},
    "W4A8_DYNAMIC": {
        "weight_quant_dtype": "qint4x2",
        "act_quant_dtype": "int8",
        "act_quant_granularity": "per_token",
        "precision_recovery": PrecisionRecovery.GPTQ,
        "algo_args": AlgoArgs(desc_act=True, static_groups=True),
    },
}


def label_of(policy: QuantPolicy | None) -> str:
    """The word that description files use: FLOAT, W8A8 (static), W8A8_DYNAMIC (per token), W8A8_MIX, W8A16 ..."""
    if policy is None or not policy.quantizes_linear:
        return FLOAT
    weights = policy.weight_format.label
    if policy.act_quant_dtype is None:
        return f"{weights}A16"
    return f"{weights}A8" + ("_MIX" if policy.mixes_phases else "" if policy.is_static else "_DYNAMIC")


def policy_of(label: str, group_size: int = 0, *, act_symmetric: bool = True) -> QuantPolicy:
    """A policy that `label_of` turns into `label`: as much of the recipe as a checkpoint tells."""
    fields: dict[str, Any] = {**_POLICIES[label], "act_symmetric": act_symmetric}
    if group_size:
        fields |= {"weight_quant_granularity": "per_group", "group_size": group_size}
    return QuantPolicy(**fields)


def describe_tensors(policies: Policies, tensors: Iterable[str]) -> dict[str, str]:
    """Tensor name to label, in sorted order.

    A linear is FLOAT if its scale is not among the tensors, whatever its policy says. KV cache scales are C8.
    """
    names = sorted(tensors)
    present = set(names)
    labels = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf.startswith("kv_cache_"):
            labels[name] = "C8"
        elif f"{module}.weight_scale" in present:
            labels[name] = label_of(policies.get(module))
        else:
            labels[name] = FLOAT
    return labels


def expected_names(
    dialect: Codec, policies: Policies, kv_cache: Mapping[int, KVKind], architecture: DecoderArchitecture
) -> list[str]:
    """Full names of all tensors that a checkpoint of the dialect holds."""
    names = [*architecture.outer_tensors(), *(name for name, _ in architecture.carried)]
    for layer in range(architecture.num_layers):
        names += dialect.expected_tensors(layer, policies, kv_cache.get(layer), architecture)
    return names


def split_linears(
    tensors: Mapping[str, Array], description: Mapping[str, Any], architecture: DecoderArchitecture, layer: int
) -> tuple[dict[str, tuple[str, dict[str, Array]]], dict[str, Array]]:
    """A layer's tensors (names within the layer) sorted into quantised linears and the rest.

    Returns:
        Linear to its label and its tensors by last name; and every other tensor, KV cache scales included.
    """
    prefix = architecture.layer_prefix(layer)
    rest = dict(tensors)
    linears = {}
    for linear in architecture.linears(layer):
        label = description.get(f"{prefix}{linear.name}.weight", FLOAT)
        if label == FLOAT:
            continue
        own = [n for n in rest if n.rpartition(".")[0] == linear.name and ".kv_cache_" not in n]
        linears[linear.name] = (str(label), {name.rpartition(".")[2]: rest.pop(name) for name in own})
    return linears, rest


def fused_members(architecture: DecoderArchitecture) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Full name of every fused linear and of the linears it is made of."""
    present = {kind: {linear.name for linear in kind.linears} for kind in architecture.kinds}
    for layer, kind in enumerate(architecture.layers):
        prefix = architecture.layer_prefix(layer)
        for fused, members in FUSED_LINEARS.items():
            if present[kind].issuperset(members):
                yield prefix + fused, tuple(prefix + member for member in members)


def kv_layers(policies: Policies, architecture: DecoderArchitecture) -> dict[int, QuantPolicy]:
    """Layers whose KV cache is quantised, with the policy that says so.

    Raises:
        RecipeError: a cache with a scale a token, which no dialect has a place for.
    """
    found = {}
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        for linear in ("self_attn.k_proj", "self_attn.v_proj"):
            policy = policies.get(prefix + linear)
            if policy is None or policy.kvcache_quant_dtype is None:
                continue
            if policy.kvcache_quant_granularity == "per_token":
                raise RecipeError(
                    f"{prefix}self_attn: kvcache_quant_granularity is per_token, which leaves nothing to publish and "
                    "exists in gs_dist.ptq alone; for a job set kvcache_quant_granularity: per_channel, or "
                    "kvcache_quant_dtype: null"
                )
            found[layer] = policy
    return found


def refuse(dialect: str, reasons: Mapping[str, list[str]]) -> None:
    """Raises RecipeError if anything was found: reason to the linears it holds for."""
    lines = []
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{more}: {reason}")
    if lines:
        raise RecipeError(f"format {dialect} cannot hold what the recipe asks for: " + "; ".join(lines))


def mixed_fusions(policies: Policies, architecture: DecoderArchitecture) -> dict[str, list[str]]:
    """Reasons against linears that an engine fuses into one but the recipe treats differently.

    One label for all of them, and with static activations also one input scale: the fused linear has a single
    one, and loaders keep the last they read.
    """
    reasons: dict[str, list[str]] = {}
    for fused, members in fused_members(architecture):
        found = [policies.get(member) for member in members]
        labels = [label_of(policy) for policy in found]
        short = ", ".join(member.rpartition(".")[2] for member in members)
        if len(set(labels)) > 1:
            reason = (
                f"the engine fuses {short} into one linear, and they are {', '.join(labels)}: "
                "let one entry of layer_policies (or of opname_blacklist) cover all of them"
            )
        elif labels[0] in STATIC_LABELS and len({input_settings(policy) for policy in found}) > 1:
            reason = (
                f"the engine fuses {short} into one linear with one input scale: give them the same act_symmetric, "
                "act_range, outliers_suppression and algo_args"
            )
        else:
            continue
        reasons.setdefault(reason, []).append(fused)
    return reasons


def mixed_experts(policies: Policies, architecture: DecoderArchitecture) -> dict[str, list[str]]:
    """Reasons against experts of one layer that the recipe treats differently: engines run all of them as one."""
    reasons: dict[str, list[str]] = {}
    for layer, kind in enumerate(architecture.layers):
        prefix = architecture.layer_prefix(layer)
        found = {label_of(policies.get(prefix + linear.name)) for expert in kind.mlp.experts for linear in expert}
        if len(found) > 1:
            reason = (
                f"engines run all experts of a layer as one, and they are {', '.join(sorted(found))}: let one entry of "
                "layer_policies (or of opname_blacklist) cover gates, ups and downs of all of them"
            )
            reasons.setdefault(reason, []).append(prefix + kind.mlp.experts[0][0].name)
    return reasons


def input_settings(policy: QuantPolicy | None) -> tuple[object, ...]:
    """What decides a linear's static input scale: linears of one input that agree on it have the same one."""
    if policy is None:
        return ()
    return (policy.act_symmetric, policy.act_range, policy.outliers_suppression, policy.exponents)


def require_shared_input(layer: QuantizedLayer) -> None:
    """Raises LayerError unless fused linears with static activations share one input scale and offset."""
    for fused, members in FUSED_LINEARS.items():
        linears = [layer.linears[member] for member in members if member in layer.linears]
        found = {(linear.input_scale, linear.input_zero_point) for linear in linears}
        if len(found) > 1 and any(linear.policy.is_static for linear in linears):
            raise LayerError(
                f"layer {layer.layer}, {', '.join(members)}: static input scales and zero points differ "
                f"({sorted(map(str, found))}), and the engine fuses these linears into {fused} with one of each; "
                "set act_quant_granularity: per_token for them, or give them one policy"
            )


def cast_scale(values: Float32, dtype: np.dtype[Any], where: str) -> Array:
    """Scales in the model's dtype.

    Raises:
        LayerError: a scale that is not finite and positive in that dtype.
    """
    cast = np.asarray(values).astype(dtype)
    widened = cast.astype(np.float32)
    if not (np.isfinite(widened).all() and (widened > 0).all()):
        raise LayerError(
            f"{where}: scales from {np.min(values):g} to {np.max(values):g} are not finite and positive as "
            f"{dtype.name}; set outliers_suppression: none for this linear, or leave it float (layer_policies: null)"
        )
    return cast


def shift_notes(dialect: str, policies: Policies) -> tuple[str, ...]:
    """A note where Outlier Suppression Plus is asked for and the dialect has no room for the biases that it makes."""
    if not any(policy is not None and policy.makes_bias for policy in policies.values()):
        return ()
    return (
        f"{dialect} has no place for the biases of norms by which outlier-suppression+ shifts inputs: it rescales them "
        "only, in every format of this run; format: [ascend] alone has",
    )


def row_sums(codes: Int8) -> npt.NDArray[np.int64]:
    """Sum of each output channel's codes, (out,) int64."""
    return np.asarray(codes.sum(axis=1, dtype=np.int64))


def static_parameters(linear: QuantizedLinear, dtype: np.dtype[Any], where: str) -> tuple[Array, int, Float32]:
    """Input scale as stored (1,), input zero point, and deq_scale (out,) float32 = input scale x weight scale.

    The input scale is rounded to the dtype that the engine computes in, because it quantises with the rounded
    one: the model's, and bfloat16 for a float32 model, which engines load as bfloat16.

    Raises:
        LayerError: a zero point outside int8, or a scale that the dtype cannot hold.
    """
    assert linear.input_scale is not None, where  # the solver sets it for every static policy
    zero_point = int(linear.input_zero_point or 0)
    if not -128 <= zero_point <= 127:
        raise LayerError(f"{where}: the input's zero point is {zero_point}, outside int8; set act_symmetric: true")
    single = np.array([linear.input_scale], dtype=np.float32)
    computed_in = BFLOAT16 if dtype == np.float32 else dtype
    scale = cast_scale(single, computed_in, where + " input_scale").astype(dtype)
    deq_scale = scale.astype(np.float32) * linear.scale[:, 0].astype(np.float32)
    if not (np.isfinite(deq_scale).all() and (deq_scale > 0).all()):
        raise LayerError(f"{where}: input scale times weight scale leaves float32; leave this linear float")
    return scale, zero_point, np.asarray(deq_scale, dtype=np.float32)
