"""Schemes of compressed-tensors: what config.json says of a policy, and which linears it says it of."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

from pydantic import ValidationError

from gs_dist.checkpoint.dialects.base import Policies
from gs_dist.checkpoint.dialects.compressed_tensors.packed_floats import PACKED_FLOATS, packed_float
from gs_dist.checkpoint.name_patterns import matches
from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture, Linear
from gs_dist.recipe.policy import AlgoArgs, PrecisionRecovery, QuantPolicy

__all__ = [
    "actorder",
    "config_groups",
    "layer_policies",
    "matching_group",
    "policy_of",
    "quantization_args",
    "scheme_key",
]

_NUMBER = re.compile(r"\\\.\d+\\\.")  # of an expert, in an escaped name
_LAYER = re.compile(r"^model\.layers\.\d+\.")
_INT, _PACK = "int-quantized", "pack-quantized"


def layer_policies(policies: Policies, architecture: DecoderArchitecture) -> Iterable[tuple[str, QuantPolicy, Linear]]:
    """Full name, policy and linear of every linear of the decoder layers that is quantised."""
    for layer in range(architecture.num_layers):
        for linear in architecture.linears(layer):
            name = architecture.layer_prefix(layer) + linear.name
            policy = policies.get(name)
            if policy is not None and policy.quantizes_linear:
                yield name, policy, linear


def actorder(policy: QuantPolicy) -> str | None:
    """`weight` (columns taken in another order, groups as stored), `group` (an index is stored), or None."""
    return policy.column_order


def quantization_args(bits: int, *, strategy: str, symmetric: bool = True, **others: Any) -> dict[str, Any]:
    """An entry of compressed_tensors' `QuantizationArgs`, without keys that have their defaults."""
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    return {**args, **others}


def _scheme(policy: QuantPolicy) -> dict[str, Any]:
    """The group's entry without its targets (compressed_tensors `QuantizationScheme`)."""
    packed = packed_float(policy)
    if packed is not None:
        return packed.scheme()
    weights = quantization_args(
        policy.weight_format.bits,
        strategy="group" if policy.group_size else "channel",
        symmetric=policy.weight_symmetric,
    )
    if policy.group_size:
        weights["group_size"] = policy.group_size
    if actorder(policy) is not None:
        weights["actorder"] = actorder(policy)
    activations = None
    if policy.act_quant_dtype is not None:
        activations = quantization_args(
            8,
            strategy="tensor" if policy.is_static else "token",
            # Scales per token are symmetric whatever the policy says: solvers and evaluation know no others.
            symmetric=policy.act_symmetric or not policy.is_static,
            dynamic=not policy.is_static,
        )
    return {
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": _PACK if activations is None else _INT,
    }


def scheme_key(policy: QuantPolicy | None) -> str:
    """Equal for policies that config.json describes alike; empty for a linear that stays in float."""
    return "" if policy is None else json.dumps(_scheme(policy), sort_keys=True)


def config_groups(policies: Policies, architecture: DecoderArchitecture) -> tuple[dict[str, Any], list[str]]:
    """`config_groups` and `ignore`: one group a scheme, in order of first use."""
    members: dict[str, list[str]] = {}
    schemes: dict[str, dict[str, Any]] = {}
    left: list[str] = []
    for layer in range(architecture.num_layers):
        for linear in architecture.linears(layer):
            name = architecture.layer_prefix(layer) + linear.name
            policy = policies.get(name)
            if policy is None or not policy.quantizes_linear:
                left.append(name)
                continue
            key = scheme_key(policy)
            schemes[key] = _scheme(policy)
            members.setdefault(key, []).append(name)
    # Routers are listed among the ignored; engines that know experts by the word alone find it.
    staying = {linear.name for kind in architecture.kinds for linear in kind.linears if linear.stays}
    whole = len(members) == 1 and all(_LAYER.sub("", name) in staying for name in left)
    groups = {}
    for number, (key, names) in enumerate(members.items()):
        targets = ["Linear"] if whole else _targets(names, architecture)
        groups[f"group_{number}"] = {"targets": targets, **schemes[key]}
    # A linear that no target matches must be listed here: vLLM refuses to guess.
    return groups, ["lm_head", *_targets(left, architecture), *_carried_modules(architecture)]


def _carried_modules(architecture: DecoderArchitecture) -> list[str]:
    """A pattern for each layer behind the last, none of whose linears was quantised."""
    numbers = {architecture.further_layer(name) for name, _ in architecture.carried} - {None}
    return [rf"re:.*\.layers\.{number}\..*" for number in sorted(filter(None, numbers))]


def _targets(names: list[str], architecture: DecoderArchitecture) -> list[str]:
    """A pattern for a linear that is in `names` in every layer, else its full names; one for all experts' if it can."""
    holders = Counter(linear.name for layer in range(architecture.num_layers) for linear in architecture.linears(layer))
    members: dict[str, list[str]] = {name: [] for name in holders}
    for name in names:
        members[_LAYER.sub("", name)].append(name)
    alike: dict[str, list[str]] = {}
    for linear_name in holders:
        alike.setdefault(_NUMBER.sub(r"\.\\d+\.", re.escape(linear_name)), []).append(linear_name)
    targets = []
    for pattern, linear_names in alike.items():
        if all(len(members[name]) == holders[name] for name in linear_names):
            targets.append(rf"re:.*\.{pattern}$")
            continue
        for linear_name in linear_names:
            mine = members[linear_name]
            whole = len(mine) == holders[linear_name]
            targets.extend([rf"re:.*\.{re.escape(linear_name)}$"] if whole else mine)
    return targets


def matching_group(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The first config group that targets a linear, None where it is ignored or not targeted."""
    groups, ignored = config.get("config_groups"), config.get("ignore") or []
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CheckpointError("config.json: quantization_config.config_groups is not a table of tables")
    if any(_matches(name, target) for target in ignored):
        return None
    for group in groups.values():
        if any(target == "Linear" or _matches(name, target) for target in group.get("targets") or []):
            return group  # type: ignore[no-any-return]  # JSON carries no types
    return None


def _matches(name: str, target: Any) -> bool:
    if not isinstance(target, str):
        raise CheckpointError(f"config.json: quantization_config targets {target!r:.100}, which is not a name")
    try:
        return matches(name, target)
    except CheckpointError as error:
        raise CheckpointError(f"config.json: quantization_config targets {error}") from error


def policy_of(name: str, group: Mapping[str, Any]) -> QuantPolicy:
    """The policy of a linear as far as its config group tells: how it is stored, not how it was found.

    Raises:
        CheckpointError: a scheme that is not served.
    """
    weights, activations = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(activations, (Mapping, NoneType)):
        raise CheckpointError(f"config.json: the scheme of {name} is {dict(group)!r:.200}, which is none")
    if weights.get("type") == "float" and activations is None:
        for packed in PACKED_FLOATS.values():
            if group.get("format") == packed.format:
                return packed.policy
    bits, grouped = weights.get("num_bits"), weights.get("strategy") == "group"
    if bits not in (4, 8) or weights.get("type") != "int" or weights.get("strategy") not in ("group", "channel"):
        raise CheckpointError(f"config.json: the weights of {name} are {dict(weights)}; served are int of 4 or 8 bits")
    fields: dict[str, Any] = {
        "weight_quant_dtype": "int8" if bits == 8 else "qint4x2",
        "weight_quant_granularity": "per_group" if grouped else "per_channel",
        "group_size": weights.get("group_size") if grouped else 0,
        "weight_symmetric": weights.get("symmetric", True),
    }
    if activations is not None:
        fields["act_quant_dtype"] = "int8"
        fields["act_quant_granularity"] = "per_token" if activations.get("dynamic") else "per_tensor"
        fields["act_symmetric"] = activations.get("symmetric", True)
    order = weights.get("actorder")
    if order is not None or (bits == 4 and activations is not None):
        fields["precision_recovery"] = PrecisionRecovery.GPTQ
        fields["algo_args"] = AlgoArgs(desc_act=True, static_groups=order != "group")
    try:
        return QuantPolicy(**fields)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"config.json: the scheme of {name} is not served: {reason}") from error
