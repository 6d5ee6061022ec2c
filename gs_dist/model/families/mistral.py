"""Mistral: a window in every layer unless `sliding_window` is null. Source: transformers `configuration_mistral.py`."""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, num_layers
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, GroupedQueryAttention, LayerSpec
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("mistral",)
KEYS = KnownKeys(classes=("MistralForCausalLM",), read=frozenset({"sliding_window"}))


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    count, sizes, hidden_size = num_layers(keys), heads(keys), keys.size("hidden_size")
    # Null means no window; an absent key means the configuration class's 4096.
    unlimited = keys.values.get("sliding_window", 4096) is None
    layer = LayerSpec(
        attention=GroupedQueryAttention(
            hidden_size=hidden_size,
            **sizes._asdict(),
            rotary=rotary(keys, sizes.head_dim),
            window=None if unlimited else keys.size("sliding_window", default=4096),
        ),
        mlp=GatedMlp(hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size")),
    )
    return decoder(keys, [layer] * count, max_position_embeddings=131072)
