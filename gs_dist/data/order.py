"""The order in which a seed takes rows from all over the data."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from gs_dist.data.rows import Rows

__all__ = ["SeededOrder"]

_KEYS_AT_ONCE = 1 << 20  # row numbers hashed together
_ROWS_AT_ONCE = 1024  # the fewest row numbers that are held


class SeededOrder:
    """Row numbers by a hash of seed and number: an order of the whole dataset that need not be held.

    The hash is splitmix64 (Steele, Lea and Flood, 2014), spelt out so that no library release changes it.
    """

    def __init__(self, total: int, seed: int) -> None:
        self._total = total
        self._seed = np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little"))
        self._known: Rows = np.zeros(0, np.int64)

    def rows(self, start: int, stop: int) -> Rows:
        """The start-th to (stop - 1)-th row numbers of the order."""
        if stop > self._known.size:
            self._known = self._first(min(max(2 * stop, _ROWS_AT_ONCE), self._total))
        return self._known[start:stop]

    def _first(self, count: int) -> Rows:
        keys, numbers = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        for start in range(0, self._total, _KEYS_AT_ONCE):
            more = np.arange(start, min(start + _KEYS_AT_ONCE, self._total), dtype=np.int64)
            keys, numbers = np.append(keys, self._keys(more)), np.append(numbers, more)
            best = np.lexsort((numbers, keys))[:count]
            keys, numbers = keys[best], numbers[best]
        return numbers

    def _keys(self, numbers: Rows) -> NDArray[np.uint64]:
        z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + self._seed
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
