"""Coordinate descent on codes, against a float64 loop and by what it promises."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gs_dist.numbers.integer import INT4
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.solvers import coordinate_descent
from gs_dist.solvers.affine import quantize_weight
from gs_dist.solvers.coordinate_descent import descend
from gs_dist.solvers.objective import GramObjective
from gs_dist.solvers.rounding import round_weight
from gs_dist.solvers.threads import Threads


def problem(rows: int = 24, columns: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the Gram matrix of inputs whose channels depend on each other."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) / np.sqrt(columns) + np.diag(rng.lognormal(size=columns))
    x = rng.normal(size=(4 * columns, columns)) @ mixing
    return rng.normal(size=(rows, columns)).astype(np.float32), (x.T @ x).astype(np.float32)


def values(codes: Any, scale: Any, zero: Any, size: int) -> np.ndarray:
    step = np.repeat(scale.astype(np.float64), size, axis=1)
    return (codes - (0 if zero is None else np.repeat(zero.astype(np.float64), size, axis=1))) * step


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sweep_is_that_of_a_float64_loop(symmetric: bool) -> None:
    """Each channel in turn takes the code nearest to the minimum of the loss, given all others as they stand."""
    weight, gram = problem()
    codes, scale, zero = quantize_weight(weight, form=INT4, group_size=64, symmetric=symmetric, scale_dtype="float32")
    expected = codes.astype(np.float64)
    for channel in range(128):
        change = values(expected, scale, zero, 64) - weight
        wanted = change @ gram.astype(np.float64)[:, channel] / float(gram[channel, channel])
        step = scale[:, channel // 64].astype(np.float64)
        expected[:, channel] = np.clip(np.rint(expected[:, channel] - wanted / step), -8, 7)
    found = descend(weight, codes, scale, zero, None, gram, form=INT4, sweeps=1)
    assert (found == expected).mean() > 0.999, "a code on the edge of rounding may fall otherwise in float32"
    assert (found != codes).any()


def test_more_sweeps_never_cost_and_the_last_leaves_nothing_to_gain() -> None:
    """The loss falls from sweep to sweep, and in the end no single code is better one up or down."""
    weight, gram = problem()
    codes, scale, _ = quantize_weight(weight, form=INT4, group_size=64, symmetric=True, scale_dtype="float32")
    found = [descend(weight, codes, scale, None, None, gram, form=INT4, sweeps=sweeps) for sweeps in (1, 2, 4, 100)]
    losses = [
        GramObjective(gram).error(values(c, scale, None, 64).astype(np.float32) - weight) for c in (codes, *found)
    ]
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] < 0.7 * losses[0]
    last = found[-1].astype(np.float64)
    slope = (values(last, scale, None, 64) - weight) @ gram.astype(np.float64)
    steps = np.repeat(scale.astype(np.float64), 64, axis=1)
    for direction in (-1, 1):
        gain = 2 * direction * steps * slope + steps**2 * np.diagonal(gram)
        assert (gain[(last + direction >= -8) & (last + direction <= 7)] > -1e-3 * losses[-1]).all()


@pytest.mark.parametrize(
    "given_args",
    [{}, {"desc_act": True, "static_groups": True}, {"desc_act": True}],
    ids=["natural order", "two passes", "scattered groups"],
)
@pytest.mark.parametrize("group_size", [0, 64])
def test_it_betters_gptq_with_gptqs_scales(given_args: dict[str, Any], group_size: int) -> None:
    """Scales, zero points and groups are those of GPTQ, the loss is lower."""
    weight, gram = problem()
    results = {}
    for recovery in ("gptq", "coordinate-descent"):
        policy = QuantPolicy(
            weight_quant_dtype="qint4x2",
            weight_quant_granularity="per_group" if group_size else "per_channel",
            group_size=group_size,
            weight_symmetric=False,
            precision_recovery=recovery,
            algo_args=AlgoArgs(**given_args),
        )
        results[recovery], _ = round_weight(weight, policy, GramObjective(gram), "float32")
    before, after = results.values()
    for field in ("scale", "zero_point", "group_index"):
        np.testing.assert_array_equal(getattr(before, field), getattr(after, field))
    losses = [GramObjective(gram).error(solved.dequantized() - weight) for solved in (before, after)]
    assert losses[1] < 0.99 * losses[0]
    assert after.policy.label.startswith("CD-W4-")


def test_tiles_and_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent; what is given is left alone, and a channel without input keeps its codes."""
    weight, gram = problem(rows=50)
    gram[5] = gram[:, 5] = 0
    codes, scale, _ = quantize_weight(weight, form=INT4, group_size=0, symmetric=True, scale_dtype="float32")
    given = codes.copy()
    whole = descend(weight, codes, scale, None, None, gram, form=INT4, sweeps=3)
    monkeypatch.setattr(coordinate_descent, "TILE_ROWS", 16)
    with Threads(3) as threads:
        tiled = descend(weight, codes, scale, None, None, gram, form=INT4, sweeps=3, threads=threads)
        alone = descend(weight, codes, scale, None, None, gram, form=INT4, sweeps=3)
    np.testing.assert_array_equal(tiled, alone)
    assert (tiled == whole).mean() > 0.999, "products of other shapes may differ in their last bits"
    np.testing.assert_array_equal(codes, given)
    np.testing.assert_array_equal(whole[:, 5], given[:, 5])
