"""Hidden states at a wave's boundary, kept on the worker's local disk.

The states of all samples of a replica would not fit in memory: 512 samples of 2048 tokens of a 70B model
have 34 GB. The file has no name, so that nothing is left behind however the worker ends.
"""

from __future__ import annotations

import os
import platform
import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from gs_dist.errors import WorkerLostError

__all__ = ["ActivationStore"]


class ActivationStore:
    """Arrays of one shape and dtype by index; a later write replaces an earlier one.

    The file lies in the directory for temporary files (set `TMPDIR` to choose another).
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the store
        self._slots: dict[int, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        self._checksums: dict[int, int] = {}
        self._end = 0

    def put(self, index: int, array: npt.NDArray[Any]) -> None:
        """Keeps `array` under `index`.

        Raises:
            OSError: the disk is full.
        """
        array = np.ascontiguousarray(array)
        slot = self._slots.get(index)
        if slot is None or slot[1:] != (array.shape, array.dtype):
            slot = (self._end, array.shape, array.dtype)
            self._end += array.nbytes
            self._slots[index] = slot
        view = _bytes_of(array)
        self._checksums[index] = xxhash.xxh3_128_intdigest(view)
        written = 0
        while written < len(view):
            written += os.pwrite(self._file.fileno(), view[written:], slot[0] + written)

    def get(self, index: int) -> npt.NDArray[Any]:
        """The array kept under `index`.

        Raises:
            WorkerLostError: the file gives back something else; what was kept is lost like a worker's memory.
        """
        offset, shape, dtype = self._slots[index]
        array = np.empty(shape, dtype)
        view = _bytes_of(array)
        read = 0
        while read < len(view):
            count = os.preadv(self._file.fileno(), [view[read:]], offset + read)
            if count == 0:
                raise OSError(f"the store of hidden states ends at byte {offset + read}")
            read += count
        if xxhash.xxh3_128_intdigest(view) != self._checksums[index]:
            raise WorkerLostError(
                f"hidden states of micro-batch {index} are not what was kept in the directory for temporary files "
                f"({tempfile.gettempdir()} on {platform.node()}): check that disk, or set TMPDIR to another"
            )
        return array

    def clear(self) -> None:
        """Forgets everything and gives the disk space back."""
        self._slots.clear()
        self._end = 0
        os.ftruncate(self._file.fileno(), 0)


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    # By way of uint8, since bfloat16 arrays have no buffer protocol.
    return array.reshape(-1).view(np.uint8).data
