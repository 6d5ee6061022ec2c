from __future__ import annotations

import numpy as np
import pytest
from observed import statistics_of

from gs_dist.solvers.bias_correction import channel_means
from gs_dist.solvers.rescaling import Rescaling


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    spread = rng.lognormal(size=20)
    return (spread * (rng.normal(size=(600, 20)) + np.linspace(-2, 6, 20))).astype(np.float32)


def test_means_are_those_of_the_tokens(x):
    """Exact for a channel of one sign; for others as exact as the histogram's bins."""
    means = channel_means(statistics_of(x, histogram=True))
    error = np.abs(means.plain - x.mean(axis=0)) / x.std(axis=0)
    one_sign = (x.min(axis=0) >= 0) | (x.max(axis=0) <= 0)
    assert one_sign.any()
    assert not one_sign.all()
    assert error[one_sign].max() < 1e-5
    assert error.max() < 0.05


def test_without_a_histogram_a_channel_of_both_signs_counts_as_centred(x):
    """What is not known is not corrected."""
    means = channel_means(statistics_of(x))
    both = (x.min(axis=0) < 0) & (x.max(axis=0) > 0)
    np.testing.assert_array_equal(means.usual[both], 0.0)
    np.testing.assert_allclose(means.usual[~both], x.mean(axis=0)[~both], rtol=1e-5)


def test_one_enormous_token_does_not_move_the_usual_mean(x):
    """The plain mean follows it, the usual one stays with the other tokens."""
    x = x.copy()
    x[5, 3] = 1e5
    means = channel_means(statistics_of(x, histogram=True))
    others = np.delete(x, 5, axis=0)[:, 3]
    assert means.plain[3] > 100
    assert abs(means.usual[3] - others.mean()) < 0.3 * others.std()


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_left_of_an_error_is_what_corrected_outputs_have(x, by_token, scaled):
    """The error predicted after the correction is that of computing all outputs with the corrected bias."""
    rng = np.random.default_rng(1)
    scale = rng.lognormal(size=20).astype(np.float32) if scaled else None
    seen = statistics_of(x, weighted=True, histogram=True)
    rescaling = Rescaling(scale=scale, means=channel_means(seen))
    weight = rng.normal(size=(7, 20)).astype(np.float32)
    restored = (weight + 0.01 * rng.normal(size=weight.shape)).astype(np.float32)
    bias = rescaling.bias_of(restored, weight, None)
    read = x.astype(np.float64) if scale is None else x / scale.astype(np.float64)
    error = read @ (restored - weight).T.astype(np.float64) + bias
    token = 1 / (x.astype(np.float64) ** 2).sum(axis=1, keepdims=True) if by_token else 1.0
    found = rescaling.weight_error(restored - weight, seen, by_token=by_token)
    # 1 / x.x of a token and its values are not independent, which the estimate by token takes them for.
    assert found == pytest.approx((token * error**2).sum(), rel=0.3 if by_token else 0.02)
    assert found < 0.7 * Rescaling(scale=scale).weight_error(restored - weight, seen, by_token=by_token)


def test_a_shift_is_given_back_by_the_bias():
    """(x - shift) / scale through the rounded weight, plus the bias, is x / scale through it, less the mean error."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 6)).astype(np.float32)
    shift, scale = rng.normal(size=6).astype(np.float32), rng.lognormal(size=6).astype(np.float32)
    means = channel_means(statistics_of(x, histogram=True))
    weight, bias = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    restored = np.round(weight, 1)
    total = Rescaling(scale=scale, shift=shift, means=means).bias_of(restored, weight, bias)
    found = ((x - shift) / scale) @ restored.T + total
    wanted = (x / scale) @ restored.T + bias - (means.usual / scale) @ (restored - weight).T
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
