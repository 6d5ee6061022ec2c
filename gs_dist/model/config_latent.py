"""What config.json files say of multi-head latent attention."""

from __future__ import annotations

from dataclasses import replace

from gs_dist.errors import CheckpointError
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.config_rotary import rotary
from gs_dist.model.decoder import LatentAttention

__all__ = ["LATENT_KEYS", "latent_attention"]

LATENT_KEYS = frozenset(
    {"attention_bias", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
)
"""Keys that `latent_attention` reads."""


def latent_attention(keys: ConfigKeys, *, interleaved: bool) -> LatentAttention:
    """The attention of all layers; sizes of absent keys are those of DeepSeek's configuration classes.

    `q_lora_rank: null` makes queries without a latent; an absent key means 1536 channels of one.
    """
    num_heads = keys.size("num_attention_heads")
    num_kv_heads = keys.size("num_key_value_heads", default=num_heads)
    if num_kv_heads != num_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads is {num_heads} and num_key_value_heads is {num_kv_heads}; latent "
            "attention expands keys and values for every query head, so the two must be equal"
        )
    turning = keys.size("qk_rope_head_dim", default=64)
    if turning % 2:
        raise CheckpointError(f"config.json: qk_rope_head_dim is {turning}; rotary embedding needs an even one")
    direct = keys.values.get("q_lora_rank", 1536) is None
    return LatentAttention(
        hidden_size=keys.size("hidden_size"),
        num_heads=num_heads,
        query_rank=None if direct else keys.size("q_lora_rank", default=1536),
        kv_rank=keys.size("kv_lora_rank", default=512),
        nope_dim=keys.size("qk_nope_head_dim", default=128),
        value_dim=keys.size("v_head_dim", default=128),
        rotary=replace(rotary(keys, turning), interleaved=interleaved),
        bias=keys.flag("attention_bias"),
    )
