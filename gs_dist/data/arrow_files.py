"""Parquet and Arrow IPC, files and streams.

Formats: https://arrow.apache.org/docs/format/Columnar.html, https://parquet.apache.org/docs/file-format/.
"""

from __future__ import annotations

import mmap
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from gs_dist.data.data_file import DataFile
from gs_dist.data.rows import FieldPath, Rows, WantedRows, field_of, plain, taken

__all__ = ["ArrowFile", "ArrowStream", "ParquetFile"]

_BATCH = 1024  # rows


class _BatchFile(DataFile):
    """A file that gives record batches."""

    @abstractmethod
    def _batches(self, columns: Sequence[str], wanted: WantedRows) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches that hold these columns at least, with the number of their first row."""

    def read(self, paths: Sequence[FieldPath], wanted: WantedRows) -> Iterator[tuple[Rows, list[pa.Array]]]:
        """As in `DataFile`; what a batch holds is checked, since a damaged file's offsets lead anywhere in memory."""
        columns = list(dict.fromkeys(path[0] for path in paths))
        with self.location.errors_named():
            for start, batch in self._batches(columns, wanted):
                if wanted.stop is not None and start >= wanted.stop:
                    return
                numbers = wanted.within(start, batch.num_rows)
                if numbers.size == 0:
                    continue
                first, last = int(numbers[0]) - start, int(numbers[-1]) - start
                # By its place: a batch may hold other columns too.
                sound = {name: batch.column(batch.schema.names.index(name)) for name in columns}
                sound = {name: array.slice(first, last - first + 1) for name, array in sound.items()}
                for array in sound.values():
                    array.validate(full=True)
                places = numbers - numbers[0]
                yield numbers, [plain(field_of(taken(sound[path[0]], places), path[1:])) for path in paths]


class ParquetFile(_BatchFile):
    """Pages are read as they are needed, through a buffer: neither a column chunk nor a mapping of it is held."""

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        with self.location.open() as source:
            yield pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)

    def _schema(self) -> pa.Schema:
        with self._opened() as file:
            return file.schema_arrow

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        with self.location.errors_named(), self._opened() as file:
            return file.metadata

    def count_rows(self) -> int:
        """As in `DataFile`."""
        return int(self._metadata.num_rows)

    def surely_without_nulls(self, paths: Sequence[FieldPath]) -> bool:
        """As in `DataFile`; a null or empty list counts as a null of what the list holds."""
        wanted = tuple(".".join(path) for path in paths)
        for group in range(self._metadata.num_row_groups):
            columns = self._metadata.row_group(group)
            for index in range(columns.num_columns):
                column = columns.column(index)
                if f"{column.path_in_schema}.".startswith(tuple(f"{path}." for path in wanted)):
                    statistics = column.statistics
                    if statistics is None or not statistics.has_null_count or statistics.null_count:
                        return False
        return True

    def _batches(self, columns: Sequence[str], wanted: WantedRows) -> Iterator[tuple[int, pa.RecordBatch]]:
        with self._opened() as file:
            start = 0
            for group in range(file.num_row_groups):
                count, at = file.metadata.row_group(group).num_rows, start
                start += count
                if wanted.within(at, count).size == 0:
                    continue
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=list(columns), use_threads=False):
                    yield at, batch
                    at += batch.num_rows


class _IpcFile(_BatchFile):
    """Batches of a local file are views of it, unless it is compressed."""

    @contextmanager
    def _source(self) -> Iterator[tuple[Any, mmap.mmap | None]]:
        if not isinstance(self.location.filesystem, pafs.LocalFileSystem):
            with self.location.open() as source:
                yield source, None
            return
        with open(self.location.path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield pa.BufferReader(pa.py_buffer(mapping)), mapping

    def _schema(self) -> pa.Schema:
        with self._source() as (source, _):
            return self._reader(source, None).schema

    @cached_property
    def _num_rows(self) -> int:
        return sum(batch.num_rows for _, batch in self._batches([], WantedRows()))

    def count_rows(self) -> int:
        """As in `DataFile`."""
        with self.location.errors_named():
            return self._num_rows

    def _batches(self, columns: Sequence[str], wanted: WantedRows) -> Iterator[tuple[int, pa.RecordBatch]]:
        with self._source() as (source, mapping):
            # A batch without columns has no rows, so the first one stands in where none is asked for.
            indices = [self.schema.names.index(name) for name in columns] or ([0] if len(self.schema) else [])
            some = ipc.IpcReadOptions(included_fields=sorted(indices), use_threads=False)
            start = 0
            for batch in self._all(self._reader(source, None if self._views_only(source, mapping) else some)):
                for at in range(0, batch.num_rows, _BATCH):  # polars writes whole files as one batch
                    yield start + at, batch.slice(at, _BATCH)
                    if mapping is not None:
                        mapping.madvise(mmap.MADV_DONTNEED)  # what was read of it counts as this process's memory
                start += batch.num_rows

    def _views_only(self, source: Any, mapping: mmap.mmap | None) -> bool:
        """Whether all columns are to be asked for, since that costs nothing, and asking for some does."""
        return False

    @abstractmethod
    def _reader(self, source: Any, options: ipc.IpcReadOptions | None) -> Any: ...

    @abstractmethod
    def _all(self, reader: Any) -> Iterator[pa.RecordBatch]: ...


class ArrowFile(_IpcFile):
    """The form with a footer, that pyarrow's `new_file` and feather write."""

    def _reader(self, source: Any, options: ipc.IpcReadOptions | None) -> Any:
        return ipc.open_file(source, options=options)

    def _views_only(self, source: Any, mapping: mmap.mmap | None) -> bool:
        """Of this form Arrow copies columns that are asked for, and gives views where all are (unless compressed)."""
        if mapping is None:
            return False
        reader = ipc.open_file(source, options=ipc.IpcReadOptions(use_threads=False))
        if reader.num_record_batches == 0:
            return False
        whole = pa.py_buffer(mapping)
        buffers = [found for column in reader.get_batch(0).columns for found in column.buffers() if found is not None]
        return all(whole.address <= found.address < whole.address + whole.size for found in buffers if found.size)

    def _all(self, reader: Any) -> Iterator[pa.RecordBatch]:
        return (reader.get_batch(index) for index in range(reader.num_record_batches))


class ArrowStream(_IpcFile):
    """The form without a footer, that datasets' `save_to_disk` writes."""

    def _reader(self, source: Any, options: ipc.IpcReadOptions | None) -> Any:
        return ipc.open_stream(source, options=options)

    def _all(self, reader: Any) -> Iterator[pa.RecordBatch]:
        return iter(reader)
