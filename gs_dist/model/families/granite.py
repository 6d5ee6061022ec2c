"""Granite 3: Llama with multipliers of embedding, scores, blocks and logits. Source: transformers
`configuration_granite.py`, `modeling_granite.py`.
"""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, num_layers
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, GroupedQueryAttention, LayerSpec
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("granite",)
KEYS = KnownKeys(
    classes=("GraniteForCausalLM",),
    read=frozenset(
        {
            "attention_bias",
            "attention_multiplier",
            "embedding_multiplier",
            "logits_scaling",
            "mlp_bias",
            "residual_multiplier",
        }
    ),
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    count, sizes, bias = num_layers(keys), heads(keys), keys.flag("attention_bias")
    hidden_size = keys.size("hidden_size")
    layer = LayerSpec(
        attention=GroupedQueryAttention(
            hidden_size=hidden_size,
            **sizes._asdict(),
            rotary=rotary(keys, sizes.head_dim),
            qkv_bias=bias,
            o_bias=bias,
            stated_scale=keys.positive("attention_multiplier", default=1.0),
        ),
        mlp=GatedMlp(
            hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size"), bias=keys.flag("mlp_bias")
        ),
        residual_multiplier=keys.positive("residual_multiplier", default=1.0),
    )
    return decoder(
        keys,
        [layer] * count,
        max_position_embeddings=2048,
        embedding_multiplier=keys.positive("embedding_multiplier", default=1.0),
        logits_divisor=keys.positive("logits_scaling", default=1.0),
    )
