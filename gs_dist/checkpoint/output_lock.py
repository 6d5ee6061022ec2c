"""Who may write to the output of a job: one job at a time, and nothing but jobs."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gs_dist.checkpoint.job_log import LOG, STATUS
from gs_dist.checkpoint.kept_statistics import STATISTICS
from gs_dist.checkpoint.layer_costs import SENSITIVITY
from gs_dist.checkpoint.manifest import (
    MANIFESTS,
)
from gs_dist.checkpoint.solved_layer import SOLVED
from gs_dist.checkpoint.writer import make_directory, write_bytes
from gs_dist.errors import OutputError
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.storage import LockState, is_of_storage, try_lock

__all__ = ["DONE", "LAYER_POLICIES", "LOCK", "REFUSED", "REPORT", "locked", "refuse_foreign", "token_in"]

DONE = "done"
REFUSED = "refused"
LOCK = ".lock"
LAYER_POLICIES = "layer_policies.yaml"
REPORT = "report.html"
_ATTEMPTS = 20  # where a lock's file is removed by its holder in the instant that it is asked for
_FILES = ("recipe.yaml", LAYER_POLICIES, "summary.json", "summary.parquet", REPORT, LOG, STATUS)


@contextmanager
def locked(path: Path) -> Iterator[str]:
    """Keeps other jobs out of an output while the block runs; the lock goes with the process that holds it.

    Gives what a user should be told: "", or that the file system knows no locks, where nothing keeps others out. An
    output that is still empty at the end is removed again.

    Raises:
        OutputError: another job is at work here, something else lies here, or the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make_directory(path)
        refuse_foreign(path)  # before anything is written here
        descriptor, note = _take_lock(path)
    except OSError as error:
        raise OutputError(
            f"output {str(path)!r} cannot be written ({error.strerror}); set output to a directory that can be made "
            "and written"
        ) from error
    try:
        yield note
    finally:
        _remove_empty(path)
        os.close(descriptor)


@contextmanager
def token_in(output: Path) -> Iterator[tuple[str, str]]:
    """A small file in an output while the block runs: its name and its text, by which others show that they see it.

    Raises:
        OutputError: it cannot be written.
    """
    name, token = f".gs-dist-seen-{secrets.token_hex(6)}.tmp", secrets.token_hex(16)
    write_bytes(output / name, token.encode())
    try:
        yield name, token
    finally:
        (output / name).unlink(missing_ok=True)


def _take_lock(path: Path) -> tuple[int, str]:
    """Descriptor of the lock that is held, and a note where it keeps no one out."""
    for _ in range(_ATTEMPTS):
        descriptor = os.open(path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            state = try_lock(descriptor)
            if state is LockState.UNKNOWN:
                return descriptor, (
                    f"the file system of output {str(path)!r} knows no locks: see to it that no other job writes there"
                )
            if state is LockState.OURS and os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK)):
                return descriptor, ""
        except FileNotFoundError:
            state = LockState.OURS  # of a lock that its holder removed meanwhile
        except OSError:
            os.close(descriptor)
            _remove_empty(path)
            raise
        os.close(descriptor)
        if state is LockState.ANOTHERS:
            break
    raise OutputError(f"output {str(path)!r} is in use by another job: wait for it, or set output to another directory")


def _remove_empty(path: Path) -> None:
    with suppress(OSError):
        if [entry.name for entry in path.iterdir() if not is_of_storage(entry.name)] == [LOCK]:
            (path / LOCK).unlink()
            path.rmdir()


def refuse_foreign(path: Path) -> None:
    """Refuses a directory that holds something which no job leaves there.

    Raises:
        OutputError: it does.
    """
    ours = {*DIALECTS, MANIFESTS, STATISTICS, SENSITIVITY, SOLVED, DONE, REFUSED, LOCK, *_FILES}
    names = sorted(entry.name for entry in path.iterdir())
    foreign = [name for name in names if name not in ours and not name.startswith(".gs-dist-")]
    foreign = [name for name in foreign if not is_of_storage(name)]
    if foreign:
        raise OutputError(
            f"output {str(path)!r} holds {foreign[0]!r}, which is not of a job: set output to an empty directory"
        )
