"""What config.json files of DeepSeek's line say of experts: dense first layers, groups, shared experts."""

from __future__ import annotations

from gs_dist.errors import CheckpointError
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import num_layers
from gs_dist.model.decoder import Attention, GatedMlp, LayerSpec, MixtureOfExperts, Routing

__all__ = ["expert_layers", "num_further_layers", "routed_experts", "sigmoid_routing", "softmax_routing"]

CORRECTION = "mlp.gate.e_score_correction_bias"


def expert_layers(
    keys: ConfigKeys, attention: Attention, experts: MixtureOfExperts, *, num_dense: int
) -> list[LayerSpec]:
    """All layers: the first `first_k_dense_replace` (`num_dense` where it is absent) dense, the others of experts."""
    dense = keys.get("first_k_dense_replace", num_dense)
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 0:
        raise keys.wrong("first_k_dense_replace", "a whole number, 0 or more")
    hidden_size = attention.hidden_size
    first = GatedMlp(hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size"))
    return [
        LayerSpec(attention=attention, mlp=first if layer < dense else experts) for layer in range(num_layers(keys))
    ]


def routed_experts(
    keys: ConfigKeys, routing: Routing, *, num_experts: int, intermediate_size: int, num_shared: int
) -> MixtureOfExperts:
    """Experts with shared ones that are one mlp; the sizes given are the family's where the keys are absent."""
    size = keys.size("moe_intermediate_size", default=intermediate_size)
    return MixtureOfExperts(
        hidden_size=keys.size("hidden_size"),
        num_experts=keys.size("n_routed_experts", default=num_experts),
        intermediate_size=size,
        routing=routing,
        shared="mlp.shared_experts",
        shared_size=size * keys.size("n_shared_experts", default=num_shared),
    )


def sigmoid_routing(keys: ConfigKeys, *, num_experts: int, groups: int, top_groups: int, scale: float = 1.0) -> Routing:
    """Sigmoids with a correction, in groups judged by their two best experts (DeepSeek-V3, section 2.1.2)."""
    num_experts = keys.size("n_routed_experts", default=num_experts)
    groups = keys.size("n_group", default=groups)
    _refuse_uneven(num_experts, groups, least=2)
    top_groups = keys.size("topk_group", default=min(top_groups, groups), maximum=groups)
    return Routing(
        top_k=_top_k(keys, num_experts // groups * top_groups, default=8),
        scoring="sigmoid",
        normalized=keys.values.get("norm_topk_prob", True) is not False,
        scale=keys.positive("routed_scaling_factor", default=scale),
        num_groups=groups,
        top_groups=top_groups,
        pairs=True,
        wide=True,
        correction=CORRECTION,
    )


def softmax_routing(keys: ConfigKeys, *, num_experts: int, in_groups: bool) -> Routing:
    """Probabilities, with `in_groups` among the best groups, judged by their best expert (DeepSeek-V2, section 2.2)."""
    num_experts = keys.size("n_routed_experts", default=num_experts)
    groups = keys.size("n_group", default=1) if in_groups else 1
    _refuse_uneven(num_experts, groups, least=1)
    top_groups = keys.size("topk_group", default=1, maximum=groups) if in_groups else 1
    return Routing(
        top_k=_top_k(keys, num_experts // groups * top_groups),
        normalized=False,
        scale=keys.positive("routed_scaling_factor", default=1.0),
        num_groups=groups,
        top_groups=top_groups,
        wide=True,
    )


def _top_k(keys: ConfigKeys, eligible: int, **default: int) -> int:
    """Experts of a token, of so many in the groups it may choose from."""
    top_k = keys.size("num_experts_per_tok", **default)
    if top_k > eligible:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {top_k}, and topk_group groups hold {eligible} experts: engines "
            "differ on where the others come from; correct n_group, topk_group or num_experts_per_tok"
        )
    return top_k


def _refuse_uneven(num_experts: int, groups: int, least: int) -> None:
    if num_experts % groups or num_experts // groups < least:
        raise CheckpointError(
            f"config.json: n_routed_experts is {num_experts} and n_group is {groups}; the second must divide the first "
            f"into groups of {least} or more"
        )


def num_further_layers(keys: ConfigKeys) -> int:
    """Layers of multi-token prediction that may be stored behind the last."""
    further = keys.get("num_nextn_predict_layers", 1)
    if isinstance(further, bool) or not isinstance(further, int) or further < 0:
        raise keys.wrong("num_nextn_predict_layers", "a whole number, 0 or more")
    return further
