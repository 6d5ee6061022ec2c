"""The work, cut into parts: a part is a file of the result in every format, and what of the source goes into it.

How the work is cut depends on the checkpoint alone, so that the files are the same however many workers share them. A
part follows the source's order on storage; each is read from one end to the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gs_dist.checkpoint.header import TensorInfo
from gs_dist.checkpoint.sources.catalogue import Carried, Catalogue, LinearRows, Weight, carried_shape
from gs_dist.checkpoint.sources.matrix import numpy_dtype
from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.conversion.assignment import Assignment, encoding_of
from gs_dist.conversion.dialects.base import LinearShape
from gs_dist.conversion.schemes import FLOAT, Scheme

__all__ = ["Part", "Piece", "block_rows", "cut", "labels_of", "piece_tensors", "working_bytes"]

BLOCK_VALUES = 1 << 17  # of a weight that are worked on at a time: what a core's second cache holds beside temporaries
SMALLEST_PART = 32 << 20  # bytes of a part's file; smaller ones cost more in files than they gain in sharing
LARGEST_PART = 1 << 30  # what is lost at most with a worker
PARTS_AT_LEAST = 64  # that a model is cut into where parts are not too small then, for workers to share
_HASHED = 4 << 20  # bytes of a file held while it is hashed


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A weight with the scheme of each of its linears (None: published in floats), or a tensor carried over."""

    weight: Weight | None = None
    schemes: tuple[Scheme | None, ...] = ()
    carried: Carried | None = None

    @property
    def source(self) -> tuple[TensorInfo, ...]:
        """The tensors that it uses up, or a part of."""
        if self.weight is not None:
            return tuple(self.weight.matrix.tensors)
        assert self.carried is not None
        return (self.carried.info,)

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        if self.weight is not None:
            return self.weight.matrix.nbytes
        assert self.carried is not None
        return _carried_bytes(self.carried)

    def linears(self) -> Iterator[tuple[LinearRows, Scheme | None]]:
        """Its linears with their schemes."""
        if self.weight is not None:
            yield from zip(self.weight.linears, self.schemes, strict=True)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file of the result.

    Attributes:
        number: from 1.
        file: the file's name, the same in every format.
        pieces: what goes into it, in the order in which it is read.
    """

    number: int
    file: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(piece.nbytes for piece in self.pieces)

    def tensors(self, dialect: str, dtype: str) -> dict[str, StoredTensor]:
        """Full name to form of everything that its file holds."""
        return {name: stored for piece in self.pieces for name, stored in piece_tensors(piece, dialect, dtype).items()}


def cut(catalogue: Catalogue, assignment: Assignment, formats: Sequence[str]) -> tuple[Part, ...]:
    """The parts of a conversion."""
    pieces = _pieces(catalogue, assignment)
    sizes = [max(_written(piece, name, catalogue.dtype) for name in formats) for piece in pieces]
    limit = min(LARGEST_PART, max(SMALLEST_PART, sum(sizes) // PARTS_AT_LEAST))
    groups: list[list[Piece]] = []
    room = 0
    for piece, size in zip(pieces, sizes, strict=True):
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(piece)
        room -= size
    return tuple(
        Part(number=number, file=f"model-{number:05d}-of-{len(groups):05d}.safetensors", pieces=tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def _pieces(catalogue: Catalogue, assignment: Assignment) -> list[Piece]:
    """Everything in the order in which it lies on storage."""
    found: list[Piece] = []
    whole: set[str] = set()
    for weight in catalogue.weights:
        schemes = tuple(assignment.schemes[linear.name] for linear in weight.linears)
        if any(schemes) or weight.encoded:
            found.append(Piece(weight=weight, schemes=schemes))
            continue
        info = weight.matrix.tensors[0]
        if info.name not in whole:  # a fused tensor of experts stays what it is
            whole.add(info.name)
            reason = assignment.kept.get(weight.linears[0].name, "stays in floats")
            found.append(Piece(carried=Carried(info=info, name=info.name, reason=reason)))
    found += [Piece(carried=carried) for carried in _carried(catalogue, whole)]
    return sorted(found, key=_place)


def _carried(catalogue: Catalogue, whole: set[str]) -> Iterator[Carried]:
    """Biases of experts stay in one tensor where the experts' weights do."""
    done: set[str] = set()
    for carried in catalogue.carried:
        weights = carried.info.name.removesuffix("_bias")
        if carried.expert is None or weights not in whole:
            yield carried
        elif carried.info.name not in done:
            done.add(carried.info.name)
            yield Carried(info=carried.info, name=carried.info.name, reason=carried.reason)


def _place(piece: Piece) -> tuple[str, int, int, int]:
    info = piece.source[0]
    index = getattr(piece.weight.matrix, "index", 0) if piece.weight is not None else 0
    carried = piece.carried
    row = (carried.expert or 0, carried.start) if carried is not None else (index, 0)
    return (info.file, info.offset, *row)


def _carried_bytes(carried: Carried) -> int:
    shape = carried_shape(carried)
    return StoredTensor(dtype=carried.info.dtype, shape=shape).nbytes


def _written(piece: Piece, dialect: str, dtype: str) -> int:
    return sum(stored.nbytes for stored in piece_tensors(piece, dialect, dtype).values())


def piece_tensors(piece: Piece, dialect: str, dtype: str) -> dict[str, StoredTensor]:
    """Full name to form of what is written for a piece in a dialect."""
    if piece.carried is not None:
        stored = StoredTensor(dtype=piece.carried.info.dtype, shape=carried_shape(piece.carried))
        return {piece.carried.name: stored}
    assert piece.weight is not None
    found = {}
    for linear, scheme in piece.linears():
        if scheme is None:
            form = StoredTensor(dtype=piece.weight.matrix.float_dtype, shape=(linear.rows, piece.weight.columns))
            found[f"{linear.name}.weight"] = form
            continue
        encoding = encoding_of(dialect, scheme, expert=piece.weight.expert)
        shape = LinearShape(name=linear.name, rows=linear.rows, columns=piece.weight.columns, dtype=dtype)
        found |= {f"{linear.name}.{leaf}": stored for leaf, stored in encoding.tensors(shape).items()}
    return found


def labels_of(parts: Sequence[Part], dialect: str, dtype: str) -> dict[str, str]:
    """Full name of every tensor that a dialect holds to its label: its linear's scheme, or FLOAT."""
    labels = {}
    for part in parts:
        for piece in part.pieces:
            of_linear = {linear.name: scheme.name for linear, scheme in piece.linears() if scheme is not None}
            for name in piece_tensors(piece, dialect, dtype):
                labels[name] = of_linear.get(name.rpartition(".")[0], FLOAT)
    return labels


def block_rows(columns: int, row_step: int) -> int:
    """Rows of a weight that are worked on at a time: a multiple of `row_step`."""
    return max(row_step, BLOCK_VALUES // columns // row_step * row_step)


def working_bytes(piece: Piece, formats: Sequence[str]) -> int:
    """What a worker holds at most while it works on a piece, beside itself."""
    if piece.weight is None:
        return _HASHED
    matrix = piece.weight.matrix
    raw = max(numpy_dtype(info.dtype).itemsize for info in matrix.tensors[:1])
    most = 0
    for linear, scheme in piece.linears():
        step = row_step(piece, scheme, formats)
        values = min(block_rows(matrix.shape[1], step), max(linear.rows, 1)) * matrix.shape[1]
        held = scheme.weights.bytes_per_value if scheme is not None else 4
        # A block as it is stored and twice as float32, a temporary of either, what is encoded for one format.
        most = max(most, values * (2 * raw + 3 * 4 + held + 2))
    return max(_HASHED, most + matrix.working_bytes)


def row_step(piece: Piece, scheme: Scheme | None, formats: Sequence[str]) -> int:
    """Rows that format and dialects take together."""
    if scheme is None or piece.weight is None:
        return 1
    steps = [encoding_of(name, scheme, expert=piece.weight.expert).row_step for name in formats]
    return max(scheme.weights.row_step, *steps)  # powers of two


def by_linear(parts: Sequence[Part]) -> Mapping[str, tuple[Piece, Scheme | None]]:
    """Full name of linear to the piece it is of and its scheme."""
    return {
        linear.name: (piece, scheme) for part in parts for piece in part.pieces for linear, scheme in piece.linears()
    }


__all__ += ["by_linear", "row_step"]
