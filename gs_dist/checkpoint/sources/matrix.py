"""A weight as it is stored, read as float32 rows: the interface of all encodings, and plain floats.

A matrix says what it is in plain data, so that it can be planned with and sent to another process; `open` gives what
reads it, a block of rows at a time and each byte once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import DTYPES, SPELLINGS, TensorInfo
from gs_dist.checkpoint.sources.directory import TensorBytes

__all__ = ["Float32", "PlainMatrix", "RowReader", "RowsOfMatrix", "StoredMatrix", "TransposedMatrix", "numpy_dtype"]

Float32 = npt.NDArray[np.float32]


class RowReader(Protocol):
    """Reads a matrix that was opened."""

    def read(self, start: int, target: Float32) -> None:
        """Fills `target` (n, columns) with the rows from `start` on."""


class StoredMatrix(Protocol):
    """A weight (rows, columns) in a checkpoint.

    Attributes:
        shape: rows (outputs) and columns (inputs).
        tensors: the tensors that it uses up, as the headers describe them.
        nbytes: what is read for it.
        working_bytes: what a reader of it holds beside the rows that it fills.
        float_dtype: dtype in which the weight is published where it stays in floats.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def tensors(self) -> Sequence[TensorInfo]:
        """What it uses up."""

    @property
    def nbytes(self) -> int:
        """What is read for it."""

    @property
    def working_bytes(self) -> int:
        """What a reader holds."""

    @property
    def float_dtype(self) -> str:
        """As floats."""

    def open(self, files: TensorBytes, block_rows: int) -> RowReader:
        """What reads it, at most `block_rows` rows at a time."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy dtype by `TensorInfo.dtype`."""
    return DTYPES[SPELLINGS[name]]


@dataclass(frozen=True, kw_only=True)
class _FloatMatrix(ABC):
    """Floats of one tensor: all of it, or expert `index`."""

    info: TensorInfo
    index: int = 0

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The one tensor."""
        return (self.info,)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.shape[0] * self.shape[1] * numpy_dtype(self.info.dtype).itemsize

    @property
    def float_dtype(self) -> str:
        """The tensor's own."""
        return self.info.dtype


@dataclass(frozen=True, kw_only=True)
class PlainMatrix(_FloatMatrix):
    """Floats, rows of outputs: a whole tensor (out, in), or expert `index` of a tensor (experts, out, in)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.info.shape[-2], self.info.shape[-1]

    @property
    def working_bytes(self) -> int:
        """None beside the block."""
        return 0

    def open(self, files: TensorBytes, block_rows: int) -> RowReader:
        """Reads blocks of rows one after the other."""
        return _PlainReader(self, files, block_rows)


class _PlainReader:
    def __init__(self, matrix: PlainMatrix, files: TensorBytes, block_rows: int) -> None:
        self._matrix = matrix
        self._files = files
        self._dtype = numpy_dtype(matrix.info.dtype)
        self._raw = np.empty((block_rows, matrix.shape[1]), dtype=self._dtype)

    def read(self, start: int, target: Float32) -> None:
        matrix, count = self._matrix, len(target)
        row_bytes = matrix.shape[1] * self._dtype.itemsize
        begin = matrix.index * matrix.nbytes + start * row_bytes
        if self._dtype == np.float32:
            self._files.read_into(matrix.info, begin, target)
            return
        raw = self._raw[:count]
        self._files.read_into(matrix.info, begin, raw)
        np.copyto(target, raw)


@dataclass(frozen=True, kw_only=True)
class TransposedMatrix(_FloatMatrix):
    """Floats, rows of inputs: expert `index` of a tensor (experts, in, out), read whole and handed out by outputs.

    `interleaved`: outputs 0, 2, 4 ... come first and 1, 3, 5 ... then, as gpt-oss keeps gate and up.
    """

    interleaved: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.info.shape[-1], self.info.shape[-2]

    @property
    def working_bytes(self) -> int:
        """The matrix as it is stored."""
        return self.nbytes

    def open(self, files: TensorBytes, block_rows: int) -> RowReader:
        """Reads the matrix."""
        rows, columns = self.shape
        raw = np.empty((columns, rows), dtype=numpy_dtype(self.info.dtype))
        files.read_into(self.info, self.index * self.nbytes, raw)
        return _HeldRows(_outputs_in_order(raw.T, interleaved=self.interleaved))


class _HeldRows:
    def __init__(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        self._parts = parts

    def read(self, start: int, target: Float32) -> None:
        done = 0
        for part in self._parts:
            begin = start + done
            if begin < len(part) and done < len(target):
                count = min(len(part) - begin, len(target) - done)
                np.copyto(target[done : done + count], part[begin : begin + count])
                done += count
            start -= len(part)


def _outputs_in_order(rows: npt.NDArray[Any], *, interleaved: bool) -> tuple[npt.NDArray[Any], ...]:
    return (rows[0::2], rows[1::2]) if interleaved else (rows,)


@dataclass(frozen=True, kw_only=True)
class RowsOfMatrix:
    """Rows [start, start + rows) of a matrix: the gate, or the up, of an expert whose two are one."""

    matrix: StoredMatrix
    start: int
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, in)."""
        return self.rows, self.matrix.shape[1]

    @property
    def tensors(self) -> Sequence[TensorInfo]:
        """Those of the matrix."""
        return self.matrix.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, rounded up."""
        return -(-self.matrix.nbytes * self.rows // self.matrix.shape[0])

    @property
    def working_bytes(self) -> int:
        """As of the matrix."""
        return self.matrix.working_bytes

    @property
    def float_dtype(self) -> str:
        """As of the matrix."""
        return self.matrix.float_dtype

    def open(self, files: TensorBytes, block_rows: int) -> RowReader:
        """Reads what the matrix reads, from the first of the rows on."""
        return _ShiftedRows(self.matrix.open(files, block_rows), self.start)


class _ShiftedRows:
    def __init__(self, reader: RowReader, start: int) -> None:
        self._reader = reader
        self._start = start

    def read(self, start: int, target: Float32) -> None:
        self._reader.read(self._start + start, target)
