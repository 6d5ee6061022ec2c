"""Qwen2: biases of queries, keys and values; windows by layer. Source: transformers `configuration_qwen2.py`."""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, windows
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, GroupedQueryAttention, LayerSpec
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("qwen2",)
KEYS = KnownKeys(
    classes=("Qwen2ForCausalLM",),
    read=frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}),
    # Its class has biases of queries, keys and values whatever these say.
    ignored=frozenset({"attention_bias", "qkv_bias"}),
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    sizes, hidden_size = heads(keys), keys.size("hidden_size")
    mlp = GatedMlp(hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size"))
    turned = rotary(keys, sizes.head_dim)
    layers = [
        LayerSpec(
            attention=GroupedQueryAttention(
                hidden_size=hidden_size, **sizes._asdict(), rotary=turned, qkv_bias=True, window=window
            ),
            mlp=mlp,
        )
        for window in windows(keys)
    ]
    return decoder(keys, layers, max_position_embeddings=32768)
