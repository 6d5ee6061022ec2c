"""Qwen2 mixtures of experts: Qwen2's attention, and beside the experts one that every token passes, behind a gate.

Source: transformers `configuration_qwen2_moe.py`, `modeling_qwen2_moe.py`.
"""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, sparse_layers, windows
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

MODEL_TYPES = ("qwen2_moe",)
KEYS = KnownKeys(
    classes=("Qwen2MoeForCausalLM",),
    read=frozenset(
        {
            "decoder_sparse_step",
            "layer_types",
            "max_window_layers",
            "mlp_only_layers",
            "moe_intermediate_size",
            "norm_topk_prob",
            "num_experts",
            "num_experts_per_tok",
            "qkv_bias",
            "shared_expert_intermediate_size",
            "sliding_window",
            "use_sliding_window",
        }
    ),
    ignored=frozenset({"output_router_logits", "router_aux_loss_coef"}),
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    sizes, hidden_size = heads(keys), keys.size("hidden_size")
    turned = rotary(keys, sizes.head_dim)
    dense = GatedMlp(hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size"))
    num_experts = keys.size("num_experts", default=60)
    experts = MixtureOfExperts(
        hidden_size=hidden_size,
        num_experts=num_experts,
        intermediate_size=keys.size("moe_intermediate_size", default=1408),
        routing=Routing(
            top_k=keys.size("num_experts_per_tok", default=4, maximum=num_experts),
            normalized=keys.flag("norm_topk_prob"),
        ),
        shared_size=keys.size("shared_expert_intermediate_size", default=5632),
        shared_gate="mlp.shared_expert_gate",
    )
    layers = [
        LayerSpec(
            attention=GroupedQueryAttention(
                hidden_size=hidden_size,
                **sizes._asdict(),
                rotary=turned,
                qkv_bias=keys.values.get("qkv_bias", True) is not False,
                window=window,
            ),
            mlp=experts if sparse else dense,
        )
        for window, sparse in zip(windows(keys), sparse_layers(keys), strict=True)
    ]
    return decoder(keys, layers, max_position_embeddings=32768)
