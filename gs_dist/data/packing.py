"""Rows of any length joined and cut into samples of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ids", "pack"]

Ids = NDArray[np.int32]


def pack(rows: Iterable[Ids], length: int, first: int, last: int) -> Iterator[Ids]:
    """Cuts the joined rows into pieces of `length` and yields pieces `first` to `last` - 1; a rest is dropped."""
    skip, left = first * length, last - first
    held: list[Ids] = []
    size = 0
    for row in rows:
        if skip >= row.size:
            skip -= row.size
            continue
        held.append(row[skip:])
        size += row.size - skip
        skip = 0
        if size < length:
            continue
        joined = np.concatenate(held)
        for start in range(0, size - length + 1, length):
            yield joined[start : start + length]
            left -= 1
            if left == 0:
                return
        size %= length
        held = [joined[joined.size - size :]]
