"""The blocked factorisation against LAPACK's own."""

from __future__ import annotations

import numpy as np
import pytest

from gs_dist.methods.gptq import FACTOR_COLUMNS
from gs_dist.results.quantized import Float32
from gs_dist.solvers.blas import one_thread
from gs_dist.solvers.cholesky import lower_factor
from gs_dist.solvers.threads import Threads

SIZE = 2 * FACTOR_COLUMNS + 77  # two whole blocks and a short one


def positive(size: int, *, seed: int = 0) -> Float32:
    """A Gram matrix of unlike channels, damped as GPTQ damps it."""
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((2 * size, size)) * np.exp(rng.standard_normal(size))
    gram = tokens.T @ tokens
    return np.asarray(gram + 0.01 * np.diagonal(gram).mean() * np.eye(size), dtype=np.float32)


def factor(matrix: Float32, threads: int = 1) -> Float32 | None:
    """What `lower_factor` makes of a matrix, the triangle above left out."""
    with one_thread(), Threads(threads) as several:
        found = lower_factor(lambda rows, columns: matrix[rows, columns].copy(), len(matrix), several)
    return None if found is None else np.tril(found)


@pytest.mark.parametrize("size", [1, FACTOR_COLUMNS, FACTOR_COLUMNS + 1, SIZE])
def test_the_factor_is_that_of_float64_but_for_float32(size: int) -> None:
    """Whether it is one block, a whole number of them, or has a short one at the end."""
    matrix = positive(size)
    found = factor(matrix)
    assert found is not None
    expected = np.linalg.cholesky(matrix.astype(np.float64))
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_any_number_of_threads_gives_the_same_bytes() -> None:
    """Each block of rows is one thread's work, whichever thread that is."""
    matrix = positive(2 * SIZE)
    one, two, three = (factor(matrix, threads) for threads in (1, 2, 3))
    assert one is not None
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("place", [0, FACTOR_COLUMNS + 5, SIZE - 1])
@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_a_matrix_that_is_not_positive_definite_has_no_factor(place: int, value: float) -> None:
    """Wherever the first bad pivot stands."""
    matrix = positive(SIZE)
    matrix[place, place] = value
    assert factor(matrix) is None
