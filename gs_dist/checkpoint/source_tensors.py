"""A source's tensors held against what its config.json calls for: all there, none too many, nothing dropped unseen."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import DTYPES, SPELLINGS, TensorInfo
from gs_dist.checkpoint.source_kind import refuse_foreign_names
from gs_dist.checkpoint.weight_files import WeightFiles, same_bytes, some
from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.dtypes import FLOATS

__all__ = ["HEAD", "HEAD_KEPT", "SourceTensors", "same_values", "settle_tensors"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_KEPT = (
    "{head} holds other values than {embedding}, though config.json ties the two or leaves it open "
    "(tie_word_embeddings): "
    "the head is kept as one of its own, as in transformers, and the published config.json says so"
)
"""What people are told of a head, by its name and the embedding's."""

_CHUNK = 1 << 22  # values compared at a time
# Buffers that older transformers saved; rotary frequencies follow from config.json.
_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class SourceTensors:
    """What of a checkpoint's tensors makes the model.

    Attributes:
        tensors: name to header entry of every tensor that is published, in model order.
        carried: names of those that no decoder runs, the last of `tensors`.
        tied: whether the head is the embedding, by the tensors themselves.
        ignored: names on disk that no decoder needs.
        notes: what was ignored and why, and what was read otherwise than config.json says.
    """

    tensors: Mapping[str, TensorInfo]
    carried: tuple[str, ...]
    tied: bool
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


def settle_tensors(files: WeightFiles, architecture: DecoderArchitecture) -> SourceTensors:
    """Decides which tensors make the model.

    A head stored beside an embedding that config.json ties it to is compared with it, and is one of its own where the
    two differ; where only the head is stored, it is the embedding as well (transformers `tie_weights`).

    Raises:
        CheckpointError: a tensor is missing, unaccounted for, misshapen or no float; the message names it.
    """
    found, notes = dict(files.tensors), list(files.notes)
    refuse_foreign_names(found, tied=architecture.tie_word_embeddings)
    tied = architecture.tie_word_embeddings
    if tied and HEAD in found and EMBEDDING not in found:
        found[EMBEDDING] = dataclasses.replace(found.pop(HEAD), name=EMBEDDING)
        notes.append(
            f"{HEAD} is stored and {EMBEDDING} is not, and config.json ties the two (tie_word_embeddings): it is both, "
            "as in transformers, and is published as the embedding"
        )
    elif tied and _stands_apart(files, found):
        tied = False
        notes.append(HEAD_KEPT.format(head=HEAD, embedding=EMBEDDING))
    settled = dataclasses.replace(architecture, tie_word_embeddings=tied)
    tensors, extra = _checked(found, settled, files.notes)
    carried = tuple(name for name in extra if settled.further_layer(name) is not None)
    if carried:
        notes.append(
            f"{some(list(carried))}: layers of multi-token prediction behind the last are carried over in float, and "
            "not calibrated"
        )
    ignored = tuple(name for name in extra if name not in set(carried))
    return SourceTensors(
        tensors=tensors | {name: found[name] for name in carried},
        carried=carried,
        tied=tied,
        ignored=ignored,
        notes=(*notes, *_notes_on(ignored)),
    )


def _stands_apart(files: WeightFiles, found: Mapping[str, TensorInfo]) -> bool:
    """Whether a head is stored beside the embedding and holds other values."""
    return HEAD in found and EMBEDDING in found and not same_values(files, found[EMBEDDING], found[HEAD])


def _notes_on(ignored: tuple[str, ...]) -> list[str]:
    frequencies = [name for name in ignored if name != HEAD]
    notes = (
        [f"{HEAD} is equal to {EMBEDDING}, which config.json ties it to, and is left out"] if HEAD in ignored else []
    )
    if frequencies:
        notes.append(f"{some(frequencies)}: left out, since rotary frequencies follow from config.json")
    return notes


def same_values(files: WeightFiles, first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two float tensors hold the same numbers, whatever their dtypes."""
    if first.dtype == second.dtype or first.shape != second.shape:
        return same_bytes(files.paths[first.file], first, files.paths[second.file], second)
    one, other = (_flat(files, info) for info in (first, second))
    return all(
        np.array_equal(one[start : start + _CHUNK].astype(np.float32), other[start : start + _CHUNK].astype(np.float32))
        for start in range(0, one.size, _CHUNK)
    )


def _flat(files: WeightFiles, info: TensorInfo) -> npt.NDArray[np.generic]:
    dtype = DTYPES[SPELLINGS[info.dtype]]
    raw = np.memmap(files.paths[info.file], np.uint8, "r", offset=info.offset, shape=(info.nbytes,))
    return raw.view(dtype)


def _checked(
    found: Mapping[str, TensorInfo], architecture: DecoderArchitecture, notes: Sequence[str] = ()
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """The tensors a decoder of this architecture has, in its order, and the names of harmless others."""
    expected = architecture.outer_tensors()
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        expected.update({prefix + name: shape for name, shape in architecture.layer_tensors(layer).items()})
    missing = [name for name in expected if name not in found]
    if missing:
        hint = "; ".join(["complete the download, or correct config.json", *notes])
        others = [name for name in found if name not in expected and not _is_harmless(name, architecture)]
        if missing == [HEAD] and others:
            hint = (
                f"{some(others)} may be a head of another kind, as of a classifier or a reward model: causal language "
                "models are served"
            )
        elif missing == [HEAD]:
            hint = "complete the download, or set tie_word_embeddings: true in config.json if the head is tied"
        elif not any(name.startswith("model.layers.") for name in found):
            hint = f"names begin with {next(iter(found), 'nothing')!r:.100} here: save the causal language model itself"
        raise CheckpointError(f"the checkpoint lacks {some(missing)}, which config.json calls for; {hint}")
    extra = [name for name in found if name not in expected]
    harmful = [name for name in extra if not _is_harmless(name, architecture)]
    if harmful:
        match = _LAYER.match(harmful[0])
        beyond = match is not None and int(match.group(1)) >= architecture.num_layers
        reason = f"num_hidden_layers is {architecture.num_layers}" if beyond else "a decoder of this kind has no such"
        raise CheckpointError(
            f"{found[harmful[0]].file}: holds {some(harmful)} beyond what config.json describes ({reason}); "
            "correct config.json, or save the model without them"
        )
    for name, shape in expected.items():
        info = found[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has shape {info.shape}, and config.json calls for {shape}"
            )
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is {info.dtype}; served are {', '.join(FLOATS)}. "
                "Set model to the float checkpoint"
            )
    return {name: found[name] for name in expected}, tuple(extra)


def _is_harmless(name: str, architecture: DecoderArchitecture) -> bool:
    return (
        _FREQUENCIES.fullmatch(name) is not None
        or (name == HEAD and architecture.tie_word_embeddings)
        or architecture.further_layer(name) is not None
    )
