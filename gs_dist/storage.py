"""What the calls of a file system may give where storage is shared, and what becomes of it.

* `flock`: ENOSYS, ENOTSUP (Lustre mounted without `flock`, some FUSE), ENOLCK (NFS without lock daemon), EINVAL:
  goes on without a lock, and says so. EAGAIN, on NFS and CIFS also EACCES: another holds it. Anything else is an error.
* `fsync` of a directory: EINVAL, ENOTSUP, ENOSYS, EBADF (CIFS, shared folders, FUSE): goes on; such storage
  keeps names by itself.
* `fsync` of a file: EINVAL, ENOTSUP, ENOSYS (FUSE that has none): goes on. EIO, ENOSPC and EDQUOT are errors.
* `rename`: ENOENT although it was done (NFS, whose answer was lost and which was asked again): done, if it is
  in its place.
* `mkdir`: EEXIST although it was made just now (the same): done.
* `open` with O_EXCL: EEXIST although it was made just now (the same): tried with another name, a few times.
* Entries that storage itself puts into a directory (`.nfs*`, `lost+found`, `.snapshot` ...): no strangers.

Sources: flock(2), fsync(2), rename(2), nfs(5), mount.lustre(8), mount.cifs(8), and Linux's fs/fuse/file.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from contextlib import suppress
from enum import Enum
from pathlib import Path

__all__ = ["LockState", "is_of_storage", "rename", "sync_directory", "sync_file", "try_lock"]

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_DIRECTORY_SYNC = _NO_SYNC | {errno.EBADF}
_OF_STORAGE = re.compile(
    r"\.nfs[0-9a-f]+|\.fuse_hidden.*|lost\+found|\.snapshots?|~snapshot|\.zfs|\.glusterfs|\.lustre|\.Trash-\d+|@eaDir|"
    r"\.DS_Store|System Volume Information|\.\.data|\.\.\d{4}_.*"
)


class LockState(Enum):
    """What became of a lock that was asked for."""

    OURS = "ours"
    ANOTHERS = "another's"
    UNKNOWN = "the file system knows no locks"


def try_lock(descriptor: int) -> LockState:
    """Asks for a file's lock without waiting; it goes with the process that holds it.

    Raises:
        OSError: for any other reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return LockState.ANOTHERS
        if error.errno in _NO_LOCKS:
            return LockState.UNKNOWN
        raise
    return LockState.OURS


def sync_file(descriptor: int) -> None:
    """Flushes a file to disk, where the file system knows how to."""
    _sync(descriptor, _NO_SYNC)


def begin_sync(descriptor: int, start: int, length: int) -> None:
    """Has bytes that were just written go to disk from now on, so that flushing the file finds little left to wait for.

    Advice alone, to be given once for each range: Linux begins to write what is dirty (`mm/fadvise.c`), and would drop
    what is not, which readers of the file would miss.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def sync_directory(directory: Path) -> None:
    """Flushes a directory's entries to disk, where the file system knows how to."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync(descriptor, _NO_DIRECTORY_SYNC)
    finally:
        os.close(descriptor)


def _sync(descriptor: int, unknown: set[int]) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in unknown:
            raise


def rename(descriptor: int, source: Path, target: Path) -> None:
    """Puts an open file in the place of `target`.

    Args:
        descriptor: of the file.
        source: its name so far.
        target: its name from now on.
    """
    try:
        os.replace(source, target)
    except FileNotFoundError:
        try:
            done = os.path.samestat(os.fstat(descriptor), os.stat(target))
        except OSError:
            done = False
        if not done:
            raise


def is_of_storage(name: str) -> bool:
    """Whether storage itself puts an entry of this name into a directory."""
    return _OF_STORAGE.fullmatch(name) is not None
