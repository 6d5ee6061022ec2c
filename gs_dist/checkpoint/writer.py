"""Files are published whole or not at all: written beside, flushed to disk, then renamed.

A temporary file is locked (`flock`) for as long as its writer lives, so that leftovers of a dead writer
can be told from work in progress on any host that shares the directory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import DTYPES, SPELLINGS
from gs_dist.errors import OutputError
from gs_dist.storage import LockState, begin_sync, rename, sync_directory, sync_file, try_lock

__all__ = [
    "ShardRecord",
    "StoredTensor",
    "lay_out",
    "make_directory",
    "publish",
    "remove_leftovers",
    "write_bytes",
    "write_json",
    "write_safetensors",
]

_PREFIX = ".gs-dist-"
_SUFFIX = ".tmp"
_CHUNK = 16 << 20  # bytes hashed and written at a time
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_ATTEMPTS = 20  # names tried for a temporary file


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a shard holds under a name: NumPy's dtype name ("int8", "bfloat16" ...) and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return DTYPES[SPELLINGS[self.dtype]].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A written safetensors file: name within its directory, sha256 (hexadecimal), size, tensors by full name."""

    file: str
    sha256: str
    nbytes: int
    tensors: Mapping[str, StoredTensor]


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`; on leaving, it is flushed to disk and takes `path`'s place.

    The file has the permissions that the umask leaves. When the block raises, nothing changes at `path`.

    Raises:
        OutputError: the disk is full, or the directory cannot be written.
    """
    try:
        descriptor, temporary = _open_locked(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                sync_file(file.fileno())
                rename(file.fileno(), temporary, path)  # while the lock is held: no one may take it for a leftover
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path.parent)
    except OSError as error:
        where = f"{path.parent.name}/{path.name}"
        if error.errno in _NO_ROOM:
            raise OutputError(
                f"{where}: the disk is full; free space and start again, finished layers are kept"
            ) from error
        raise OutputError(
            f"{where}: cannot be written ({error.strerror}); set output to a writable directory"
        ) from error


def make_directory(path: Path) -> Path:
    """Makes a directory where there is none, durably, and returns it; its parent exists."""
    try:
        path.mkdir()
        sync_directory(path.parent)
    except FileExistsError:
        pass
    except OSError as error:
        raise OutputError(
            f"{path.name}: cannot be made ({error.strerror}); set output to a writable directory"
        ) from error
    return path


def write_bytes(path: Path, data: bytes) -> None:
    """Publishes a small file."""
    with publish(path) as file:
        file.write(data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Publishes a JSON file, indented, keys in the order given; refuses NaN and infinities (ValueError)."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_safetensors(
    path: Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
    *,
    stored: Mapping[str, StoredTensor] | None = None,
) -> ShardRecord:
    """Publishes a safetensors file; same tensors, same bytes, in whatever order they come.

    Tensors lie in descending order of item size, then by name, as the safetensors library writes them, so
    that each is aligned. One that is not contiguous is copied, one at a time; beyond that no copy is made.

    Args:
        path: the file; its directory exists.
        tensors: name to array.
        metadata: `__metadata__` of the header; transformers wants "format" to be "pt", the default.
        stored: form of each tensor, where a look at the arrays would make them; None takes a look.

    Returns:
        The record of the file, its hash taken while writing.

    Raises:
        OutputError: as `publish`.
        TypeError: a dtype that safetensors does not know.
    """
    if stored is None:
        for name, array in tensors.items():
            if array.dtype.name not in SPELLINGS or not array.dtype.isnative:
                raise TypeError(f"tensor {name!r} is {array.dtype}, which a safetensors file cannot hold")
        stored = {name: StoredTensor(dtype=array.dtype.name, shape=array.shape) for name, array in tensors.items()}
    header, offsets = lay_out(stored, metadata)
    digest = hashlib.sha256(header)
    nbytes = len(header)
    with publish(path) as file:
        file.write(header)
        for name in offsets:
            flat = np.ascontiguousarray(tensors[name]).reshape(-1)
            data = flat.view(np.uint8).data  # a memoryview; bfloat16 itself has no buffer protocol
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                file.write(chunk)
                if len(chunk) == _CHUNK:  # of what is less, the flush at the end has little to wait for
                    file.flush()
                    begin_sync(file.fileno(), nbytes, len(chunk))
                digest.update(chunk)
                nbytes += len(chunk)
    return ShardRecord(file=path.name, sha256=digest.hexdigest(), nbytes=nbytes, tensors=stored)


def remove_leftovers(directory: Path) -> list[str]:
    """Deletes temporary files whose writer is dead; returns their names, sorted.

    Files of living writers stay, and so do all where the file system knows no locks.
    """
    removed = []
    for path in sorted(directory.glob(f"{_PREFIX}*{_SUFFIX}")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # renamed or removed meanwhile, or not ours to open
        try:
            if try_lock(descriptor) is LockState.OURS:  # else its writer lives, or may live
                path.unlink()
                removed.append(path.name)
        except OSError:
            pass  # removed meanwhile
        finally:
            os.close(descriptor)
    return removed


def _open_locked(path: Path) -> tuple[int, Path]:
    for _ in range(_ATTEMPTS):
        temporary = path.with_name(f"{_PREFIX}{path.name}.{secrets.token_hex(6)}{_SUFFIX}")
        try:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        try:
            state = try_lock(descriptor)
        except OSError:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        if state is LockState.UNKNOWN or (state is LockState.OURS and os.fstat(descriptor).st_nlink):
            return descriptor, temporary
        # Someone cleaning up took the file in the instant before it was locked, and deletes it.
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
    raise OSError(errno.EAGAIN, f"every file that was made for it was taken at once, {_ATTEMPTS} times")


def lay_out(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Where tensors lie in a file: the bytes before the data, and each tensor's first byte in the file, in order.

    Tensors lie in descending order of item size, then by name. `metadata` is as of `write_safetensors`.
    """
    metadata = {"format": "pt"} if metadata is None else metadata
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        stored = tensors[name]
        offsets[name] = end
        end += stored.nbytes
        entries[name] = {
            "dtype": SPELLINGS[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts aligned
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}
