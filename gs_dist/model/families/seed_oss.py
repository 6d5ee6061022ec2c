"""Seed-OSS: Llama with biases of queries, keys and values, and of the output by a key of its own. Source: transformers
`configuration_seed_oss.py`, `modeling_seed_oss.py`.
"""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, num_layers
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, GroupedQueryAttention, LayerSpec
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("seed_oss",)
KEYS = KnownKeys(
    classes=("SeedOssForCausalLM",),
    read=frozenset({"attention_bias", "attention_out_bias", "mlp_bias"}),
    ignored=frozenset({"residual_dropout"}),
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    count, sizes, hidden_size = num_layers(keys), heads(keys, head_dim=128), keys.size("hidden_size")
    layer = LayerSpec(
        attention=GroupedQueryAttention(
            hidden_size=hidden_size,
            **sizes._asdict(),
            rotary=rotary(keys, sizes.head_dim),
            qkv_bias=keys.flag("attention_bias") if keys.values.get("attention_bias") is not None else True,
            o_bias=keys.flag("attention_out_bias"),
        ),
        mlp=GatedMlp(
            hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size"), bias=keys.flag("mlp_bias")
        ),
    )
    return decoder(keys, [layer] * count, max_position_embeddings=524288)
