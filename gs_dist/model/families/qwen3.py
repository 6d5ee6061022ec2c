"""Qwen3: norms of queries and keys, head_dim 128 unless stated, windows by layer.

Source: transformers `configuration_qwen3.py`.
"""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, windows
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, GroupedQueryAttention, LayerSpec
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("qwen3",)
KEYS = KnownKeys(
    classes=("Qwen3ForCausalLM",),
    read=frozenset({"attention_bias", "layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}),
    fixed={"qk_norm": (True,), "use_qk_norm": (True,)},
)


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    sizes, hidden_size, bias = heads(keys, head_dim=128), keys.size("hidden_size"), keys.flag("attention_bias")
    mlp = GatedMlp(hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size"))
    turned = rotary(keys, sizes.head_dim)
    layers = [
        LayerSpec(
            attention=GroupedQueryAttention(
                hidden_size=hidden_size,
                **sizes._asdict(),
                rotary=turned,
                qkv_bias=bias,
                o_bias=bias,
                qk_norm="head",
                window=window,
            ),
            mlp=mlp,
        )
        for window in windows(keys)
    ]
    return decoder(keys, layers, max_position_embeddings=32768)
