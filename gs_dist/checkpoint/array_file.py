"""A safetensors file of this program's own: arrays by name and a few texts, for a later step of the same job.

It is sealed: its header holds a checksum of the arrays and the other texts.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import DTYPES, SPELLINGS, TensorInfo, read_header
from gs_dist.checkpoint.lineage import checksum_of
from gs_dist.checkpoint.writer import write_safetensors
from gs_dist.errors import CheckpointError, DamagedError, OutputError
from gs_dist.seal import SEAL

__all__ = ["read_arrays", "read_texts", "write_arrays"]


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], texts: Mapping[str, str]) -> str:
    """Publishes the file; its checksum."""
    seal = _checksum(arrays, texts)
    write_safetensors(path, arrays, {**texts, SEAL: seal})
    return seal


def _checksum(arrays: Mapping[str, npt.NDArray[Any]], texts: Mapping[str, str]) -> str:
    return checksum_of(arrays, json.dumps(dict(texts), sort_keys=True))


def read_texts(path: Path, missing: str) -> Mapping[str, str]:
    """The header's texts, its checksum among them; the arrays are not looked at.

    Raises:
        OutputError: there is no such file.
        DamagedError: it has no header.
    """
    return _read_header(path, missing)[1]


def _read_header(path: Path, missing: str) -> tuple[Mapping[str, TensorInfo], Mapping[str, str]]:
    label = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise OutputError(f"{label} does not exist: {missing}")
    try:
        tensors, header = read_header(path, label)
        return tensors, dict(json.loads(header).get("__metadata__", {}))
    except (CheckpointError, ValueError, TypeError) as error:
        raise DamagedError(f"{label}: is damaged ({error!s:.200}); {missing}") from error


def read_arrays(path: Path, missing: str) -> tuple[dict[str, npt.NDArray[Any]], Mapping[str, str]]:
    """Arrays, read-only views of the mapped file, and the header's texts; all of it is read once, for its checksum.

    Args:
        path: the file, written by `write_arrays`.
        missing: what to do where there is none, for the message.

    Raises:
        OutputError: there is no such file.
        DamagedError: it does not hold what was written.
    """
    tensors, texts = _read_header(path, missing)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    for name, info in tensors.items():
        count = int(np.prod(info.shape, dtype=np.int64))
        flat = np.frombuffer(mapped, DTYPES[SPELLINGS[info.dtype]], count=count, offset=info.offset)
        arrays[name] = flat.reshape(info.shape)
    seal = texts.get(SEAL)
    texts = {name: text for name, text in texts.items() if name != SEAL}
    if seal != _checksum(arrays, texts):
        raise DamagedError(
            f"{path.parent.name}/{path.name}: does not hold what was written to it, by its checksum; {missing}"
        )
    return arrays, texts
