"""A safetensors file of this program's own: arrays by name and a few texts, for a later step of the same job."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import DTYPES, SPELLINGS, read_header
from gs_dist.errors import OutputError

__all__ = ["read_arrays"]


def read_arrays(path: Path, missing: str) -> tuple[dict[str, npt.NDArray[Any]], Mapping[str, str]]:
    """Arrays, read-only views of the mapped file, and the header's texts.

    Args:
        path: the file, written by `writer.write_safetensors`.
        missing: what to do where there is none, for the message.

    Raises:
        OutputError: there is no such file.
        CheckpointError: it is damaged.
    """
    label = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise OutputError(f"{label} does not exist: {missing}")
    tensors, header = read_header(path, label)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    for name, info in tensors.items():
        count = int(np.prod(info.shape, dtype=np.int64))
        flat = np.frombuffer(mapped, DTYPES[SPELLINGS[info.dtype]], count=count, offset=info.offset)
        arrays[name] = flat.reshape(info.shape)
    return arrays, json.loads(header).get("__metadata__", {})
