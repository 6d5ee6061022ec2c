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

__all__ = ["Heads", "decoder", "heads", "num_layers", "rotary", "sparse_layers", "windows"]

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


def rotary(keys: ConfigKeys, head_dim: int, *, share: float | None = None, base: float = 10000.0) -> Rotary:
    """The rotary embedding of all layers, as transformers 5 reads it; what version 4 would read otherwise is refused.

    `share` is the family's `partial_rotary_factor` where the key is absent; a family without one knows no such key.
    `base` is its `rope_theta` where that is absent.

    Version 5 takes `rope_scaling` where `rope_parameters` stands beside it, and version 4 knows that alone. Of two
    bases, or two original lengths, one takes what stands in the table, the other what stands beside it.
    """
    table = _rope_table(keys)
    places = [keys, *([] if table is None else [table])]
    for place in places if share is None else ():
        if place.get("partial_rotary_factor", 1.0) != 1.0:
            raise place.wrong("partial_rotary_factor", "1.0 or absent: partial rotary embedding is not served")
    theta = next((place for place in places if place.get("rope_theta", None) is not None), keys)
    scaling = None if table is None else _scaling(table, keys)
    channels = head_dim if share is None else _turning(places, head_dim, share)
    return Rotary(theta=theta.positive("rope_theta", default=base), channels=channels, scaling=scaling)


def _turning(places: Sequence[ConfigKeys], head_dim: int, share: float) -> int:
    """Channels of a head that turn; the table counts before what stands beside it."""
    key = "partial_rotary_factor"
    said = {place.positive(key) for place in places if place.get(key, None) is not None}
    if len(said) > 1:
        raise places[0].wrong(
            key, f"the same everywhere, and {key} is said to be {' and '.join(map(str, sorted(said)))}"
        )
    channels = int(head_dim * said.pop() if said else head_dim * share)
    if channels % 2 or not 0 < channels <= head_dim:
        raise places[0].wrong(key, f"such that an even number of head_dim's {head_dim} channels turns")
    return channels


def _rope_table(keys: ConfigKeys) -> ConfigKeys | None:
    """The table that counts; where several places say one thing, they must say the same."""
    older, newer = keys.table("rope_scaling"), keys.table("rope_parameters")
    stated = [table for table in (older, newer) if table is not None and table.values]
    if not stated:
        return None
    if len(stated) > 1 and _rope_values(stated[0]) != _rope_values(stated[1]):
        raise CheckpointError(
            f"config.json: rope_scaling is {dict(stated[0].values)!r:.200} and rope_parameters is "
            f"{dict(stated[1].values)!r:.200}, which are two embeddings, and engines differ on which of them counts: "
            "remove the one that the model was not trained with"
        )
    for key in ("rope_theta", "original_max_position_embeddings"):
        said = [
            (f"{place.where}{key}", place.get(key)) for place in (keys, *stated) if place.get(key, None) is not None
        ]
        if any(value != said[0][1] for _, value in said):
            listed = " and ".join(f"{name} is {value!r:.50}" for name, value in said)
            raise CheckpointError(
                f"config.json: {listed}: engines differ on which of them counts; remove what is not of this model"
            )
        if len(stated) > 1 and [name for name, _ in said] == [f"rope_parameters.{key}"]:
            raise CheckpointError(
                f"config.json: {key} stands in rope_parameters, which does not count beside rope_scaling: write it "
                "into rope_scaling, or remove rope_scaling"
            )
    return stated[0]


def _rope_values(table: ConfigKeys) -> dict[str, object]:
    """How a table stretches positions, in one spelling and without what is null."""
    apart = ("rope_theta", "original_max_position_embeddings", "type", "rope_type")
    values = {key: value for key, value in table.values.items() if value is not None and key not in apart}
    return {**values, "rope_type": table.get("rope_type", table.get("type", "default"))}


def _scaling(table: ConfigKeys, keys: ConfigKeys) -> RopeScaling | None:
    nested = [key for key, value in table.values.items() if isinstance(value, Mapping)]
    if nested:
        raise CheckpointError(
            f"config.json: {table.where}{nested[0]} is a table of its own; "
            "served is one rotary embedding for all layers"
        )
    spelling = "rope_type" if table.get("rope_type", None) is not None else "type"  # `type` is the older spelling
    rope_type = table.choice(spelling, ("default", "linear", "llama3"), default="default")
    if table.get("type", rope_type) != rope_type:
        raise table.wrong("type", f"what rope_type is, {rope_type!r}")
    if rope_type == "default":
        return None
    factor = table.positive("factor")
    if rope_type == "linear":
        return RopeScaling(rope_type=rope_type, factor=factor)
    low, high = table.positive("low_freq_factor"), table.positive("high_freq_factor")
    if low >= high:
        raise table.wrong("low_freq_factor", f"below high_freq_factor, which is {high}")
    # As transformers 5 does where no place states the length.
    length = "original_max_position_embeddings"
    place = table if table.get(length, None) is not None else keys
    return RopeScaling(
        rope_type=rope_type,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=place.size(length if place.get(length, None) else "max_position_embeddings"),
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


def decoder(
    keys: ConfigKeys,
    layers: Sequence[LayerSpec],
    *,
    max_position_embeddings: int,
    rms_norm_eps: float = 1e-6,
    num_further_layers: int = 0,
) -> DecoderArchitecture:
    """What stands around `layers`; the sizes given here are the family's where the keys are absent."""
    shared: dict[LayerSpec, LayerSpec] = {}
    return DecoderArchitecture(
        model_type=str(keys.get("model_type")),
        vocab_size=keys.size("vocab_size"),
        hidden_size=keys.size("hidden_size"),
        layers=tuple(shared.setdefault(layer, layer) for layer in layers),
        rms_norm_eps=keys.positive("rms_norm_eps", default=rms_norm_eps),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        max_position_embeddings=keys.size("max_position_embeddings", default=max_position_embeddings),
        dtype=_dtype(keys),
        eos_token_ids=keys.token_ids("eos_token_id"),
        num_further_layers=num_further_layers,
    )


def _dtype(keys: ConfigKeys) -> str:
    stated = {key: keys.get(key) for key in ("dtype", "torch_dtype") if keys.get(key, None) is not None}
    values = [value.removeprefix("torch.") if isinstance(value, str) else value for value in stated.values()]
    if any(value != values[0] for value in values):
        raise CheckpointError(
            f"config.json: dtype is {stated['dtype']!r:.50} and torch_dtype is {stated['torch_dtype']!r:.50}: versions "
            "of transformers differ on which of them counts; remove the wrong one"
        )
    value = next(iter(values), "float32")
    if not isinstance(value, str) or value not in FLOATS:
        raise keys.wrong(next(iter(stated)), " or ".join(FLOATS))
    return value


def sparse_layers(keys: ConfigKeys) -> list[bool]:
    """Whether each layer has experts: every `decoder_sparse_step`-th that `mlp_only_layers` does not name."""
    step, dense = keys.size("decoder_sparse_step", default=1), keys.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise keys.wrong("mlp_only_layers", "a list of layer numbers")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers(keys))]
