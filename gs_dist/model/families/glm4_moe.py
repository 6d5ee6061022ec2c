"""GLM-4.5 and 4.6: rotary embedding of half of each head, dense first layers, then experts chosen by sigmoids and a
shared one. Source: transformers `configuration_glm4_moe.py`, `modeling_glm4_moe.py`.
"""

from __future__ import annotations

from gs_dist.model.config_experts import expert_layers, num_further_layers, routed_experts, sigmoid_routing
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GroupedQueryAttention
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
            "num_experts_per_tok",
            "num_nextn_predict_layers",
            "routed_scaling_factor",
            "topk_group",
            "use_qk_norm",
        }
    ),
    ignored=frozenset({"num_experts", "num_local_experts", "num_mtp_layers", "shared_expert_intermediate_size"}),
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    sizes = heads(keys)
    attention = GroupedQueryAttention(
        hidden_size=keys.size("hidden_size"),
        **sizes._asdict(),
        rotary=rotary(keys, sizes.head_dim, share=0.5),
        qkv_bias=keys.flag("attention_bias"),
        qk_norm="head" if keys.flag("use_qk_norm") else "none",
    )
    routing = sigmoid_routing(keys, num_experts=128, groups=1, top_groups=1)
    experts = routed_experts(keys, routing, num_experts=128, intermediate_size=1408, num_shared=1)
    return decoder(
        keys,
        expert_layers(keys, attention, experts, num_dense=1),
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        num_further_layers=num_further_layers(keys),
    )
