"""Where data lie: files, directories, glob patterns and URIs, and the files that they come to.

On disk or behind a `pyarrow.fs` URI; secrets of a URI are in no message. A directory may be more than its files: what
`datasets` saved tells which of them count, a table's log which rows were removed, and names which split they are of.

Formats: `state.json` is that of `datasets.Dataset.save_to_disk`; splits are told by the names that
https://huggingface.co/docs/hub/datasets-file-names-and-splits lists.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from gs_dist.errors import DatasetError
from gs_dist.wording import counted, is_uri, without_secrets

__all__ = ["ARROW_SUFFIXES", "Found", "Location", "find_files"]

# Suffixes by format. A directory is read in the first one that it holds; others beside it are said to be left out.
ARROW_SUFFIXES = (".parquet", ".pq", ".arrow", ".arrows", ".feather", ".ipc")
_FORMATS = (ARROW_SUFFIXES, (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"), (".txt", ".text"))
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_COMPRESSED = (".gz", ".zst", ".bz2")
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
_OURS = {"builtins", "gs_dist", "numpy"}  # packages whose exceptions are faults of this one, or told already
_LONGEST_LINE = 64 << 20  # bytes

# Directories by which a table is known that keeps its removed rows' files, and how to export what it holds now.
_TABLES = {
    "_delta_log": ("a Delta table", "deltalake.DeltaTable(...).to_pyarrow_table()"),
    ".hoodie": ("a Hudi table", "spark.read.format('hudi').load(...).write.parquet(...)"),
    "_versions": ("a Lance dataset", "lance.dataset(...).to_table()"),
}
_ICEBERG = re.compile(r"(^|/)metadata/(.*\.metadata\.json|version-hint\.text)$")

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT = re.compile(r"(?:^|[/._\- ])(" + "|".join(sum(_SPLITS.values(), ())) + r")(?=$|[/._\- 0-9])")


@dataclass(frozen=True)
class Location:
    """One file: its file system, path within it, and what messages call it."""

    filesystem: pafs.FileSystem
    path: str
    shown: str
    secrets: tuple[str, ...]

    def __str__(self) -> str:
        return self.shown

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """What Arrow and the file system raise becomes a DatasetError with the file's name, without secrets."""
        with _as_dataset_error(self.shown, self.secrets):
            yield

    @contextmanager
    def open(self) -> Iterator[pa.NativeFile]:
        """The file's bytes, at any place."""
        with self.errors_named(), self.filesystem.open_input_file(self.path) as source:
            yield source

    @cached_property
    def beginning(self) -> bytes:
        """Its first bytes, unpacked where it is compressed.

        Raises:
            DatasetError: it cannot be read, or is empty.
        """
        with self.open_stream() as source:
            start = source.read(64)
        if not start:
            raise DatasetError(f"{self} is empty (0 bytes)")
        return start

    @cached_property
    def compression(self) -> str | None:
        """gzip, zstd or bz2 by its first bytes; None for anything else."""
        with self.open() as source:
            start = source.read(4)
        return next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None)

    @contextmanager
    def open_stream(self) -> Iterator[io.BufferedReader]:
        """The file's bytes from the first on, unpacked where it is compressed."""
        compression = self.compression
        with self.errors_named(), self.filesystem.open_input_stream(self.path, compression=compression) as source:
            yield io.BufferedReader(source, 1 << 20)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines with their numbers, from 1 on, and a byte order mark left out.

        Raises:
            DatasetError: a line that is longer than 64 MiB.
        """
        with self.open_stream() as source:
            number = 0
            while line := source.readline(_LONGEST_LINE + 1):
                number += 1
                if len(line) > _LONGEST_LINE:
                    raise DatasetError(
                        f"{self}, line {number} is longer than {_LONGEST_LINE >> 20} MiB: split it; a sample needs a "
                        "few thousand tokens"
                    )
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


@dataclass(frozen=True, kw_only=True)
class Found:
    """Files in their order, and what a user should be told of others that were left out."""

    locations: tuple[Location, ...]
    notes: tuple[str, ...]


@contextmanager
def _as_dataset_error(name: str, secrets: tuple[str, ...]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Not only Arrow's and the system's: the file system of another package (hf://) raises that package's own.
        if type(error).__module__.split(".")[0] in _OURS and not isinstance(error, OSError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        for secret in secrets:
            reason = reason.replace(secret, "***")
        raise DatasetError(f"{name} cannot be read: {reason}") from None  # the cause may hold a URI's secrets


def _secrets(entry: str) -> tuple[str, ...]:
    """Parts of a URI that must not be printed, the longest first: user, password and the query's values."""
    user = re.search(r"://(.*)@", entry)
    texts = [user[1], *user[1].split(":")] if user else []
    query = entry.partition("?")[2]
    if "@" in query:
        texts.append(entry.partition(":")[2].lstrip("/"))  # where the user ends and the query begins is not known
    texts += [query, *(part.partition("=")[2] for part in query.split("&"))]
    texts += [unquote(text) for text in texts]
    return tuple(sorted({text for text in texts if text}, key=len, reverse=True)) if is_uri(entry) else ()


def find_files(data: Iterable[str]) -> Found:
    """Files of entries that are files, directories, glob patterns or URIs, in the order of the entries.

    Raises:
        DatasetError: an entry without a file, a place that cannot be reached, a file named twice, a directory of
            several splits, a table whose files hold removed rows.
    """
    files: dict[str, Location] = {}
    notes: list[str] = []
    for entry in data:
        name, secrets = without_secrets(entry), _secrets(entry)
        with _as_dataset_error(name, secrets):
            filesystem, path, scheme = _locate(entry)
            paths = _Listing(filesystem, name, notes).expand(path)
        if not paths:
            raise DatasetError(
                f"calibration.data: nothing at {name}; name Parquet, Arrow, JSON, CSV or text files, or a directory "
                "of them"
            )
        for found in paths:
            file = Location(filesystem, found, scheme + found, secrets)
            if str(file) in files:
                raise DatasetError(f"calibration.data: {file} is named twice; its samples would count double")
            files[str(file)] = file
    return Found(locations=tuple(files.values()), notes=tuple(notes))


def _locate(entry: str) -> tuple[pafs.FileSystem, str, str]:
    """File system, path within it (a glob pattern perhaps) and what to show before a path."""
    if not is_uri(entry):
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(entry)), ""
    scheme = entry.partition("://")[0] + "://"
    plain = re.fullmatch(r"([^?*]*/)([^?]*\*[^?]*)(\?.*)?", entry)  # in a URI only * is a wildcard: ? starts its query
    uri, pattern = (plain[1] + (plain[3] or ""), "/" + plain[2]) if plain else (entry, "")
    filesystem, path = pafs.FileSystem.from_uri(uri)
    return filesystem, path.rstrip("/") + pattern, scheme


class _Listing:
    """What one entry comes to; `notes` is added to."""

    def __init__(self, filesystem: pafs.FileSystem, entry: str, notes: list[str]) -> None:
        self._filesystem = filesystem
        self._entry = entry
        self._notes = notes

    def expand(self, path: str) -> list[str]:
        kind = self._filesystem.get_file_info(path).type
        if kind == pafs.FileType.File:
            return [path]
        if kind == pafs.FileType.Directory:
            return self._files_of_directory(path)
        return self._files_of_pattern(path) if _is_pattern(path) else []

    def _files_of_pattern(self, path: str) -> list[str]:
        parts = path.split("/")
        fixed = next(i for i, part in enumerate(parts) if _is_pattern(part))
        base = "/".join(parts[:fixed])
        infos = {info.path: info.type for info in self._matches(base, parts[fixed:])}
        files = [match for match, kind in infos.items() if kind == pafs.FileType.File]
        self._refuse_tables(base)
        chosen = set(self._of_one_format(base, files))
        self._refuse_splits(base, sorted(chosen))
        found: list[str] = []
        for match, kind in infos.items():
            if kind == pafs.FileType.Directory:
                found += self._files_of_directory(match)
            elif match in chosen:
                found.append(match)
        return found

    def _matches(self, base: str, parts: list[str]) -> Iterator[pafs.FileInfo]:
        """Entries that match a pattern; those that storage and engines hide, only where the pattern names them so."""
        head, rest = parts[0], parts[1:]
        if not _is_pattern(head):
            info = self._filesystem.get_file_info(f"{base}/{head}")
            if info.type != pafs.FileType.NotFound:
                yield from self._matches(info.path, rest) if rest else [info]
            return
        if head == "**":
            yield from self._matches(base, rest or ["*"])
        listing = self._filesystem.get_file_info(pafs.FileSelector(base or "/", allow_not_found=True))
        for info in sorted(listing, key=lambda info: info.path):
            is_directory = info.type == pafs.FileType.Directory
            if info.base_name[0] in "._" and head[0] != info.base_name[0]:
                continue
            if head == "**" and is_directory:
                yield from self._matches(info.path, parts)
            elif head != "**" and (is_directory or not rest) and fnmatch.fnmatchcase(info.base_name, head):
                yield from self._matches(info.path, rest) if rest else [info]

    def _files_of_directory(self, path: str) -> list[str]:
        selected = self._filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        listing = sorted(selected, key=lambda info: info.path)
        names = {info.path.removeprefix(path).lstrip("/"): info.path for info in listing if info.is_file}
        if "state.json" in names:
            return self._saved_dataset(path, names)
        if "dataset_dict.json" in names:
            splits = sorted(name.removesuffix("/state.json") for name in names if name.endswith("/state.json"))
            raise DatasetError(
                f"{path} holds several splits; name one of them in calibration.data: {', '.join(splits)}"
            )
        self._refuse_table_names(path, names)
        visible = [name for name in names if not any(part[0] in "._" for part in name.split("/"))]
        chosen = self._of_one_format(path, visible)
        self._refuse_splits(path, chosen)
        return [names[name] for name in chosen]

    def _of_one_format(self, where: str, names: list[str]) -> list[str]:
        """Names of the first format that any is of; all where none is of a known one."""
        data = [name for name in names if name.rsplit("/", 1)[-1] not in _DESCRIPTIONS]
        by_format = [[name for name in data if _plain_name(name).endswith(suffixes)] for suffixes in _FORMATS]
        held = [found for found in by_format if found]
        if len(held) > 1:
            others = sum(len(found) for found in held[1:])
            self._notes.append(
                f"{where}: {counted(len(held[0]), 'file')} such as {held[0][0].rsplit('/', 1)[-1]} are read, and "
                f"{counted(others, 'file')} such as {held[1][0].rsplit('/', 1)[-1]} are left out; name those you want "
                "in calibration.data"
            )
        return held[0] if held else names

    def _refuse_splits(self, where: str, names: list[str]) -> None:
        """Refuses to mix what names tell to be of several splits."""
        splits: dict[str, str] = {}
        for name in names:
            found = _SPLIT.findall(name.removeprefix(where).lower())
            for split, words in _SPLITS.items():
                if found and found[-1] in words:
                    splits.setdefault(split, name.removeprefix(where).lstrip("/"))
        if len(splits) > 1:
            patterns = ", ".join(f"{where}/{_pattern_of(example)}" for example in splits.values())
            raise DatasetError(
                f"{self._entry} holds several splits ({', '.join(splits)}); name those you want in calibration.data: "
                f"{patterns}"
            )

    def _refuse_tables(self, path: str) -> None:
        for marker in _TABLES:
            if self._filesystem.get_file_info(f"{path}/{marker}").type == pafs.FileType.Directory:
                self._refuse_table_names(path, [f"{marker}/"])

    def _refuse_table_names(self, path: str, names: Iterable[str]) -> None:
        for name in names:
            marker = next((part for part in name.split("/")[:-1] if part in _TABLES), None)
            what, export = _TABLES.get(marker or "", ("an Iceberg table", "table.scan().to_arrow()"))
            if marker is not None or _ICEBERG.search(name):
                raise DatasetError(
                    f"{path} is {what}, whose files also hold rows that were removed: export what it holds now "
                    f"({export}) to Parquet, and name that in calibration.data"
                )

    def _saved_dataset(self, path: str, names: dict[str, str]) -> list[str]:
        """Files of a directory written by `datasets.Dataset.save_to_disk`, in the order of its state.json."""
        try:
            with self._filesystem.open_input_file(f"{path}/state.json") as file:
                listed = [entry["filename"] for entry in json.loads(file.read())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{path}/state.json is not that of a saved dataset: {error!r}") from None
        missing = next((name for name in listed if name not in names), None)
        if missing is not None:
            raise DatasetError(f"{path}/state.json lists {missing}, which is not in the directory; copy it there")
        return [f"{path}/{name}" for name in listed]


def _is_pattern(text: Any) -> bool:
    return any(sign in text for sign in "*?[")


def _plain_name(name: str) -> str:
    """Without the suffix of a compression."""
    base, suffix = os.path.splitext(name)
    return base if suffix in _COMPRESSED else name


def _pattern_of(name: str) -> str:
    """`data/train-*.parquet` for `data/train-00000-of-00003.parquet`, and `train/*` for `train/a.parquet`."""
    folder, _, base = name.rpartition("/")
    if _SPLIT.search(base.lower()) is None:
        return f"{folder}/*"
    return re.sub(r"-\d{5}-of-\d{5}", "-*", name)
