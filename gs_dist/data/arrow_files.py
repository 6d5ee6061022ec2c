"""Arrow files: where they are and how rows of one column are read from them, a record batch at a time.

Parquet, Arrow IPC files and streams, told apart by their first bytes; on disk or behind a `pyarrow.fs` URI.
Secrets of a URI are in no message.

Formats: https://arrow.apache.org/docs/format/Columnar.html, https://parquet.apache.org/docs/file-format/;
`state.json` of a directory is that of `datasets.Dataset.save_to_disk`.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gs_dist.errors import DatasetError

__all__ = ["ArrowFile", "Rows", "WantedRows", "find_files", "without_secrets"]

Rows = NDArray[np.int64]

_SUFFIXES = (".parquet", ".pq", ".arrow", ".arrows", ".feather", ".ipc")
_MAGIC = {b"PAR1": "Parquet", b"ARRO": "Arrow file", b"\xff\xff\xff\xff": "Arrow stream"}
_PARQUET_BATCH = 1024  # rows


class WantedRows:
    """Rows wanted of one file: from `first` to `stop` - 1 (None: to the end), or ascending `numbers`."""

    def __init__(self, *, first: int = 0, stop: int | None = None, numbers: Rows | None = None) -> None:
        self._first = first
        self._numbers = numbers
        self.stop = stop if numbers is None else int(numbers[-1]) + 1

    def within(self, start: int, count: int) -> Rows:
        """Those of rows `start` to `start + count` - 1 that are wanted."""
        end = start + count
        if self._numbers is None:
            return np.arange(max(start, self._first), end if self.stop is None else min(end, self.stop))
        low, high = np.searchsorted(self._numbers, (start, end))
        return self._numbers[low:high]


class ArrowFile:
    """One Arrow file; its format is told by its first bytes."""

    def __init__(self, filesystem: pafs.FileSystem, path: str, shown: str, secrets: tuple[str, ...]) -> None:
        self._filesystem = filesystem
        self._path = path
        self._shown = shown
        self._secrets = secrets
        self._num_rows: int | None = None

    def __str__(self) -> str:
        return self._shown

    @contextmanager
    def _open(self) -> Iterator[Any]:
        with _as_dataset_error(str(self), self._secrets):
            local = isinstance(self._filesystem, pafs.LocalFileSystem)
            source = pa.memory_map(self._path) if local else self._filesystem.open_input_file(self._path)
            with source:
                yield source

    @cached_property
    def _format(self) -> str:
        with self._open() as source:
            size, start = source.size(), source.read(4)
        if size == 0:
            raise DatasetError(f"{self} is empty (0 bytes)")
        if start not in _MAGIC:
            raise DatasetError(f"{self} is neither Parquet nor an Arrow file or stream: it begins with {start!r}")
        return _MAGIC[start]

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the file."""
        kind = self._format
        with self._open() as source:
            if kind == "Parquet":
                return pq.ParquetFile(source).schema_arrow
            return (ipc.open_file if kind == "Arrow file" else ipc.open_stream)(source).schema

    def column_is_text(self, column: str) -> bool:
        """Whether a column holds text; refuses a missing one, and one that holds neither text nor lists of integers."""
        columns = ", ".join(f"{field.name} ({field.type})" for field in self.schema) or "none"
        count = self.schema.names.count(column)
        if count != 1:
            raise DatasetError(
                f"{self} has {count or 'no'} column {column}; set calibration.column to one of its columns: {columns}"
            )
        kind = self.schema.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value):
            return True
        is_list = (
            pa.types.is_list(kind)
            or pa.types.is_large_list(kind)
            or pa.types.is_fixed_size_list(kind)
            or pa.types.is_list_view(kind)
            or pa.types.is_large_list_view(kind)
        )
        if is_list and pa.types.is_integer(kind.value_type):
            return False
        raise DatasetError(
            f"{self}: column {column} is {kind}, neither text nor lists of integers; set calibration.column to "
            f"another one of its columns: {columns}"
        )

    def count_rows(self, column: str) -> int:
        """Rows of the file; from its metadata where the format has them there."""
        if self._num_rows is None:
            kind = self._format
            with self._open() as source:
                if kind == "Parquet":
                    self._num_rows = int(pq.ParquetFile(source).metadata.num_rows)
                else:
                    self._num_rows = sum(batch.num_rows for batch in self._record_batches(source, column))
        return self._num_rows

    def read(self, column: str, wanted: WantedRows) -> Iterator[tuple[Rows, pa.Array]]:
        """Wanted rows of a column, a record batch at a time, with their numbers in the file."""
        self.column_is_text(column)  # refuses a file that differs from the first
        kind = self._format
        with self._open() as source:
            chunks = self._row_groups(source, column, wanted) if kind == "Parquet" else self._arrays(source, column)
            for start, array in chunks:
                if wanted.stop is not None and start >= wanted.stop:
                    return
                numbers = wanted.within(start, len(array))
                if numbers.size:
                    yield numbers, _taken(array, numbers - start)

    def _arrays(self, source: Any, column: str) -> Iterator[tuple[int, pa.Array]]:
        start = 0
        for batch in self._record_batches(source, column):
            yield start, batch.column(0)
            start += batch.num_rows

    def _record_batches(self, source: Any, column: str) -> Iterator[pa.RecordBatch]:
        options = ipc.IpcReadOptions(included_fields=[self.schema.names.index(column)], use_threads=False)
        if self._format == "Arrow stream":
            yield from ipc.open_stream(source, options=options)
            return
        reader = ipc.open_file(source, options=options)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))

    def _row_groups(self, source: Any, column: str, wanted: WantedRows) -> Iterator[tuple[int, pa.Array]]:
        # A buffer and no pre-buffering: pages are read as they are needed, not a whole column chunk.
        file = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
        start = 0
        for group in range(file.num_row_groups):
            count, at = file.metadata.row_group(group).num_rows, start
            start += count
            if wanted.within(at, count).size == 0:
                continue
            for batch in file.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=[column], use_threads=False):
                yield at, batch.column(0)
                at += batch.num_rows


@contextmanager
def _as_dataset_error(name: str, secrets: tuple[str, ...]) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        for secret in secrets:
            reason = reason.replace(secret, "***")
        raise DatasetError(f"{name} cannot be read: {reason}") from None  # the cause may hold a URI's secrets


def without_secrets(entry: str) -> str:
    """A path or URI as it may be shown: no user, no password, no query."""
    return re.sub(r"://.*@", "://***@", entry).split("?")[0] if "://" in entry else entry


def _secrets(entry: str) -> tuple[str, ...]:
    """Parts of a URI that must not be printed, the longest first: user, password and the query's values."""
    user = re.search(r"://(.*)@", entry)
    texts = [user[1], *user[1].split(":")] if user else []
    query = entry.partition("?")[2]
    texts += [query, *(part.partition("=")[2] for part in query.split("&"))]
    texts += [unquote(text) for text in texts]
    return tuple(sorted({text for text in texts if text}, key=len, reverse=True)) if "://" in entry else ()


def find_files(data: Iterable[str]) -> list[ArrowFile]:
    """Files of entries that are files, directories, glob patterns or URIs, in the order of the entries.

    Raises:
        DatasetError: an entry without a file, a place that cannot be reached, a file named twice.
    """
    files: dict[str, ArrowFile] = {}
    for entry in data:
        name, secrets = without_secrets(entry), _secrets(entry)
        with _as_dataset_error(name, secrets):
            filesystem, path, scheme = _locate(entry)
            paths = list(_expand(filesystem, path))
        if not paths:
            raise DatasetError(
                f"calibration.data: nothing at {name}; name Parquet or Arrow files, or a directory of them"
            )
        for found in paths:
            file = ArrowFile(filesystem, found, scheme + found, secrets)
            if str(file) in files:
                raise DatasetError(f"calibration.data: {file} is named twice; its samples would count double")
            files[str(file)] = file
    return list(files.values())


def _locate(entry: str) -> tuple[pafs.FileSystem, str, str]:
    """File system, path within it (a glob pattern perhaps) and what to show before a path."""
    if "://" not in entry:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(entry)), ""
    scheme = entry.partition("://")[0] + "://"
    plain = re.fullmatch(r"([^?*]*/)([^?]*\*[^?]*)(\?.*)?", entry)  # in a URI only * is a wildcard: ? starts its query
    uri, pattern = (plain[1] + (plain[3] or ""), "/" + plain[2]) if plain else (entry, "")
    filesystem, path = pafs.FileSystem.from_uri(uri)
    return filesystem, path.rstrip("/") + pattern, scheme


def _expand(filesystem: pafs.FileSystem, path: str) -> Iterator[str]:
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.File:
        yield path
    elif kind == pafs.FileType.Directory:
        yield from _files_of_directory(filesystem, path)
    elif any(sign in path for sign in "*?["):
        parts = path.split("/")
        fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
        for match in _matches(filesystem, "/".join(parts[:fixed]), parts[fixed:]):
            yield from _expand(filesystem, match)


def _matches(filesystem: pafs.FileSystem, base: str, parts: list[str]) -> Iterator[str]:
    if not parts:
        yield base
        return
    head, rest = parts[0], parts[1:]
    if not any(sign in head for sign in "*?["):
        path = f"{base}/{head}"
        if rest or filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            yield from _matches(filesystem, path, rest)
        return
    if head == "**":
        yield from _matches(filesystem, base, rest)
    listing = filesystem.get_file_info(pafs.FileSelector(base or "/", allow_not_found=True))
    for info in sorted(listing, key=lambda info: info.path):
        is_directory = info.type == pafs.FileType.Directory
        if head == "**" and is_directory:
            yield from _matches(filesystem, info.path, parts)
        elif head != "**" and (is_directory or not rest) and fnmatch.fnmatchcase(info.base_name, head):
            yield from _matches(filesystem, info.path, rest)


def _files_of_directory(filesystem: pafs.FileSystem, path: str) -> Iterator[str]:
    listing = sorted(filesystem.get_file_info(pafs.FileSelector(path, recursive=True)), key=lambda info: info.path)
    names = {info.path.removeprefix(path).lstrip("/"): info for info in listing if info.type == pafs.FileType.File}
    if "state.json" in names:
        yield from _saved_dataset(filesystem, path, set(names))
        return
    if "dataset_dict.json" in names:
        splits = sorted(name.removesuffix("/state.json") for name in names if name.endswith("/state.json"))
        raise DatasetError(f"{path} holds several splits; name one of them in calibration.data: {', '.join(splits)}")
    visible = [name for name in names if not any(part[0] in "._" for part in name.split("/"))]
    known = [name for name in visible if name.endswith(_SUFFIXES)]
    yield from (names[name].path for name in known or visible)


def _saved_dataset(filesystem: pafs.FileSystem, path: str, names: set[str]) -> Iterator[str]:
    """Files of a directory written by `datasets.Dataset.save_to_disk`, in the order of its state.json."""
    try:
        with filesystem.open_input_file(f"{path}/state.json") as file:
            listed = [entry["filename"] for entry in json.loads(file.read())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path}/state.json is not that of a saved dataset: {error!r}") from None
    for name in listed:
        if name not in names:
            raise DatasetError(f"{path}/state.json lists {name}, which is not in the directory; copy it there")
        yield f"{path}/{name}"


def _taken(array: pa.Array, places: Rows) -> pa.Array:
    """The values at ascending places, checked first: a damaged file's offsets would lead anywhere in memory."""
    part = array.slice(int(places[0]), int(places[-1] - places[0]) + 1)
    part.validate(full=True)
    return part if len(part) == places.size else part.take(pa.array(places - places[0]))
