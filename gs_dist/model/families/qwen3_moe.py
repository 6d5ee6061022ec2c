"""Qwen3 mixtures of experts: Qwen3's attention; a mixture in every layer that neither `decoder_sparse_step` nor
`mlp_only_layers` makes dense. Source: transformers `configuration_qwen3_moe.py`, `modeling_qwen3_moe.py`.
"""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, sparse_layers
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import (
    DecoderArchitecture,
    GatedMlp,
    GroupedQueryAttention,
    LayerSpec,
    MixtureOfExperts,
    Routing,
)
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("qwen3_moe",)
KEYS = KnownKeys(
    classes=("Qwen3MoeForCausalLM",),
    read=frozenset(
        {
            "attention_bias",
            "decoder_sparse_step",
            "mlp_only_layers",
            "moe_intermediate_size",
            "norm_topk_prob",
            "num_experts",
            "num_experts_per_tok",
            "num_local_experts",
            "sliding_window",
            "use_sliding_window",
        }
    ),
    ignored=frozenset({"output_router_logits", "router_aux_loss_coef", "max_window_layers"}),
    fixed={"qk_norm": (True,), "shared_expert_intermediate_size": (0,), "use_qk_norm": (True,)},
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    sizes, hidden_size, bias = heads(keys), keys.size("hidden_size"), keys.flag("attention_bias")
    dense = GatedMlp(hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size"))
    num_experts = keys.size("num_experts", default=keys.get("num_local_experts", 128))
    experts = MixtureOfExperts(
        hidden_size=hidden_size,
        num_experts=num_experts,
        intermediate_size=keys.size("moe_intermediate_size", default=768),
        routing=Routing(
            top_k=keys.size("num_experts_per_tok", default=8, maximum=num_experts),
            normalized=keys.flag("norm_topk_prob"),
        ),
    )
    # Unlike Qwen3, a window that is switched on holds for every layer.
    windowed = keys.flag("use_sliding_window") and keys.values.get("sliding_window", 4096) is not None
    attention = GroupedQueryAttention(
        hidden_size=hidden_size,
        **sizes._asdict(),
        rotary=rotary(keys, sizes.head_dim),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        window=keys.size("sliding_window", default=4096) if windowed else None,
    )
    layers = [LayerSpec(attention=attention, mlp=experts if sparse else dense) for sparse in sparse_layers(keys)]
    return decoder(keys, layers, max_position_embeddings=32768)
