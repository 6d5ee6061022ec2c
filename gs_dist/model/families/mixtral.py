"""Mixtral: a mixture of experts in every layer, a window where `sliding_window` is a number.

Source: transformers `configuration_mixtral.py`, `modeling_mixtral.py`.
"""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, num_layers
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GroupedQueryAttention, LayerSpec, MixtureOfExperts, Routing
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("mixtral",)
KEYS = KnownKeys(
    classes=("MixtralForCausalLM",),
    read=frozenset(
        {
            "num_experts_per_tok",
            "num_local_experts",
            "sliding_window",
        }
    ),
    ignored=frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}),
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    count, sizes, hidden_size = num_layers(keys), heads(keys), keys.size("hidden_size")
    num_experts = keys.size("num_local_experts", default=8)
    layer = LayerSpec(
        attention=GroupedQueryAttention(
            hidden_size=hidden_size,
            **sizes._asdict(),
            rotary=rotary(keys, sizes.head_dim, base=1e6),
            window=None if keys.get("sliding_window", None) is None else keys.size("sliding_window"),
        ),
        mlp=MixtureOfExperts(
            hidden_size=hidden_size,
            num_experts=num_experts,
            intermediate_size=keys.size("intermediate_size"),
            routing=Routing(top_k=keys.size("num_experts_per_tok", default=2, maximum=num_experts)),
            prefix="block_sparse_moe",
            names=("w1", "w3", "w2"),
        ),
    )
    return decoder(keys, [layer] * count, max_position_embeddings=131072, rms_norm_eps=1e-5)
