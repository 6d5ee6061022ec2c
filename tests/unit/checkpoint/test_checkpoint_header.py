"""Headers of safetensors files: what is true is read, what contradicts itself is refused by name."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import DTYPES, raw_safetensors, save_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gs_dist.checkpoint.header import read_header, read_json
from gs_dist.errors import CheckpointError


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "F32", **others: Any) -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **others}


def test_every_dtype_is_described(tmp_path: Path) -> None:
    """Names, shapes, dtypes and positions are those of the file."""
    tensors = {name: np.ones((2, 3), dtype=dtype) for name, dtype in DTYPES.items()}
    tensors["scalar"] = np.array(7, dtype=np.int64)
    tensors["nothing"] = np.empty((0, 5), dtype=np.int8)
    save_safetensors(tmp_path / "a.safetensors", tensors)
    found, raw = read_header(tmp_path / "a.safetensors", "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    assert set(found) == set(tensors)
    assert data[8:].startswith(raw)
    for name, array in tensors.items():
        info = found[name]
        assert (info.dtype, info.shape, info.nbytes) == (array.dtype.name, array.shape, array.nbytes)
        assert data[info.offset : info.offset + info.nbytes] == array.tobytes()


GOOD = {"w": entry(0, 8)}
LIES: list[tuple[str, bytes, str]] = [
    ("empty file", b"", "0 bytes"),
    ("five bytes", b"\1\0\0\0\0", "5 bytes"),
    ("header longer than the file", raw_safetensors(GOOD, bytes(8), header_length=10**6), "states a header of 1000000"),
    ("header of 2^64 - 1 bytes", raw_safetensors(GOOD, bytes(8), header_length=2**64 - 1), "states a header of 184"),
    ("header shorter than stated", raw_safetensors(GOOD, bytes(8), header_length=20), "not valid JSON"),
    ("header of no bytes", struct.pack("<Q", 0), "does not start with"),
    ("Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    ("a list for a header", struct.pack("<Q", 2) + b"[]", "does not start with"),
    ("not UTF-8", struct.pack("<Q", 4) + b'{"\xff}', "not valid JSON"),
    ("deeply nested", struct.pack("<Q", 80000) + b'{"a":' * 10000 + b" " * 30000, "not valid JSON"),
    ("key twice", struct.pack("<Q", 13) + b'{"w":1,"w":2}', "'w' occurs twice"),
    ("metadata not text", raw_safetensors({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    ("metadata a list", raw_safetensors({"__metadata__": []}, b""), "__metadata__"),
    ("entry a number", raw_safetensors({"w": 3}, b""), "'w'"),
    ("entry without offsets", raw_safetensors({"w": {"dtype": "F32", "shape": [1]}}, bytes(4)), "'w'"),
    ("entry with more", raw_safetensors({"w": entry(0, 4, code="x")}, bytes(4)), "'w'"),
    ("unknown dtype", raw_safetensors({"w": entry(0, 4, dtype="F31")}, bytes(4)), "'w': dtype 'F31' is unknown"),
    ("dtype a number", raw_safetensors({"w": entry(0, 4, dtype=3)}, bytes(4)), "'w': dtype 3"),
    ("dtype a list", raw_safetensors({"w": entry(0, 4, dtype=["F32"])}, bytes(4)), "'w': dtype"),
    ("shape a number", raw_safetensors({"w": {**entry(0, 4), "shape": 1}}, bytes(4)), "'w': shape"),
    ("shape of text", raw_safetensors({"w": entry(0, 4, ["1"])}, bytes(4)), "'w': shape"),
    ("shape of truth", raw_safetensors({"w": entry(0, 4, [True])}, bytes(4)), "'w': shape"),
    ("shape of fractions", raw_safetensors({"w": entry(0, 4, [1.0])}, bytes(4)), "'w': shape"),
    ("negative shape", raw_safetensors({"w": entry(0, 4, [-1, -1])}, bytes(4)), "'w': shape"),
    ("shape of many axes", raw_safetensors({"w": entry(0, 4, [1] * 50)}, bytes(4)), "'w': shape"),
    ("shape beyond 64 bits", raw_safetensors({"w": entry(0, 4, [2**70, 0])}, bytes(4)), "'w': shape"),
    ("offsets of three", raw_safetensors({"w": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, bytes(8)), "'w': data_off"),
    ("negative offset", raw_safetensors({"w": entry(-4, 0, [1])}, bytes(4)), "'w': data_offsets"),
    ("offsets turned round", raw_safetensors({"w": entry(4, 0, [1])}, bytes(4)), "'w': data_offsets"),
    ("shape against offsets", raw_safetensors({"w": entry(0, 8, [3])}, bytes(8)), "'w': data_offsets .* 12"),
    ("overlap", raw_safetensors({"v": entry(0, 8), "w": entry(4, 12)}, bytes(12)), "'v' and 'w' overlap"),
    ("the same bytes twice", raw_safetensors({"v": entry(0, 8), "w": entry(0, 8)}, bytes(8)), "'v' and 'w' overlap"),
    ("a gap", raw_safetensors({"v": entry(0, 8), "w": entry(12, 16)}, bytes(16)), "4 bytes before tensor 'w'"),
    ("a gap in front", raw_safetensors({"w": entry(4, 8)}, bytes(8)), "'w' starts 4 bytes"),
    ("truncated", raw_safetensors({"v": entry(0, 8), "w": entry(8, 16)}, bytes(12)), "'w' ends .* truncated"),
    ("trailing bytes", raw_safetensors(GOOD, bytes(12)), "4 bytes after the last tensor"),
    ("2 TB", raw_safetensors({"w": entry(0, 2 << 40, [1 << 39])}, bytes(8)), "'w' ends .* truncated"),
]


@pytest.mark.parametrize(("data", "message"), [row[1:] for row in LIES], ids=[row[0] for row in LIES])
def test_a_lie_is_refused_by_file_and_tensor(data: bytes, message: str, tmp_path: Path) -> None:
    """A file that contradicts itself gives a CheckpointError that names it, and costs no memory by its claims."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"^model\.safetensors: .*" + message):
        read_header(path, "model.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    """A sparse file may really be as long as its header claims; it is still refused unread."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate((1 << 40) + 8)
    with pytest.raises(CheckpointError, match="are not read"):
        read_header(path, "model.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not valid JSON"), (b"[1]", "a JSON list"), (b"[" * 100_000, "not valid JSON"), (b"{\xff", "not valid")],
)
def test_a_damaged_json_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    """A JSON file that holds no object gives a CheckpointError with its name."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^config\.json: .*" + message):
        read_json(tmp_path / "config.json", "config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "dtype", "shape", "I8"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "BF16"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | JSON,
    }
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from("abc"), ENTRY | JSON, max_size=3), st.binary(max_size=40), st.integers(0, 60))
def test_any_header_is_consistent_or_refused(tmp_path: Path, entries: dict[str, Any], data: bytes, cut: int) -> None:
    """Whatever a header says, either its tensors tile the data exactly, or a CheckpointError is raised."""
    path = tmp_path / "a.safetensors"
    text = json.dumps(entries).encode()
    path.write_bytes((struct.pack("<Q", len(text)) + text + data)[: 8 + len(text) + cut])
    with contextlib.suppress(CheckpointError):
        found, raw = read_header(path, "a.safetensors")
        assert sum(info.nbytes for info in found.values()) == path.stat().st_size - 8 - len(raw)
        assert all(math.prod(info.shape) <= len(data) for info in found.values())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    """Arbitrary bytes end in a CheckpointError and nothing else."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read_header(path, "a.safetensors")
