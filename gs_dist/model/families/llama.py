"""Llama, and what is saved as it: biases by two keys, no window. Source: transformers `configuration_llama.py`."""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, num_layers
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, GroupedQueryAttention, LayerSpec
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("llama",)
KEYS = KnownKeys(
    classes=("LlamaForCausalLM", "LLaMAForCausalLM"),
    read=frozenset({"attention_bias", "mlp_bias"}),
    told=frozenset({"sliding_window"}),  # converted Mistral models state one
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
        ),
        mlp=GatedMlp(
            hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size"), bias=keys.flag("mlp_bias")
        ),
    )
    return decoder(keys, [layer] * count, max_position_embeddings=2048)
