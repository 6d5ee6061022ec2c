"""One thread for BLAS wherever its sums are kept.

OpenBLAS splits a product differently on two threads than on one and then sums in another order, and the
published bytes must not depend on how many cores a machine has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import scipy.linalg.blas  # noqa: F401 - loads the BLAS of SciPy, for the controller to find
from threadpoolctl import ThreadpoolController

__all__ = ["one_thread"]


@cache
def _controller() -> ThreadpoolController:
    # Looking through the loaded libraries takes 2 ms, which would add up over every layer of a micro-batch.
    return ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    """Holds the BLAS of NumPy and SciPy to one thread in this process while the block runs.

    The limit is the process's: of several threads that use BLAS, the one that starts and joins the
    others must hold it.
    """
    with _controller().limit(limits=1, user_api="blas"):
        yield
