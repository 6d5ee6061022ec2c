"""What config.json files of most families say alike: heads, rotary embedding, windows, and what stands around layers.

Both spellings are understood: `torch_dtype`, `rope_theta` and `rope_scaling` of transformers 4, `dtype` and
`rope_parameters` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gs_dist.errors import CheckpointError
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.decoder import DecoderArchitecture, LayerSpec
from gs_dist.model.dtypes import FLOATS
from gs_dist.model.rotary import RopeScaling, Rotary

__all__ = ["Heads", "decoder", "heads", "num_layers", "rotary", "windows"]

_MAX_LAYERS = 4096  # bounds what a damaged config.json can make us enumerate
_ATTENTION_TYPES = ("full_attention", "sliding_attention")


class Heads(NamedTuple):
    """Query heads, key/value heads, and channels of one."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def heads(keys: ConfigKeys, head_dim: int | None = None) -> Heads:
    """`head_dim` is the family's where the key is absent; None divides hidden_size among the query heads."""
    hidden_size, num_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    num_kv_heads = keys.size("num_key_value_heads", default=num_heads)
    if head_dim is None and keys.get("head_dim", None) is None and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size is {hidden_size} and num_attention_heads is {num_heads}; the first must be a "
            "multiple of the second where head_dim is not given"
        )
    size = keys.size("head_dim", default=head_dim or hidden_size // num_heads)
    if size % 2:
        raise CheckpointError(f"config.json: head_dim is {size}; rotary embedding needs an even one")
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads is {num_heads} and num_key_value_heads is {num_kv_heads}; "
            "the first must be a multiple of the second"
        )
    return Heads(num_heads, num_kv_heads, size)


def num_layers(keys: ConfigKeys) -> int:
    """Decoder layers."""
    return keys.size("num_hidden_layers", maximum=_MAX_LAYERS)


def rotary(keys: ConfigKeys, head_dim: int) -> Rotary:
    """The rotary embedding of all layers; transformers 5 keeps base and scaling in `rope_parameters`."""
    table = keys.table("rope_parameters") or keys.table("rope_scaling")
    theta_keys = table if table is not None and table.get("rope_theta", None) is not None else keys
    theta = theta_keys.positive("rope_theta", default=10000.0)
    for place in (keys, table):
        if place is not None and place.get("partial_rotary_factor", 1.0) != 1.0:
            raise place.wrong("partial_rotary_factor", "1.0 or absent: partial rotary embedding is not served")
    return Rotary(theta=theta, channels=head_dim, scaling=None if table is None else _scaling(table))


def _scaling(table: ConfigKeys) -> RopeScaling | None:
    nested = [key for key, value in table.values.items() if isinstance(value, Mapping)]
    if nested:
        raise CheckpointError(
            f"config.json: {table.where}{nested[0]} is a table of its own; "
            "served is one rotary embedding for all layers"
        )
    spelling = "rope_type" if table.get("rope_type", None) is not None else "type"  # `type` is the older spelling
    rope_type = table.choice(spelling, ("default", "linear", "llama3"), default="default")
    if rope_type == "default":
        return None
    factor = table.positive("factor")
    if rope_type == "linear":
        return RopeScaling(rope_type=rope_type, factor=factor)
    low, high = table.positive("low_freq_factor"), table.positive("high_freq_factor")
    if low >= high:
        raise table.wrong("low_freq_factor", f"below high_freq_factor, which is {high}")
    return RopeScaling(
        rope_type=rope_type,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=table.size("original_max_position_embeddings"),
    )


def windows(keys: ConfigKeys) -> list[int | None]:
    """Of each layer, where `use_sliding_window` switches them on and `layer_types` or `max_window_layers` says where.

    Null for `sliding_window` means no window; an absent key means the configuration class's 4096.
    """
    count = num_layers(keys)
    if keys.values.get("sliding_window", 4096) is None or not keys.flag("use_sliding_window"):
        return [None] * count
    first = keys.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise keys.wrong("max_window_layers", "a whole number, 0 or more")
    full = min(first, count)
    kinds = keys.get("layer_types", ["full_attention"] * full + ["sliding_attention"] * (count - full))
    if not isinstance(kinds, list) or len(kinds) < count or any(kind not in _ATTENTION_TYPES for kind in kinds):
        raise keys.wrong("layer_types", f"{count} entries of {', '.join(_ATTENTION_TYPES)}")
    window = keys.size("sliding_window", default=4096)
    return [window if kind == "sliding_attention" else None for kind in kinds[:count]]


def decoder(keys: ConfigKeys, layers: Sequence[LayerSpec], *, max_position_embeddings: int) -> DecoderArchitecture:
    """What stands around `layers`; `max_position_embeddings` is the family's where the key is absent."""
    shared: dict[LayerSpec, LayerSpec] = {}
    return DecoderArchitecture(
        model_type=str(keys.get("model_type")),
        vocab_size=keys.size("vocab_size"),
        hidden_size=keys.size("hidden_size"),
        layers=tuple(shared.setdefault(layer, layer) for layer in layers),
        rms_norm_eps=keys.positive("rms_norm_eps", default=1e-6),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        max_position_embeddings=keys.size("max_position_embeddings", default=max_position_embeddings),
        dtype=_dtype(keys),
        eos_token_ids=keys.token_ids("eos_token_id"),
    )


def _dtype(keys: ConfigKeys) -> str:
    key = "dtype" if keys.get("dtype", None) is not None else "torch_dtype"
    value = keys.get(key, "float32")
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    if name not in FLOATS:
        raise keys.wrong(key, " or ".join(FLOATS))
    return name
