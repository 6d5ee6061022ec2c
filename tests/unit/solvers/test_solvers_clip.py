"""Weight clipping against brute force over materialised inputs in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gs_dist.recipe.policy import QuantPolicy
from gs_dist.solvers import clip
from gs_dist.solvers.clip import clip_weight
from gs_dist.solvers.objective import DiagonalObjective, GramObjective

Array = npt.NDArray[Any]


def policy(*, group_size: int = 64, symmetric: bool = True, bits: int = 4, **algo_args: Any) -> QuantPolicy:
    return QuantPolicy(
        weight_quant_dtype="qint4x2" if bits == 4 else "int8",
        weight_quant_granularity="per_group" if group_size else "per_channel",
        group_size=group_size,
        weight_symmetric=symmetric,
        weight_clip=True,
        algo_args=algo_args,
    )


def problem(seed: int = 0) -> tuple[Array, Array]:
    """Weights with long tails, and inputs whose channels differ in size and go together."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 128)) @ (np.eye(128) + 0.1 * rng.standard_normal((128, 128)))
    x = x * np.exp(0.5 * rng.standard_normal(128))
    return rng.standard_t(4, (12, 128)).astype(np.float32), x.astype(np.float32)


def partial_error(w: Array, x: Array, ratio: float, bits: int, symmetric: bool) -> float:
    """Squared error of one group's partial product over all tokens, its range shrunk by `ratio`.

    Codes are found in float32: the most negative weight of a symmetric range lies half way between two.
    """
    low = float(np.float32(min(float(w.min()), 0.0)) * np.float32(ratio))
    high = float(np.float32(max(float(w.max()), 0.0)) * np.float32(ratio))
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = np.float32((2 * max(-low, high) if symmetric else high - low) / (2**bits - 1))
    zero = np.float32(0.0 if symmetric else np.clip(np.rint(smallest - low / float(scale)), smallest, largest))
    codes = np.clip(np.rint(w / scale + zero), smallest, largest)
    back = (codes - zero).astype(np.float64) * float(scale)
    return float((((back - w) @ x.T.astype(np.float64)) ** 2).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "bits"), [(64, 4), (0, 4), (0, 8)])
def test_every_range_takes_the_ratio_of_least_output_error(symmetric: bool, group_size: int, bits: int) -> None:
    """For each output channel and group the choice is that of trying all ratios on all tokens."""
    weight, x = problem()
    used = policy(group_size=group_size, symmetric=symmetric, bits=bits)
    result = clip_weight(weight, GramObjective(x.T @ x), used, scale_dtype="float32")
    ratios = used.clip_ratios
    size = group_size or 128
    before = after = 0.0
    for row in range(len(weight)):
        for group in range(128 // size):
            columns = slice(group * size, (group + 1) * size)
            errors = [partial_error(weight[row, columns], x[:, columns], r, bits, symmetric) for r in ratios]
            chosen = int(np.abs(np.array(ratios) - result.ratio[row, group]).argmin())
            assert errors[chosen] <= min(errors) * 1.001
            before, after = before + errors[0], after + errors[chosen]
    assert result.loss_before == pytest.approx(before, rel=1e-3)
    assert result.loss_after == pytest.approx(after, rel=1e-3)
    if bits == 4:
        assert after < 0.9 * before


@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_of_wide_ranges_ends_early_with_the_ratios_of_a_whole_one(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 2048 weights, normal and with long tails: what is left out would not have been chosen."""
    rng = np.random.default_rng(5)
    weight = np.concatenate([rng.standard_normal((24, 2048)), rng.standard_t(4, (24, 2048))]).astype(np.float32)
    objective = DiagonalObjective(np.exp(rng.standard_normal(2048)))
    used = policy(group_size=0, bits=bits)
    ended = clip_weight(weight, objective, used, scale_dtype="float32")
    monkeypatch.setattr(clip, "_HOPELESS", np.inf)
    whole = clip_weight(weight, objective, used, scale_dtype="float32")
    np.testing.assert_array_equal(ended.ratio, whole.ratio)
    assert len(np.unique(whole.ratio)) > 1


def test_a_single_ratio_is_used_as_it_is() -> None:
    """A float is no search: every range is shrunk by it, for better or worse."""
    weight, x = problem()
    result = clip_weight(weight, GramObjective(x.T @ x), policy(weight_clip_ratio=0.5), scale_dtype="float32")
    np.testing.assert_array_equal(result.ratio, np.full((12, 2), 0.5, dtype=np.float32))


def test_the_whole_range_competes_even_if_not_listed() -> None:
    """A list of bad ratios never makes a weight worse."""
    weight, x = problem()
    result = clip_weight(weight, GramObjective(x.T @ x), policy(weight_clip_ratio=(0.1, 0.05)), scale_dtype="float32")
    np.testing.assert_array_equal(result.ratio, np.ones((12, 2), dtype=np.float32))
    assert result.loss_after == result.loss_before


def test_a_zero_weight_stays_zero() -> None:
    """A group of zeros has no range to shrink: the first ratio stands and nothing is NaN."""
    weight, x = problem()
    weight[3, :64] = 0.0
    result = clip_weight(weight, GramObjective(x.T @ x), policy(), scale_dtype="float32")
    assert result.ratio[3, 0] == 1.0
    assert np.isfinite(result.loss_after)


@pytest.mark.parametrize("group_size", [0, 64])
def test_arguments_are_left_as_they_were(group_size: int) -> None:
    """Weight and Gram matrix may be read-only views of a checkpoint and of kept statistics."""
    weight, x = problem()
    gram = x.T @ x
    weight.setflags(write=False)
    gram.setflags(write=False)
    clip_weight(weight, GramObjective(gram), policy(group_size=group_size), scale_dtype="float32")


def test_rows_do_not_meet() -> None:
    """A weight higher than a tile is clipped as its rows would be alone."""
    rng = np.random.default_rng(1)
    weight = rng.standard_t(4, (2100, 1024)).astype(np.float32)
    x = rng.standard_normal((64, 1024)).astype(np.float32)
    gram = x.T @ x
    used = policy(weight_clip_ratio=(1.0, 0.8))
    whole = clip_weight(weight, GramObjective(gram), used, scale_dtype="float32")
    last = clip_weight(weight[2000:], GramObjective(gram), used, scale_dtype="float32")
    assert (whole.ratio[2000:] == last.ratio).mean() > 0.99
    np.testing.assert_allclose(whole.loss_after / 2100, last.loss_after / 100, rtol=0.1)
