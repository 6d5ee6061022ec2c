"""DeepSeek-V2 and V2-Lite: latent attention, dense first layers, then experts by softmax, maybe in groups, and a shared
one. Source: transformers `configuration_deepseek_v2.py`, `modeling_deepseek_v2.py`.
"""

from __future__ import annotations

from gs_dist.model.config_experts import expert_layers, routed_experts, softmax_routing
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_latent import LATENT_KEYS, latent_attention
from gs_dist.model.config_parts import decoder
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("deepseek_v2",)
KEYS = KnownKeys(
    classes=("DeepseekV2ForCausalLM",),
    read=LATENT_KEYS
    | {
        "first_k_dense_replace",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "routed_scaling_factor",
        "topk_group",
        "topk_method",
    },
    # Training's balance, the spelling of other classes, and what follows from other keys.
    ignored=frozenset(
        {"aux_loss_alpha", "ep_size", "head_dim", "num_experts", "num_local_experts", "qk_head_dim", "seq_aux"}
    ),
    # transformers' class does not heed `norm_topk_prob`, and the model's own code and vLLM do.
    fixed={"moe_layer_freq": (1,), "norm_topk_prob": (False,), "scoring_func": ("softmax",)},
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    attention = latent_attention(keys, interleaved=True)
    method = keys.choice("topk_method", ("greedy", "group_limited_greedy"), default="greedy")
    routing = softmax_routing(keys, num_experts=64, in_groups=method == "group_limited_greedy")
    experts = routed_experts(keys, routing, num_experts=64, intermediate_size=1407, num_shared=2)
    layers = expert_layers(keys, attention, experts, num_dense=0)
    return decoder(keys, layers, max_position_embeddings=2048)
