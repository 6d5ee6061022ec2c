"""OLMo 2: norms behind the blocks, so that nothing takes up a rescaling of their inputs, and norms over all queries
and all keys. Source: transformers `configuration_olmo2.py`, `modeling_olmo2.py`.
"""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, num_layers
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, GroupedQueryAttention, LayerSpec
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("olmo2",)
KEYS = KnownKeys(classes=("Olmo2ForCausalLM",), read=frozenset({"attention_bias"}))


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
            qk_norm="all",
        ),
        mlp=GatedMlp(hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size")),
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        norms_after=True,
    )
    return decoder(keys, [layer] * count, max_position_embeddings=2048, rms_norm_eps=1e-5)
