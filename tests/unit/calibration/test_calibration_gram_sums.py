"""The Gram matrix by tiles, against the product of all tokens in float64."""

from __future__ import annotations

import numpy as np
import pytest

from gs_dist.calibration.gram_sums import GramSums
from gs_dist.solvers.blas import one_thread
from gs_dist.solvers.threads import Threads


def summed(tokens: list[np.ndarray], threads: int) -> np.ndarray:  # type: ignore[type-arg]
    """The matrix of some micro-batches."""
    sums = GramSums(tokens[0].shape[1])
    with one_thread(), Threads(threads) as several:
        for part in tokens:
            sums.add(part, several)
    return sums.taken()


@pytest.mark.parametrize("channels", [1, 7, 2048, 2100])
def test_tiles_make_the_whole_symmetric_matrix(channels: int) -> None:
    """Below one tile, one exactly, and two with a short one at the end; micro-batches add up."""
    rng = np.random.default_rng(channels)
    tokens = [rng.standard_normal((count, channels)).astype(np.float32) for count in (40, 1, 23)]
    found = summed(tokens, 1)
    every = np.concatenate(tokens).astype(np.float64)
    np.testing.assert_allclose(found, every.T @ every, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found, found.T)
    assert found.flags.c_contiguous


def test_any_number_of_threads_gives_the_same_bytes() -> None:
    """A tile is one thread's work, whichever that is."""
    tokens = [np.random.default_rng(3).standard_normal((64, 3000)).astype(np.float32)]
    one = summed(tokens, 1)
    for threads in (2, 3):
        np.testing.assert_array_equal(one, summed(tokens, threads))
