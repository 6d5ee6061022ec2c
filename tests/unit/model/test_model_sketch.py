"""Sketches of second moments: what they are, how they merge, and how near they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_dist.model.sketch import Sketch, rows_and_signs, sketch_nbytes
from gs_dist.model.token_sample import token_ids

Array = npt.NDArray[Any]


def sketch_of(x: Array, num_rows: int, *, first_sample: int = 0, weights: Array | None = None) -> Sketch:
    """By the definition, token by token."""
    weights = np.ones(len(x)) if weights is None else weights
    rows, signs = rows_and_signs(token_ids(first_sample, len(x)), num_rows)
    sums, ones = np.zeros((num_rows, x.shape[1])), np.zeros(num_rows)
    for token, row, sign, weight in zip(x.astype(np.float64), rows, signs, weights, strict=True):
        sums[row] += np.sqrt(weight) * sign * token
        ones[row] += np.sqrt(weight) * sign
    wide = x.astype(np.float64)
    return Sketch.of_sums(sums.astype(np.float32), ones, weights @ wide, weights @ wide**2, float(weights.sum()))


def estimate(sketch: Sketch, delta: Array) -> float:
    """|D FT|^2."""
    return float(((delta @ sketch.factor.T.astype(np.float64)) ** 2).sum())


def exact(x: Array, delta: Array) -> float:
    """tr(D G DT) from the tokens."""
    return float(((x.astype(np.float64) @ delta.T) ** 2).sum())


def correlated(tokens: int, channels: int, seed: int) -> Array:
    """Tokens with a common mean, a few strong directions and channels of very different loudness."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, 12)) @ rng.standard_normal((12, channels)) + rng.standard_normal(
        (tokens, channels)
    )
    return np.asarray((x + 2 * rng.standard_normal(channels)) * rng.lognormal(sigma=1.0, size=channels), np.float32)


def test_rows_and_signs_depend_on_the_token_alone() -> None:
    """However micro-batches are dealt, a token keeps its row and sign; rows are filled evenly, signs are balanced."""
    places = [token_ids(micro_batch, 512) for micro_batch in range(40)]
    together = rows_and_signs(np.concatenate(places), 256)
    apart = [rows_and_signs(part, 256) for part in places]
    for part in (0, 1):
        assert np.array_equal(together[part], np.concatenate([pair[part] for pair in apart]))
    counts = np.bincount(together[0], minlength=256)
    assert counts.min() > 40
    assert counts.max() < 130
    assert abs(float(together[1].mean())) < 0.03


@pytest.mark.parametrize("weighted", [False, True])
def test_a_sketch_of_256_rows_tells_errors_within_two_percent(weighted: bool) -> None:
    """For the rounding errors of a matrix and for the matrix itself, whose energy lies in few directions."""
    x = correlated(4000, 600, seed=1)
    weights = 1.0 / (x.astype(np.float64) ** 2).sum(axis=1) if weighted else np.ones(len(x))
    seen = x * np.sqrt(weights)[:, None]
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((200, 600))
    for delta in (weight, np.round(weight * 20) / 20 - weight):
        found = estimate(sketch_of(x, 256, weights=weights), delta)
        assert found == pytest.approx(exact(seen, delta), rel=0.02)


def test_a_token_that_owns_the_energy_adds_no_noise() -> None:
    """One token with 240,000 times the median's energy: what it weighs is exact, whichever row it falls into."""
    x = correlated(2000, 600, seed=3)
    x[700] *= np.float32(np.sqrt(2.4e5))
    delta = np.random.default_rng(4).standard_normal((50, 600))
    for first_sample in range(5):
        assert estimate(sketch_of(x, 64, first_sample=first_sample), delta) == pytest.approx(exact(x, delta), rel=0.02)


def test_a_single_channel_and_the_mean_token_are_exact() -> None:
    """A change of one channel costs its energy; one that sees only the mean token, that token's."""
    x = correlated(500, 300, seed=5)
    sketch = sketch_of(x, 32)
    one = np.zeros((1, 300))
    one[0, 17] = 0.3
    assert estimate(sketch, one) == pytest.approx(exact(x, one), rel=1e-4)
    alike = np.repeat(x[:1], 500, axis=0)
    dense = np.random.default_rng(6).standard_normal((4, 300))
    assert estimate(sketch_of(alike, 32), dense) == pytest.approx(exact(alike, dense), rel=1e-4)


@given(st.integers(0, 2**32), st.integers(17, 40), st.integers(2, 30))
@settings(max_examples=25, deadline=None)
def test_sketches_merge_by_sum(seed: int, channels: int, tokens: int) -> None:
    """Of two sets of tokens the merged sketch is that of both, to the precision of its rows; in place or not."""
    x = np.random.default_rng(seed).standard_normal((2, tokens, channels)).astype(np.float32)
    left, right = (sketch_of(part, 16, first_sample=sample) for sample, part in enumerate(x))
    merged = left.merge(right)
    for name, array in merged.to_arrays().items():
        one, other = (side.to_arrays()[name].astype(np.float64) for side in (left, right))
        np.testing.assert_allclose(array.astype(np.float64), one + other, rtol=2**-8, atol=1e-6, err_msg=name)
    in_place = left.merge(right, in_place=True)
    assert in_place.rows is left.rows
    assert np.array_equal(in_place.rows, merged.rows)


def test_sketches_of_different_sizes_are_refused() -> None:
    """Another number of rows is another hash."""
    x = np.ones((3, 20), np.float32)
    with pytest.raises(ValueError, match=r"\(16, 20\) and \(8, 20\)"):
        sketch_of(x, 16).merge(sketch_of(x, 8))


def test_the_planned_size_is_the_size() -> None:
    """`sketch_nbytes` counts every array."""
    arrays = sketch_of(np.ones((3, 20), np.float32), 16).to_arrays()
    assert sum(array.nbytes for array in arrays.values()) == sketch_nbytes(16, 20)


def test_no_token_and_silent_channels_leave_zeros() -> None:
    """Nothing is divided by nothing."""
    x = np.zeros((4, 20), np.float32)
    assert not sketch_of(x, 16).factor.any()
    assert not sketch_of(x[:0], 16).factor.any()
