"""A safetensors file whose tensors are known before their values are, written as the values come.

The file's layout is that of `write_safetensors`: same tensors, same bytes. Blocks of a tensor are written where they
belong, so that nothing is held back and nothing is written twice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.writer import ShardRecord, StoredTensor, lay_out, publish
from gs_dist.storage import begin_sync

__all__ = ["ShardStream", "stream_safetensors"]

_CHUNK = 4 << 20  # bytes hashed at a time
_SYNCED = 16 << 20  # bytes sent to disk at a time


class ShardStream:
    """A file that is being written; made by `stream_safetensors`."""

    def __init__(self, file: BinaryIO, name: str, tensors: Mapping[str, StoredTensor]) -> None:
        self._descriptor = file.fileno()
        self._name = name
        self._tensors = tensors
        header, self._next = lay_out(tensors)
        self._synced = dict(self._next)  # where each tensor's bytes begin that are not on their way to disk
        self._end = {tensor: begin + tensors[tensor].nbytes for tensor, begin in self._next.items()}
        self._size = max(self._end.values(), default=len(header))
        self._record: ShardRecord | None = None
        _write(self._descriptor, memoryview(header), 0)

    def append(self, tensor: str, values: npt.NDArray[Any]) -> None:
        """Writes the next values of a tensor, contiguous and of its dtype, in the order in which they lie in it."""
        assert values.dtype.name == self._tensors[tensor].dtype, f"{self._name}: {tensor} is not {values.dtype}"
        self.append_bytes(tensor, np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def append_bytes(self, tensor: str, values: npt.NDArray[np.uint8]) -> None:
        """The same with the bytes of values, contiguous, of one dimension."""
        data = values.data.cast("B")
        begin = self._next[tensor]
        assert begin + len(data) <= self._end[tensor], f"{self._name}: more values of {tensor} than it has"
        _write(self._descriptor, data, begin)
        self._next[tensor] = begin + len(data)
        waiting = self._next[tensor] - self._synced[tensor]
        if waiting >= _SYNCED or self._next[tensor] == self._end[tensor]:
            begin_sync(self._descriptor, self._synced[tensor], waiting)
            self._synced[tensor] = self._next[tensor]

    def close(self) -> None:
        """Takes the hash, once all values are there."""
        short = [tensor for tensor, position in self._next.items() if position != self._end[tensor]]
        assert not short, f"{self._name}: values of {short[0]} are missing"
        digest = hashlib.sha256()
        for begin in range(0, self._size, _CHUNK):
            digest.update(os.pread(self._descriptor, min(_CHUNK, self._size - begin), begin))
        self._record = ShardRecord(
            file=self._name, sha256=digest.hexdigest(), nbytes=self._size, tensors=dict(self._tensors)
        )

    @property
    def record(self) -> ShardRecord:
        """The record of the file, once it is published."""
        assert self._record is not None, f"{self._name}: is not finished"
        return self._record


@contextmanager
def stream_safetensors(path: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[ShardStream]:
    """A file that takes `path`'s place when the block ends; every value of every tensor must have been written then.

    Raises:
        OutputError: as of `publish`.
    """
    with publish(path) as file:
        stream = ShardStream(file, path.name, tensors)
        yield stream
        stream.close()


def _write(descriptor: int, data: memoryview, position: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count
