from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from gs_dist.checkpoint.output_lock import locked
from gs_dist.checkpoint.writer import remove_leftovers, write_bytes
from gs_dist.errors import OutputError
from gs_dist.storage import LockState, begin_sync, sync_file, try_lock

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL]
NO_DIRECTORY_SYNC = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF]
LOST = [errno.EIO, errno.ENOSPC, errno.EDQUOT]


def gives(number: int) -> Any:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fails


def fsync_fails(monkeypatch: pytest.MonkeyPatch, number: int, *, directories: bool) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) is directories:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_storage_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Where flock is not known, files are published and a run goes on, which is told; nothing is left behind."""
    monkeypatch.setattr(fcntl, "flock", gives(number))
    write_bytes(tmp_path / "a.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with locked(tmp_path / "out") as note:
        write_bytes(tmp_path / "out" / "summary.json", b"{}")
        assert "knows no locks" in note
        (tmp_path / "out" / ".gs-dist-x.json.0.tmp").write_bytes(b"perhaps of a writer that lives")
        assert remove_leftovers(tmp_path / "out") == []
    with locked(tmp_path / "hollow"):
        pass
    assert not (tmp_path / "hollow").exists()


def test_a_lock_that_is_held_is_told_from_one_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EAGAIN, and EACCES of NFS and CIFS, are another's lock; what else fails is an error and no lock."""
    with locked(tmp_path / "out") as note:
        assert note == ""
        with pytest.raises(OutputError, match="is in use by another job"), locked(tmp_path / "out"):
            pass
    for number in (errno.EAGAIN, errno.EACCES):
        monkeypatch.setattr(fcntl, "flock", gives(number))
        assert try_lock(0) is LockState.ANOTHERS
    monkeypatch.setattr(fcntl, "flock", gives(errno.EIO))
    with pytest.raises(OutputError, match="cannot be written"), locked(tmp_path / "out"):
        pass
    with pytest.raises(OutputError, match="cannot be written"):
        write_bytes(tmp_path / "b.json", b"{}")  # and no loop without an end
    assert not (tmp_path / "b.json").exists()


def test_a_file_that_others_always_take_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage on which a new file is always another's is refused after a few attempts."""
    monkeypatch.setattr(fcntl, "flock", gives(errno.EAGAIN))
    with pytest.raises(OutputError, match="cannot be written"):
        write_bytes(tmp_path / "a.json", b"{}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", NO_DIRECTORY_SYNC, ids=errno.errorcode.get)
def test_directories_that_cannot_be_flushed_hold_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """CIFS and shared folders do not flush directories: the file is in its place, and that is all there is to it."""
    fsync_fails(monkeypatch, number, directories=True)
    write_bytes(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json").read_bytes() == b"{}"


@pytest.mark.parametrize("directories", [False, True])
@pytest.mark.parametrize("number", LOST, ids=errno.errorcode.get)
def test_what_may_be_lost_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, directories: bool
) -> None:
    """A flush that fails because of disk or room is never passed over."""
    fsync_fails(monkeypatch, number, directories=directories)
    says = "cannot be written" if number == errno.EIO else "the disk is full"
    with pytest.raises(OutputError, match=says):
        write_bytes(tmp_path / "a.json", b"{}")


def test_a_rename_whose_answer_was_lost_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may do what it was asked to and then, asked again, find nothing; only the same file in its place counts."""
    real = os.replace

    def twice(source: Any, target: Any) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "replace", twice)
    write_bytes(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json").read_bytes() == b"{}"
    monkeypatch.setattr(os, "replace", gives(errno.ENOENT))
    with pytest.raises(OutputError):
        write_bytes(tmp_path / "a.json", b"[]")
    assert (tmp_path / "a.json").read_bytes() == b"{}"


def test_a_name_that_is_taken_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary file that seems to be there already, as NFS may say of one it has just made, gets another name."""
    names = iter(["same", "same", "other"])
    monkeypatch.setattr("gs_dist.checkpoint.writer.secrets.token_hex", lambda _: next(names))
    (tmp_path / ".gs-dist-a.json.same.tmp").write_bytes(b"")
    write_bytes(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "name", [".nfs00000000024d00d300000012", "lost+found", ".snapshot", ".fuse_hidden0001", ".zfs"]
)
def test_entries_of_storage_itself_are_no_strangers(tmp_path: Path, name: str) -> None:
    """A run goes on beside what storage puts into a directory; what a user put there is refused as before."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).mkdir()
    with locked(tmp_path / "out"):
        pass
    (tmp_path / "out" / f"my{name}").mkdir()
    with pytest.raises(OutputError, match="which is not of a job"), locked(tmp_path / "out"):
        pass


def test_bytes_are_on_their_way_to_disk_and_the_file_stays_readable(tmp_path: Path) -> None:
    """Advice changes nothing of what a file holds, and what has no disk behind it takes none without an error."""
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        file.write(b"abc" * 5000)
        begin_sync(file.fileno(), 0, 15000)
        sync_file(file.fileno())
    assert (tmp_path / "file").read_bytes() == b"abc" * 5000
    reading, writing = os.pipe()
    begin_sync(writing, 0, 1)
    os.close(reading)
    os.close(writing)
