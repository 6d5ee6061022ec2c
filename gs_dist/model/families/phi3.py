"""Phi-3 and Phi-4: one linear makes queries, keys and values, one gate and up; they are published so, as engines hold
them. Source: transformers `configuration_phi3.py`, `modeling_phi3.py`; vLLM `models/phi3.py`.
"""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, num_layers
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, GroupedQueryAttention, LayerSpec
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("phi3",)
KEYS = KnownKeys(classes=("Phi3ForCausalLM",), read=frozenset({"sliding_window"}))


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    count, sizes, hidden_size = num_layers(keys), heads(keys), keys.size("hidden_size")
    layer = LayerSpec(
        attention=GroupedQueryAttention(
            hidden_size=hidden_size,
            **sizes._asdict(),
            rotary=rotary(keys, sizes.head_dim, share=1.0),
            window=None if keys.get("sliding_window", None) is None else keys.size("sliding_window"),
            fused=True,
        ),
        mlp=GatedMlp(hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size"), fused=True),
    )
    return decoder(keys, [layer] * count, max_position_embeddings=4096, rms_norm_eps=1e-5)
