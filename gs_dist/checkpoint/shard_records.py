"""What manifests say of the files that they vouch for: read back from JSON, and held against what is on storage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.header import read_header
from gs_dist.checkpoint.writer import ShardRecord, StoredTensor
from gs_dist.errors import CheckpointError, OutputError
from gs_dist.results.quantized import LinearSummary

__all__ = ["record_faults", "record_from_json", "refuse_changed_shard", "rows_from_json"]

_CHUNK = 4 << 20  # bytes hashed at a time


def record_from_json(content: Mapping[str, Any]) -> ShardRecord:
    """A record as `dataclasses.asdict` gave it.

    Raises:
        KeyError, TypeError, ValueError: it is another form, or its file lies elsewhere.
    """
    file = content["file"]
    if Path(file).name != file:
        raise ValueError(f"shard {file!r} lies elsewhere")
    tensors = {
        name: StoredTensor(dtype=stored["dtype"], shape=tuple(stored["shape"]))
        for name, stored in content["tensors"].items()
    }
    return ShardRecord(file=file, sha256=content["sha256"], nbytes=content["nbytes"], tensors=tensors)


def rows_from_json(rows: Sequence[Mapping[str, Any]]) -> tuple[LinearSummary, ...]:
    """Rows of a summary as `dataclasses.asdict` gave them."""
    return tuple(map(_row, rows))


def _row(content: Mapping[str, Any]) -> LinearSummary:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return LinearSummary(**fields)


def record_faults(output: Path, shards: Mapping[str, ShardRecord]) -> list[str]:
    """Reads the shard of each format in full and says which are missing or changed; empty where all is well."""
    faults = []
    for name, record in shards.items():
        label = f"{name}/{record.file}"
        try:
            digest, nbytes = _sha256(output / name / record.file)
        except OSError as error:
            faults.append(f"{label}: cannot be read ({error.strerror})")
            continue
        if nbytes != record.nbytes:
            faults.append(f"{label}: has {nbytes} bytes, {record.nbytes} were written")
        elif digest != record.sha256:
            faults.append(f"{label}: its content changed since it was written (sha256 {digest[:12]}...)")
    return faults


def refuse_changed_shard(directory: Path, record: ShardRecord, again: str) -> None:
    """Compares size and header of a file with its record; the data's hash was taken when it was written.

    Args:
        directory: of the format.
        record: of the file.
        again: what to do about it, for the message.

    Raises:
        OutputError: the file is missing, damaged or another.
    """
    label = f"{directory.name}/{record.file}"
    try:
        tensors, _ = read_header(directory / record.file, label)
        nbytes = (directory / record.file).stat().st_size
    except (CheckpointError, OSError) as error:
        raise OutputError(f"{error}; {again}") from error
    found = {name: StoredTensor(dtype=info.dtype, shape=info.shape) for name, info in tensors.items()}
    if found != dict(record.tensors) or nbytes != record.nbytes:
        raise OutputError(f"{label}: is not the file that was written; {again}")


def _sha256(path: Path) -> tuple[str, int]:
    digest = hashlib.sha256()
    nbytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            nbytes += len(chunk)
    return digest.hexdigest(), nbytes
