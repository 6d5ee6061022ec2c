"""What a checkpoint holds, sorted by name and shape alone: weights that can be quantised, and tensors carried over.

Every tensor of the source ends in exactly one entry; a fused tensor of experts in one for each expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gs_dist.checkpoint.header import TensorInfo
from gs_dist.checkpoint.source_kind import refuse_quantized, refuse_stale_config, refuse_unmerged
from gs_dist.checkpoint.sources.directory import SourceDirectory
from gs_dist.checkpoint.sources.encoded import EncodedSource, find_encoding, is_decoded, stated_encoding
from gs_dist.checkpoint.sources.matrix import PlainMatrix, StoredMatrix, TransposedMatrix, numpy_dtype
from gs_dist.errors import CheckpointError
from gs_dist.model.dtypes import FLOATS
from gs_dist.model.kept_in_float import Family, family_of, kept_reason

__all__ = ["Carried", "Catalogue", "LinearRows", "Weight", "layer_of", "take_catalogue"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_FUSED = re.compile(r"^(?P<experts>.*\.experts)\.(?P<leaf>gate_up_proj|down_proj|gate_proj|up_proj)$")
_FUSED_BIAS = re.compile(r"^(?P<experts>.*\.experts)\.(?P<leaf>gate_up_proj|down_proj)_bias$")


@dataclass(frozen=True, kw_only=True)
class LinearRows:
    """A linear that a stored matrix holds: its full name, and its rows there."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A stored matrix of one linear, or of gate and up of one expert.

    Attributes:
        matrix: where it lies and how it is encoded.
        linears: what it holds, by rows.
        kept: why it stays in floats unless it is asked for; None where it is to be quantised.
        expert: one of a mixture's experts, which engines have schemes of their own for.
        encoded: in another encoding than floats, so that it must be decoded where it stays.
        fused: the full name of the tensor of all experts that it is a part of, None for a tensor of its own.
    """

    matrix: StoredMatrix
    linears: tuple[LinearRows, ...]
    kept: str | None
    expert: bool
    encoded: bool
    fused: str | None = None

    @property
    def columns(self) -> int:
        """Input channels."""
        return self.matrix.shape[1]


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A tensor that is no linear's weight: copied byte by byte, whole or (`rows` set) a row of it under another name.

    Attributes:
        info: the tensor.
        name: what it is published as.
        expert: the row that is published, of a fused tensor of experts; None for the whole tensor.
        start, step, count: the values of that row.
        reason: why it is no weight to quantise, for people.
    """

    info: TensorInfo
    name: str
    reason: str
    expert: int | None = None
    start: int = 0
    step: int = 1
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All of a checkpoint.

    Attributes:
        model_type: of config.json, of its text model where that is nested.
        family: what is known of the model type.
        dtype: of floats and scales: what config.json states, or the largest share of the float tensors.
        encoding: what the source is quantised with already, "" for floats.
        encoded: whether any tensor is in that, and not decoded already.
        weights: what can be quantised, in the order of storage.
        carried: every other tensor.
        used_up: names of source tensors that go into decoding weights.
    """

    model_type: str
    family: Family
    dtype: str
    encoding: str
    encoded: bool
    weights: tuple[Weight, ...]
    carried: tuple[Carried, ...]

    @property
    def linear_names(self) -> list[str]:
        """Full names of all linears, those that are kept too, in the order of storage."""
        return [linear.name for weight in self.weights for linear in weight.linears]

    def expert_index(self) -> dict[str, bool]:
        """Full name of linear to whether it is an expert's."""
        return {linear.name: weight.expert for weight in self.weights for linear in weight.linears}


def take_catalogue(source: SourceDirectory) -> Catalogue:
    """Sorts the tensors of a checkpoint.

    Raises:
        CheckpointError: an encoding that is not served, a scale that is missing, or a fused tensor of experts whose
            orientation neither its shape nor its family tells.
    """
    text = _text_config(source.config)
    model_type = str(text.get("model_type") or source.config.get("model_type") or "")
    family = family_of(str(source.config.get("model_type") or model_type))
    if not family.known:
        family = family_of(model_type)
    dtype = _float_dtype(source)
    refuse_unmerged(list(source.tensors))
    stated = stated_encoding(source.config)
    if stated is None or not is_decoded(stated):
        refuse_stale_config(source.directory, {"quantization_config": stated}, source.tensors)
    encoding = find_encoding(source.config, source.tensors, dtype)
    if stated is None:
        refuse_quantized(source.directory, source.config, source.tensors)
    builder = _Builder(text, family, encoding)
    builder.sort(source.tensors)
    return Catalogue(
        model_type=model_type or "unknown",
        family=family,
        dtype=dtype,
        encoding=encoding.name,
        encoded=any(encoding.encodes(name) for name in source.tensors),
        weights=tuple(builder.weights),
        carried=tuple(builder.carried),
    )


def layer_of(name: str, outside: int) -> int:
    """Number of the layer that a linear lies in by its full name; `outside` for one that lies in none."""
    layer = _LAYER.search(name)
    return outside if layer is None else int(layer[1])


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            return config[key]  # type: ignore[no-any-return]  # JSON carries no types
    return config


def _float_dtype(source: SourceDirectory) -> str:
    for part in (source.config, _text_config(source.config)):
        stated = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
        if stated in FLOATS:
            return stated
    shares: dict[str, int] = {}
    for info in source.tensors.values():
        if info.dtype in FLOATS:
            shares[info.dtype] = shares.get(info.dtype, 0) + info.nbytes
    return max(sorted(shares), key=lambda name: shares[name]) if shares else "bfloat16"


class _Builder:
    def __init__(self, text: Mapping[str, Any], family: Family, encoding: EncodedSource) -> None:
        self._text = text
        self._family = family
        self._encoding = encoding
        self._num_layers = text.get("num_hidden_layers")
        self._tensors: Mapping[str, TensorInfo] = {}
        self.weights: list[Weight] = []
        self.carried: list[Carried] = []

    def sort(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Deals every tensor to an entry."""
        self._tensors = tensors
        for info in tensors.values():
            if info.name in self._encoding.auxiliary:
                continue
            self._sort_one(info)

    def _sort_one(self, info: TensorInfo) -> None:
        fused = _FUSED.match(self._encoding.module_of(info.name))
        bias = _FUSED_BIAS.match(info.name)
        if fused is not None and len(info.shape) >= 3:
            self.weights.extend(self._experts(info, fused["experts"], fused["leaf"]))
        elif bias is not None and len(info.shape) == 2:
            self.carried.extend(self._expert_biases(info, bias["experts"], bias["leaf"]))
        elif self._encoding.encodes(info.name):
            self._add_linear(self._encoding.module_of(info.name), self._encoding.matrix(info.name), encoded=True)
        elif info.name.endswith(".weight") and len(info.shape) == 2 and info.dtype in FLOATS:
            self._add_linear(info.name.removesuffix(".weight"), PlainMatrix(info=info), encoded=False)
        else:
            self.carried.append(Carried(info=info, name=info.name, reason=_why_carried(info)))

    def _add_linear(self, name: str, matrix: StoredMatrix, *, encoded: bool) -> None:
        kept = self._kept(name)
        linears = (LinearRows(name=name, start=0, stop=matrix.shape[0]),)
        expert = ".experts." in name
        self.weights.append(Weight(matrix=matrix, linears=linears, kept=kept, expert=expert, encoded=encoded))

    def _kept(self, name: str) -> str | None:
        layer = _LAYER.search(name)
        if layer is None:
            return kept_reason(name, self._family) or "outside of the decoder layers"
        if (
            isinstance(self._num_layers, int)
            and int(layer[1]) >= self._num_layers
            and "expert" not in name[: layer.start()]
        ):
            return kept_reason(name, self._family) or "multi-token prediction"
        return kept_reason(name, self._family)

    def _experts(self, info: TensorInfo, experts: str, leaf: str) -> Iterator[Weight]:
        """The experts of a fused tensor, one by one."""
        matrices = self._expert_matrices(info, leaf)
        parts = self._parts(leaf)
        for number, matrix in enumerate(matrices):
            rows = matrix.shape[0]
            if rows % len(parts):
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r:.200} {info.shape} does not divide into {' and '.join(parts)}"
                )
            size = rows // len(parts)
            linears = tuple(
                LinearRows(name=f"{experts}.{number}.{part}", start=size * place, stop=size * (place + 1))
                for place, part in enumerate(parts)
            )
            kept = self._kept(f"{experts}.{number}")
            encoded = self._encoding.encodes(info.name)
            yield Weight(matrix=matrix, linears=linears, kept=kept, expert=True, encoded=encoded, fused=info.name)

    def _expert_matrices(self, info: TensorInfo, leaf: str) -> Sequence[StoredMatrix]:
        interleaved = self._family.experts_interleaved and leaf == "gate_up_proj"
        if self._encoding.encodes(info.name):
            return self._encoding.expert_matrices(info.name, interleaved=interleaved)
        if info.dtype not in FLOATS or len(info.shape) != 3:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r:.200} is {info.dtype} {info.shape}, and experts are served in "
                f"{', '.join(FLOATS)} of three dimensions, in FP8 with weight_scale_inv, or in MXFP4"
            )
        if self._by_inputs(info):
            return [TransposedMatrix(info=info, index=i, interleaved=interleaved) for i in range(info.shape[0])]
        return [PlainMatrix(info=info, index=i) for i in range(info.shape[0])]

    def _by_inputs(self, info: TensorInfo) -> bool:
        """Whether fused tensors of experts are (experts, in, out): what reads or gives the hidden size tells.

        Where gate and up have together as many outputs as inputs, the down projection beside them tells.
        """
        hidden = self._text.get("hidden_size")
        stem = info.name.rpartition(".")[0]
        for leaf in ("gate_up_proj", "down_proj", "gate_proj", "up_proj"):
            other = self._tensors.get(f"{stem}.{leaf}")
            if other is None or len(other.shape) != 3:
                continue
            _, first, second = other.shape
            if (first == hidden) != (second == hidden):
                return (first == hidden) == (leaf != "down_proj")
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r:.200} {info.shape} may be (experts, in, out) or (experts, out, in), and "
            f"hidden_size, {hidden!r:.40} in config.json, does not tell: correct config.json, or publish the experts "
            "one by one, as transformers does on save_pretrained"
        )

    def _parts(self, leaf: str) -> tuple[str, ...]:
        gate, up, down = self._family.expert_names
        return {"gate_up_proj": (gate, up), "down_proj": (down,), "gate_proj": (gate,), "up_proj": (up,)}[leaf]

    def _expert_biases(self, info: TensorInfo, experts: str, leaf: str) -> Iterator[Carried]:
        parts = self._parts(leaf)
        count, size = info.shape[0], info.shape[1] // len(parts)
        interleaved = self._family.experts_interleaved and len(parts) > 1
        for number in range(count):
            for place, part in enumerate(parts):
                yield Carried(
                    info=info,
                    name=f"{experts}.{number}.{part}.bias",
                    reason="bias of an expert",
                    expert=number,
                    start=place if interleaved else place * size,
                    step=len(parts) if interleaved else 1,
                    count=size,
                )


def _why_carried(info: TensorInfo) -> str:
    if info.dtype not in FLOATS:
        return f"{info.dtype}, no float"
    if len(info.shape) != 2:
        return {0: "a number", 1: "a vector"}.get(len(info.shape), f"{len(info.shape)} dimensions, no expert")
    return "no weight by its name"


def carried_bytes(entry: Carried) -> int:
    """Bytes of what is published of a carried tensor."""
    if entry.expert is None:
        return entry.info.nbytes
    return entry.count * numpy_dtype(entry.info.dtype).itemsize


def carried_shape(entry: Carried) -> tuple[int, ...]:
    """Shape of what is published of a carried tensor."""
    return entry.info.shape if entry.expert is None else (entry.count,)


def count_values(weights: Sequence[Weight]) -> int:
    """Values of the matrices."""
    return sum(math.prod(weight.matrix.shape) for weight in weights)


__all__ += ["carried_bytes", "carried_shape", "count_values"]
