"""GLM-4.5 and 4.6: rotary embedding of half of each head, dense first layers, then experts chosen by sigmoids and a
shared one. Source: transformers `configuration_glm4_moe.py`, `modeling_glm4_moe.py`.
"""

from __future__ import annotations

from gs_dist.errors import CheckpointError
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, num_layers, rotary
from gs_dist.model.decoder import (
    DecoderArchitecture,
    GatedMlp,
    GroupedQueryAttention,
    LayerSpec,
    MixtureOfExperts,
    Routing,
)
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("glm4_moe",)
KEYS = KnownKeys(
    classes=("Glm4MoeForCausalLM",),
    read=frozenset(
        {
            "attention_bias",
            "first_k_dense_replace",
            "moe_intermediate_size",
            "n_group",
            "n_routed_experts",
            "n_shared_experts",
            "norm_topk_prob",
            "num_experts",
            "num_experts_per_tok",
            "num_local_experts",
            "num_nextn_predict_layers",
            "routed_scaling_factor",
            "shared_expert_intermediate_size",
            "topk_group",
            "use_qk_norm",
        }
    ),
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    count, sizes, hidden_size = num_layers(keys), heads(keys), keys.size("hidden_size")
    attention = GroupedQueryAttention(
        hidden_size=hidden_size,
        **sizes._asdict(),
        rotary=rotary(keys, sizes.head_dim, share=0.5),
        qkv_bias=keys.flag("attention_bias"),
        qk_norm="head" if keys.flag("use_qk_norm") else "none",
    )
    dense = keys.get("first_k_dense_replace", 1)
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 0:
        raise keys.wrong("first_k_dense_replace", "a whole number, 0 or more")
    first = GatedMlp(hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size"))
    experts = _experts(keys, hidden_size)
    layers = [LayerSpec(attention=attention, mlp=first if layer < dense else experts) for layer in range(count)]
    further = keys.get("num_nextn_predict_layers", 1)
    return decoder(
        keys,
        layers,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        num_further_layers=further if isinstance(further, int) else 0,
    )


def _experts(keys: ConfigKeys, hidden_size: int) -> MixtureOfExperts:
    size, num_experts = keys.size("moe_intermediate_size", default=1408), keys.size("n_routed_experts", default=128)
    groups = keys.size("n_group", default=1)
    if num_experts % groups or num_experts // groups < 2:
        raise CheckpointError(
            f"config.json: n_routed_experts is {num_experts} and n_group is {groups}; the second must divide the first "
            "into groups of two or more"
        )
    return MixtureOfExperts(
        hidden_size=hidden_size,
        num_experts=num_experts,
        intermediate_size=size,
        routing=Routing(
            top_k=keys.size("num_experts_per_tok", default=8, maximum=num_experts),
            scoring="sigmoid",
            normalised=keys.values.get("norm_topk_prob", True) is not False,
            scale=keys.positive("routed_scaling_factor", default=1.0),
            num_groups=groups,
            top_groups=keys.size("topk_group", default=1, maximum=groups),
            pairs=True,
            wide=True,
            correction="mlp.gate.e_score_correction_bias",
        ),
        shared="mlp.shared_experts",
        shared_size=size * keys.size("n_shared_experts", default=1),
    )
