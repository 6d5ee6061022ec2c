"""DeepSeek-V3 and R1, and Kimi-K2, which is saved in their form: latent attention, dense first layers, then experts
chosen by sigmoids in groups and a shared one. Source: transformers `configuration_deepseek_v3.py`,
`modeling_deepseek_v3.py`.
"""

from __future__ import annotations

from gs_dist.model.config_experts import expert_layers, num_further_layers, routed_experts, sigmoid_routing
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_latent import LATENT_KEYS, latent_attention
from gs_dist.model.config_parts import decoder
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
KEYS = KnownKeys(
    classes=("DeepseekV3ForCausalLM",),
    read=LATENT_KEYS
    | {
        "first_k_dense_replace",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_experts_per_tok",
        "num_nextn_predict_layers",
        "rope_interleave",
        "routed_scaling_factor",
        "topk_group",
    },
    # Training's balance, the spelling of other classes, and what follows from other keys.
    ignored=frozenset(
        {"aux_loss_alpha", "ep_size", "head_dim", "num_local_experts", "num_mtp_layers", "qk_head_dim", "seq_aux"}
    ),
    fixed={"moe_layer_freq": (1,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    attention = latent_attention(keys, interleaved=keys.values.get("rope_interleave", True) is not False)
    routing = sigmoid_routing(keys, num_experts=256, groups=8, top_groups=4, scale=2.5)
    experts = routed_experts(keys, routing, num_experts=256, intermediate_size=2048, num_shared=1)
    return decoder(
        keys,
        expert_layers(keys, attention, experts, num_dense=3),
        max_position_embeddings=4096,
        num_further_layers=num_further_layers(keys),
    )
