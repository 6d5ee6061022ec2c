"""Streams a part: every byte of its source read once, in order, rounded a block of rows at a time, written once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gs_dist.checkpoint.finite import not_finite
from gs_dist.checkpoint.part_manifest import PartManifest, read_part, write_part
from gs_dist.checkpoint.shard_records import record_faults
from gs_dist.checkpoint.shard_stream import ShardStream, stream_safetensors
from gs_dist.checkpoint.sources.catalogue import Carried, LinearRows, Weight
from gs_dist.checkpoint.sources.directory import FileStamp, TensorBytes
from gs_dist.checkpoint.sources.matrix import numpy_dtype
from gs_dist.conversion.assignment import encoding_of
from gs_dist.conversion.dialects.base import LinearShape
from gs_dist.conversion.parts import Part, Piece, block_rows, row_step
from gs_dist.conversion.rows import row_of
from gs_dist.conversion.schemes import Scheme
from gs_dist.errors import CheckpointError, DamagedError
from gs_dist.model.dtypes import FLOATS
from gs_dist.results.quantized import Float32, LinearSummary
from gs_dist.solvers.weight_loss import WeightLoss
from gs_dist.solvers.weight_rounding import RoundedRows

__all__ = ["ConversionTask", "convert_part"]

_COPIED = 1 << 20  # bytes of a tensor that is carried over, at a time


@dataclass(frozen=True, kw_only=True)
class ConversionTask:
    """What all parts of a conversion have in common; what a worker needs beside the part.

    Attributes:
        model: the source directory.
        files: its safetensors files, as they were when it was opened.
        output: the job's directory.
        formats: dialects that are written.
        dtype: of floats and scales.
        fingerprints: of recipe and source.
        made_with: package to version.
    """

    model: Path
    files: Mapping[str, FileStamp]
    output: Path
    formats: tuple[str, ...]
    dtype: str
    fingerprints: Mapping[str, str]
    made_with: Mapping[str, str]


def convert_part(task: ConversionTask, part: Part) -> PartManifest:
    """Writes a part's file in every format and then its manifest; one that is there and sound is left as it is.

    Raises:
        CheckpointError: the source is damaged or changed, or holds a value that is not finite.
        OutputError: the disk is full, or the directory cannot be written.
    """
    finished = _finished(task, part)
    if finished is not None:
        return finished
    rows: list[LinearSummary] = []
    with ExitStack() as stack:
        files = stack.enter_context(TensorBytes(task.model, task.files))
        streams = {
            name: stack.enter_context(
                stream_safetensors(task.output / name / part.file, part.tensors(name, task.dtype))
            )
            for name in task.formats
        }
        for piece in part.pieces:
            rows += _Streaming(task, files, streams).write(piece)
    manifest = PartManifest(
        number=part.number,
        shards={name: stream.record for name, stream in streams.items()},
        fingerprints=task.fingerprints,
        made_with=task.made_with,
        rows=tuple(rows),
    )
    write_part(task.output, manifest)
    return manifest


def _finished(task: ConversionTask, part: Part) -> PartManifest | None:
    """The manifest of a part whose files are sound; a damaged one vouches for nothing."""
    try:
        manifest = read_part(task.output, part.number)
    except DamagedError:
        return None
    if manifest is None or not manifest.is_of(task.fingerprints, task.formats):
        return None
    return None if record_faults(task.output, manifest.shards) else manifest


class _Streaming:
    def __init__(self, task: ConversionTask, files: TensorBytes, streams: Mapping[str, ShardStream]) -> None:
        self._task = task
        self._files = files
        self._streams = streams

    def write(self, piece: Piece) -> list[LinearSummary]:
        """Reads a piece and writes it in every format; rows of what was quantised."""
        if piece.carried is not None:
            self._carry(piece.carried)
            return []
        assert piece.weight is not None
        step = max(row_step(piece, scheme, self._task.formats) for scheme in piece.schemes)
        size = min(block_rows(piece.weight.columns, step), piece.weight.matrix.shape[0])
        reader = piece.weight.matrix.open(self._files, size)
        block = np.empty((size, piece.weight.columns), dtype=np.float32)
        rows = []
        for linear, scheme in piece.linears():
            rounding = (
                None if scheme is None else _Rounding(self._task, self._streams, piece.weight, linear, scheme, size)
            )
            for start in range(linear.start, linear.stop, size):
                values = block[: min(size, linear.stop - start)]
                reader.read(start, values)
                if rounding is None:
                    self._write_floats(piece.weight, linear, values)
                else:
                    rounding.write(values)
            if rounding is not None:
                rows.append(rounding.row())
        return rows

    def _write_floats(self, weight: Weight, linear: LinearRows, values: Float32) -> None:
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{weight.matrix.tensors[0].file}: {linear.name}: a value is not finite: the weight is damaged; "
                "download the file again, or mend the value"
            )
        cast = values.astype(numpy_dtype(weight.matrix.float_dtype))
        for stream in self._streams.values():
            stream.append(f"{linear.name}.weight", cast)

    def _carry(self, carried: Carried) -> None:
        info = carried.info
        if carried.expert is not None:
            row = np.empty(info.shape[1], dtype=numpy_dtype(info.dtype))
            self._files.read_into(info, carried.expert * row.nbytes, row)
            values = row[carried.start :: carried.step][: carried.count]
            self._refuse_damaged(carried, values)
            for stream in self._streams.values():
                stream.append(carried.name, values)
            return
        chunk = np.empty(min(_COPIED, info.nbytes), dtype=np.uint8)
        for begin in range(0, info.nbytes, _COPIED):
            piece = chunk[: min(_COPIED, info.nbytes - begin)]
            self._files.read_into(info, begin, piece)
            if info.dtype in FLOATS:
                self._refuse_damaged(carried, piece.view(numpy_dtype(info.dtype)))
            for stream in self._streams.values():
                stream.append_bytes(carried.name, piece)

    def _refuse_damaged(self, carried: Carried, values: np.ndarray) -> None:  # type: ignore[type-arg]
        """Refuses NaN, and in what linears and norms multiply by, infinities; masks are made of these."""
        bad = not_finite(values)
        if not bad.any():
            return
        if carried.name.endswith((".weight", ".bias")) or np.isnan(values[bad].astype(np.float32)).any():
            raise CheckpointError(
                f"{carried.info.file}: tensor {carried.info.name!r:.200} holds {values[int(np.argmax(bad))]}: the "
                "checkpoint is damaged; download the file again, or mend the value"
            )


class _Rounding:
    """Rounds a linear's blocks and writes them in every format."""

    def __init__(
        self,
        task: ConversionTask,
        streams: Mapping[str, ShardStream],
        weight: Weight,
        linear: LinearRows,
        scheme: Scheme,
        size: int,
    ) -> None:
        self._streams = streams
        self._where = f"{weight.matrix.tensors[0].file}: {linear.name}"
        self._shape = LinearShape(name=linear.name, rows=linear.rows, columns=weight.columns, dtype=task.dtype)
        self._encodings = {name: encoding_of(name, scheme, expert=weight.expert) for name in streams}
        self._scheme = scheme
        self._loss = WeightLoss(size, weight.columns)
        self._rounder = scheme.weights.rounder(
            size, weight.columns, scale_dtype(scheme, task.formats, task.dtype, weight)
        )
        for name, encoding in self._encodings.items():
            for leaf, values in encoding.constants(self._shape).items():
                streams[name].append(f"{linear.name}.{leaf}", values)

    def row(self) -> LinearSummary:
        """The linear's row of the summary, once all its blocks were written."""
        return row_of(self._shape.name, self._scheme, self._loss)

    def write(self, block: Float32) -> None:
        self._loss.keep(block)
        rounded = self._round(block)
        for name, encoding in self._encodings.items():
            for leaf, values in encoding.encode(self._shape, rounded).items():
                self._streams[name].append(f"{self._shape.name}.{leaf}", values)
        self._scheme.weights.restore(rounded, block)
        self._loss.add(block, rounded)

    def _round(self, block: Float32) -> RoundedRows:
        try:
            return self._rounder.round(block)
        except ValueError as error:
            raise CheckpointError(
                f"{self._where}: {error}: the weight is damaged; download the file again, or mend the value"
            ) from None


def scale_dtype(scheme: Scheme, formats: Sequence[str], dtype: str, weight: Weight) -> str:
    """The dtype that scales are rounded to: the model's, or float32 where a dialect stores that."""
    stored = {
        encoding_of(name, scheme, expert=weight.expert)
        .tensors(LinearShape(name="", rows=2, columns=16 * 128, dtype=dtype))["weight_scale"]
        .dtype
        for name in formats
    }
    return "float32" if stored == {"float32"} else dtype  # exponents of two in a byte need no rounding
