"""Cholesky factorisation of a Gram matrix by blocks, on several threads, with the bytes of one.

Left-looking (Golub and Van Loan, "Matrix Computations", section 4.2.8): a block column is what the columns before it
leave of the matrix, and its rows do not meet. LAPACK's own factorisation runs on one thread here, since BLAS is held to
one; over many channels it takes longer than all rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from gs_dist.methods.gptq import FACTOR_COLUMNS
from gs_dist.results.quantized import Float32
from gs_dist.solvers.threads import Threads

__all__ = ["lower_factor"]

# Rows of a block column that a thread works on at a time.
_ROWS = 1024


def lower_factor(block: Callable[[slice, slice], Float32], size: int, threads: Threads) -> Float32 | None:
    """Lower L (size, size) float32 with L LT = A; None where A is not positive definite, or not finite.

    The upper triangle holds anything.

    Args:
        block: entries of A of some rows and columns, float32, a new array; asked for once each, on any thread.
        size: of A.
        threads: share the rows of a block column.
    """
    factor = np.empty((size, size), dtype=np.float32)
    for start in range(0, size, FACTOR_COLUMNS):
        columns = slice(start, min(start + FACTOR_COLUMNS, size))

        def rest(rows: slice, columns: slice = columns) -> Float32:
            entries = block(rows, columns)
            if columns.start:
                entries -= factor[rows, : columns.start] @ factor[columns, : columns.start].T
            return entries

        # The transposed view is Fortran-contiguous: LAPACK works in place, and its upper factor is our lower one.
        upper, failed = lapack.spotrf(rest(columns).T, lower=False, clean=True, overwrite_a=True)
        pivots = np.diagonal(upper)
        if failed or not (np.isfinite(pivots).all() and (pivots > 0).all()):
            return None
        factor[columns, columns] = upper.T
        inverse = _inverse_of(upper)

        def solve(top: int, columns: slice = columns, inverse: Float32 = inverse) -> None:
            rows = slice(top, min(top + _ROWS, size))
            factor[rows, columns] = rest(rows, columns) @ inverse

        threads.map(solve, range(columns.stop, size, _ROWS))
    return factor


def _inverse_of(upper: npt.NDArray[np.float32]) -> Float32:
    """Of the factor of a block on the diagonal; in float64, so that it costs no accuracy."""
    inverse, _ = lapack.dtrtri(upper.astype(np.float64), lower=False)
    return np.ascontiguousarray(inverse, dtype=np.float32)
