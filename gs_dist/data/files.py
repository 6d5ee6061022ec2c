"""Tells a file's format, by its first bytes and, where text has none of its own, by its suffix."""

from __future__ import annotations

import json
import os

from gs_dist.data.arrow_files import ArrowFile, ArrowStream, ParquetFile
from gs_dist.data.data_file import DataFile
from gs_dist.data.json_files import JsonFile, JsonLinesFile
from gs_dist.data.locations import ARROW_SUFFIXES, Location
from gs_dist.data.text_files import CsvFile, SampleBy, TextFile
from gs_dist.errors import DatasetError

__all__ = ["is_lfs_pointer", "open_file"]

_MAGIC: dict[bytes, type[ParquetFile | ArrowFile | ArrowStream]] = {
    b"PAR1": ParquetFile,
    b"ARRO": ArrowFile,
    b"\xff\xff\xff\xff": ArrowStream,
}
_LFS = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file is what Git leaves where `git lfs pull` has not fetched the file itself."""
    return beginning.startswith(_LFS)


def open_file(location: Location, *, sample_by: SampleBy) -> DataFile:
    """The file in its format; nothing but its beginning is read.

    Args:
        location: where it is.
        sample_by: what a row of plain text is.

    Raises:
        DatasetError: it cannot be read, is empty, or of no known format.
    """
    start = location.beginning
    packed = location.compression is not None
    if is_lfs_pointer(start):
        raise DatasetError(f"{location} is a Git LFS pointer and not the data: run `git lfs pull` where it lies")
    kinds: dict[bytes, type[ParquetFile | ArrowFile | ArrowStream]] = {
        b"PAR1": ParquetFile,
        b"ARRO": ArrowFile,
        b"\xff\xff\xff\xff": ArrowStream,
    }
    binary = kinds.get(start[:4])
    if binary is not None:
        if packed:
            raise DatasetError(f"{location} is {location.compression} around an Arrow or Parquet file: unpack it")
        return binary(location)
    name, suffix = os.path.splitext(str(location).lower())
    suffix = os.path.splitext(name)[1] if packed else suffix
    if suffix in (".csv", ".tsv"):
        return CsvFile(location, "\t" if suffix == ".tsv" else ",")
    if suffix in (".txt", ".text", ".md"):
        return TextFile(location, sample_by)
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if suffix in ARROW_SUFFIXES:
        raise DatasetError(
            f"{location} is neither Parquet nor an Arrow file or stream, as its name says: it begins with {start[:8]!r}"
        )
    if first == b"[" and suffix not in (".jsonl", ".ndjson"):
        return JsonFile(location)
    if suffix == ".json" and not _is_lines(location):
        return JsonFile(location)
    if first == b"{" or suffix in (".jsonl", ".ndjson"):
        return JsonLinesFile(location)
    raise DatasetError(
        f"{location} is neither Parquet nor an Arrow file or stream, nor JSON: it begins with {start[:8]!r}; CSV and "
        "plain text are known by their suffix (.csv, .tsv, .txt)"
    )


def _is_lines(location: Location) -> bool:
    """Whether the first line is a JSON value by itself, as in JSON lines and not in JSON that is indented."""
    line = next((line for _, line in location.lines() if line.strip()), b"")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
