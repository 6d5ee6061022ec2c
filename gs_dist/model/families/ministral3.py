"""Ministral 3: Mistral with YaRN, whose queries grow with their position. Source: transformers
`configuration_ministral3.py`, `modeling_ministral3.py`.
"""

from __future__ import annotations

from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_parts import decoder, heads, num_layers
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, GroupedQueryAttention, LayerSpec
from gs_dist.model.known_keys import KnownKeys

MODEL_TYPES = ("ministral3",)
KEYS = KnownKeys(classes=("Ministral3ForCausalLM",), read=frozenset({"sliding_window"}))

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""What the class takes where config.json states no `rope_parameters`."""


def read(keys: ConfigKeys) -> DecoderArchitecture:
    """The architecture that a config.json describes."""
    if keys.table("rope_parameters") is None and keys.table("rope_scaling") is None:
        keys = ConfigKeys({**keys.values, "rope_parameters": _ROPE})
    count, sizes, hidden_size = num_layers(keys), heads(keys, head_dim=128), keys.size("hidden_size")
    layer = LayerSpec(
        attention=GroupedQueryAttention(
            hidden_size=hidden_size,
            **sizes._asdict(),
            rotary=rotary(keys, sizes.head_dim, grows=True),
            window=None if keys.get("sliding_window", None) is None else keys.size("sliding_window"),
        ),
        mlp=GatedMlp(hidden_size=hidden_size, intermediate_size=keys.size("intermediate_size")),
    )
    return decoder(keys, [layer] * count, max_position_embeddings=262144, rms_norm_eps=1e-5)
