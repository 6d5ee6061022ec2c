"""A head of its own, in any directory: found by names and values, and told to loaders by every flag there is.

A wrapper around a language model has a config within its config, and the two need not agree on `tie_word_embeddings`;
which one counts depends on the loader. A key that is left out means what the model's class says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gs_dist.checkpoint.header import TensorInfo
from gs_dist.checkpoint.source_tensors import same_values
from gs_dist.checkpoint.weight_files import WeightFiles

__all__ = ["own_head", "says_tied", "with_own_head"]

_TIE = "tie_word_embeddings"
_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


def own_head(files: WeightFiles) -> tuple[str, str] | None:
    """A stored head that holds other values than every embedding of its shape, and one of these, by name; else None."""
    heads, embeddings = (_weights_of(files.tensors, leaves) for leaves in (_HEADS, _EMBEDDINGS))
    for head in heads:
        alike = [embedding for embedding in embeddings if embedding.shape == head.shape]
        if alike and not any(same_values(files, embedding, head) for embedding in alike):
            return head.name, alike[0].name
    return None


def _weights_of(tensors: Mapping[str, TensorInfo], leaves: tuple[str, ...]) -> list[TensorInfo]:
    return [info for name, info in tensors.items() if name.split(".")[-2:-1] in [[leaf] for leaf in leaves]]


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the head to the embedding, at its top or within, or does not say."""
    found = list(_flags(config))
    return True in found or not found


def _flags(config: Mapping[str, Any]) -> list[Any]:
    inner = [flag for value in config.values() if isinstance(value, Mapping) for flag in _flags(value)]
    return [*([config[_TIE]] if _TIE in config else []), *inner]


def with_own_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every flag that ties head and embedding set to false, and one at its top."""

    def untied(part: Mapping[str, Any]) -> dict[str, Any]:
        own = {key: untied(value) if isinstance(value, Mapping) else value for key, value in part.items()}
        return {**own, _TIE: False} if _TIE in own else own

    return {**untied(config), _TIE: False}
