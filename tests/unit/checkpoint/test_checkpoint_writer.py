"""Publishing files: whole or not at all, the same bytes each time, by the umask, and nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from gs_dist.checkpoint.header import read_header
from gs_dist.checkpoint.writer import make_directory, publish, remove_leftovers, write_json, write_safetensors
from gs_dist.errors import OutputError


def sample() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((3, 5)).astype(dtype) for name, dtype in DTYPES.items()}
    tensors |= {f"i{bits}": rng.integers(-100, 100, (4, 2)).astype(f"int{bits}") for bits in (8, 32, 64)}
    tensors["transposed"] = np.arange(6, dtype=np.int32).reshape(2, 3).T
    tensors["scalar"] = np.array(3.5, dtype=np.float32)
    tensors["nothing"] = np.empty((0, 4), dtype=np.int8)
    return tensors


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """Bytes are the same as the library's own, for the dtypes its NumPy side knows."""
    tensors = {name: np.ascontiguousarray(a) for name, a in sample().items() if name not in ("bfloat16", "scalar")}
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    assert (tmp_path / "a.safetensors").read_bytes() == save(tensors)


def test_values_come_back_through_the_library(tmp_path: Path) -> None:
    """What was written is what the safetensors library reads, with the metadata that transformers wants."""
    tensors = sample()
    write_safetensors(tmp_path / "a.safetensors", tensors)
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name in set(tensors) - {"bfloat16"}:
            np.testing.assert_array_equal(file.get_tensor(name), tensors[name])
    infos, _ = read_header(tmp_path / "a.safetensors", "a")
    info = infos["bfloat16"]
    data = (tmp_path / "a.safetensors").read_bytes()
    assert data[info.offset : info.offset + info.nbytes] == tensors["bfloat16"].tobytes()


def test_the_record_describes_the_file(tmp_path: Path) -> None:
    """The hash taken while writing is the file's, and so are size and tensors."""
    tensors = sample()
    record = write_safetensors(tmp_path / "a.safetensors", tensors)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert (record.file, record.nbytes) == ("a.safetensors", len(data))
    assert {n: (s.dtype, s.shape) for n, s in record.tensors.items()} == {
        n: (a.dtype.name, a.shape) for n, a in tensors.items()
    }


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.permutations(sorted(sample())))
def test_bytes_do_not_depend_on_the_order_given(tmp_path: Path, names: list[str]) -> None:
    """The same tensors in any order give the same file, every tensor aligned to its item size."""
    tensors = sample()
    record = write_safetensors(tmp_path / "a.safetensors", {name: tensors[name] for name in names})
    assert record.sha256 == write_safetensors(tmp_path / "b.safetensors", tensors).sha256
    infos, _ = read_header(tmp_path / "a.safetensors", "a")
    assert all(info.offset % np.dtype(tensors[name].dtype).itemsize == 0 for name, info in infos.items())


def test_a_large_tensor_is_streamed(tmp_path: Path) -> None:
    """Tensors longer than a chunk, mapped read-only, are written without error."""
    big = np.arange(5 << 20, dtype=np.int64)
    big.flags.writeable = False
    record = write_safetensors(tmp_path / "a.safetensors", {"big": big})
    assert record.sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("array", [np.array(["x"]), np.ones(2, dtype=complex), np.ones(2, dtype=">f4")])
def test_what_the_format_cannot_hold_is_refused(array: np.ndarray[Any, Any], tmp_path: Path) -> None:
    """Text, complex and byte-swapped arrays are refused by name, and no file appears."""
    with pytest.raises(TypeError, match="'x'"):
        write_safetensors(tmp_path / "a.safetensors", {"x": array})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o000, 0o666)])
def test_permissions_follow_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    """Files and directories are as readable as the umask lets them be."""
    before = os.umask(mask)
    try:
        write_json(make_directory(tmp_path / "d") / "a.json", {"a": 1})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "d" / "a.json").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o777 & ~mask


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    """An exception within the block leaves the old content and no temporary file."""
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def write_half() -> None:
        with publish(path) as file:
            file.write(b"half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_half()
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_not_a_number_is_not_written_to_json(tmp_path: Path) -> None:
    """JSON has no NaN; rather no file than one that others cannot read."""
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"error": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC becomes an OutputError that says what to do, and the temporary file goes."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_safetensors(tmp_path / "a.safetensors", {"x": np.ones(3, np.float32)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write itself failing is the same as the flush failing."""
    fdopen = os.fdopen

    def to_full_disk(descriptor: int, mode: str) -> io.BufferedWriter:
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
        return fdopen(descriptor, mode)  # type: ignore[return-value]  # mode is "wb"

    monkeypatch.setattr(os, "fdopen", to_full_disk)
    with pytest.raises(OutputError, match="the disk is full"):
        write_safetensors(tmp_path / "a.safetensors", {"x": np.ones(1 << 20, np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_said_so(tmp_path: Path) -> None:
    """A directory that cannot be written gives an OutputError that names the setting."""
    with pytest.raises(OutputError, match="set output to a writable directory"):
        write_json(tmp_path / "none" / "a.json", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        make_directory(tmp_path / "file" / "d")


WRITER = """
import sys, time
from pathlib import Path
from gs_dist.checkpoint.writer import publish
with publish(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_the_dead_go_and_files_of_the_living_stay(tmp_path: Path) -> None:
    """A temporary file is removed once its writer is dead, never before."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "a.safetensors")], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        (name,) = (path.name for path in tmp_path.iterdir())
        assert remove_leftovers(tmp_path) == []
        assert (tmp_path / name).exists()
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()  # type: ignore[union-attr]  # a pipe was asked for
    (tmp_path / "kept.safetensors").write_bytes(b"")
    assert remove_leftovers(tmp_path) == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]
