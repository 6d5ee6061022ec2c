"""A Gram matrix while tokens are added: the sum of x xT, tile by tile, on as many threads as are free.

Tiles above the diagonal alone are multiplied. NumPy's products let other threads run; SciPy's symmetric update
(`scipy.linalg.blas.ssyrk`) holds the interpreter's lock, so that everything else of a worker would wait for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.solvers.threads import Threads

__all__ = ["GramSums"]

Array = npt.NDArray[Any]

# Channels of a tile: enough for BLAS to work as fast as on the whole; its product of 16 MiB is all that a thread adds.
# It is part of what the sums are, so that any number of threads gives the same bytes.
_TILE = 2048


class GramSums:
    """The sum of x xT over tokens of `channels` channels, float32.

    The caller holds BLAS to one thread (`blas.one_thread`), since OpenBLAS sums in another order on two.
    """

    def __init__(self, channels: int) -> None:
        self._matrix = np.zeros((channels, channels), np.float32)
        self._edges = [slice(start, min(start + _TILE, channels)) for start in range(0, channels, _TILE)]

    def add(self, tokens: Array, threads: Threads) -> None:
        """Adds (tokens, channels) float32."""
        threads.map(lambda first: self._add_strip(tokens, first), range(len(self._edges)))  # the longest strip first

    def _add_strip(self, tokens: Array, first: int) -> None:
        rows = self._edges[first]
        product = np.empty((rows.stop - rows.start, rows.stop - rows.start), np.float32)
        for columns in self._edges[first:]:
            tile = product[:, : columns.stop - columns.start]
            np.matmul(tokens[:, rows].T, tokens[:, columns], out=tile)
            self._matrix[rows, columns] += tile

    def taken(self) -> Array:
        """The whole matrix (channels, channels), symmetric; nothing may be added afterwards."""
        for first, rows in enumerate(self._edges):
            tile = self._matrix[rows, rows]
            tile[...] = np.triu(tile) + np.triu(tile, 1).T
            for columns in self._edges[first + 1 :]:
                self._matrix[columns, rows] = self._matrix[rows, columns].T
        return self._matrix
