"""What config.json files say of rotary embeddings, in the spelling of either version of transformers.

Version 4 has `rope_theta` and `rope_scaling`, version 5 `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gs_dist.errors import CheckpointError
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.rotary import LinearScaling, Llama3Scaling, RopeScaling, Rotary, YarnScaling

__all__ = ["rotary"]

_LENGTH = "original_max_position_embeddings"
_GROWTH = "llama_4_scaling_beta"


def rotary(
    keys: ConfigKeys, head_dim: int, *, share: float | None = None, base: float = 10000.0, grows: bool = False
) -> Rotary:
    """The rotary embedding of all layers, as transformers 5 reads it; what version 4 would read otherwise is refused.

    `share` is the family's `partial_rotary_factor` where the key is absent; a family without one knows no such key.
    `base` is its `rope_theta` where that is absent. Queries of a family that `grows` are scaled with their position.

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
    beta = 0.0 if table is None else _weight(table, _GROWTH)
    if beta and table is not None and not grows:
        raise table.wrong(_GROWTH, "absent: queries of models of this type are not scaled with their position")
    return Rotary(
        theta=theta.positive("rope_theta", default=base),
        channels=channels,
        scaling=scaling,
        growth=beta,
        growth_length=_original_length(table, keys) if beta and table is not None else 1,
    )


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
    _refuse_dynamic(table, spelling, keys)
    rope_type = table.choice(spelling, ("default", *_READERS), default="default")
    if table.get("type", rope_type) != rope_type:
        raise table.wrong("type", f"what rope_type is, {rope_type!r}")
    return None if rope_type == "default" else _READERS[rope_type](table, keys)


def _refuse_dynamic(table: ConfigKeys, spelling: str, keys: ConfigKeys) -> None:
    if table.get(spelling, None) == "dynamic":
        raise CheckpointError(
            f"config.json: {table.where}{spelling} is 'dynamic', by which transformers stretches positions as far as a "
            "text is long and vLLM always by the factor: no calibration holds for both. Remove the table to serve up "
            'to max_position_embeddings tokens, or write {"rope_type": "yarn", "factor": '
            f"{table.get('factor', None)!r:.20}, "
            f'"{_LENGTH}": {keys.get("max_position_embeddings", None)!r:.20}}}'
        )


def _linear(table: ConfigKeys, keys: ConfigKeys) -> LinearScaling:
    return LinearScaling(factor=table.positive("factor"))


def _llama3(table: ConfigKeys, keys: ConfigKeys) -> Llama3Scaling:
    low, high = table.positive("low_freq_factor"), table.positive("high_freq_factor")
    if low >= high:
        raise table.wrong("low_freq_factor", f"below high_freq_factor, which is {high}")
    return Llama3Scaling(
        factor=table.positive("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_original_length(table, keys),
    )


def _yarn(table: ConfigKeys, keys: ConfigKeys) -> YarnScaling:
    length = _original_length(table, keys)
    factor = table.positive("factor", default=keys.size("max_position_embeddings", default=length) / length)
    stated = table.get("attention_factor", None)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=length,
        beta_fast=table.positive("beta_fast", default=32.0),
        beta_slow=table.positive("beta_slow", default=1.0),
        truncate=table.get("truncate", True) is True or table.flag("truncate"),
        stated_attention_factor=None if stated is None else table.positive("attention_factor"),
        mscale=_weight(table, "mscale"),
        mscale_all_dim=_weight(table, "mscale_all_dim"),
    )


def _weight(table: ConfigKeys, key: str) -> float:
    """A number of which 0 means as much as absence."""
    return 0.0 if table.get(key, 0) in (0, 0.0) else table.positive(key)


def _original_length(table: ConfigKeys, keys: ConfigKeys) -> int:
    """As transformers 5 does where no place states the length."""
    place = table if table.get(_LENGTH, None) is not None else keys
    return place.size(_LENGTH if place.get(_LENGTH, None) else "max_position_embeddings")


_READERS: dict[str, Callable[[ConfigKeys, ConfigKeys], RopeScaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
