"""What config.json files of most families say alike: heads, windows, and what stands around layers.

Both spellings are understood: `torch_dtype` of transformers 4, `dtype` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gs_dist.errors import CheckpointError
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.decoder import DecoderArchitecture, LayerSpec
from gs_dist.model.dtypes import FLOATS

__all__ = ["Heads", "decoder", "heads", "num_layers", "sparse_layers", "windows"]

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
    embedding_multiplier: float = 1.0,
    logits_divisor: float = 1.0,
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
        embedding_multiplier=embedding_multiplier,
        logits_divisor=logits_divisor,
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
