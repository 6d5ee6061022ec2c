"""What is told of a rounded linear."""

from __future__ import annotations

import numpy as np

from gs_dist.model.statistics import InputStatistics
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedLinear
from gs_dist.solvers.linear_figures import linear_figures
from gs_dist.solvers.objective import plain_objective
from gs_dist.solvers.rescaling import Rescaling
from gs_dist.solvers.threads import ONE_THREAD


def test_no_error_is_less_than_nothing() -> None:
    """A change that no token sees, and a Gram matrix of float32 that rounding left a little less than semidefinite."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=64)
    seen = InputStatistics(
        num_tokens=1,
        minimum=x.astype(np.float32),
        maximum=x.astype(np.float32),
        sum_abs=np.abs(x),
        sum_squares=x**2,
        gram=(np.outer(x, x) - 1e-3 * np.eye(64)).astype(np.float32),
    )
    wide = rng.normal(size=(1, 64))
    change = (wide - np.outer(wide @ x, x) / (x @ x)).astype(np.float32)
    assert plain_objective(seen).error(change) < 0
    codes = np.zeros((1, 64), dtype=np.int8)
    solved = QuantizedLinear(
        policy=QuantPolicy(), codes=codes, scale=np.ones((1, 1), dtype=np.float32), zero_point=None
    )
    figures = linear_figures(-change, None, solved, seen, Rescaling(), None, threads=ONE_THREAD)
    assert figures.error == 0.0
    assert figures.energy == 0.0
