from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from observed import statistics_of

from gs_dist.recipe.policy import QuantPolicy
from gs_dist.solvers.bias_correction import channel_means
from gs_dist.solvers.outlier_suppression import search_exponent

ALPHAS = tuple(i / 20 for i in range(20))
STATIC = QuantPolicy(act_quant_dtype="int8", outliers_suppression="outlier-suppression-lite")
DYNAMIC = STATIC.model_copy(update={"act_quant_granularity": "per_token"})


@pytest.fixture
def problem():
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(400, 32)) * rng.lognormal(sigma=1.5, size=32)).astype(np.float32)
    weights = [(rng.normal(size=(rows, 32)) * rng.lognormal(sigma=0.5, size=32)).astype(np.float32) for rows in (24, 8)]
    return x, weights, np.abs(np.concatenate(weights)).max(axis=0)


def brute_force(x, weights, alpha, *, static, by_token=False, shift=0.0):
    """Squared output error of really rounding weights and tokens as a share of the output, in float64.

    With a shift the bias holds what the rounded weight makes of it, less the mean of the weight's error.
    """
    x = x.astype(np.float64)
    w_max = np.abs(np.concatenate(weights)).max(axis=0)
    token = 1 / (x**2).sum(axis=1, keepdims=True) if by_token else 1.0
    exact = x @ np.concatenate(weights).T.astype(np.float64)
    s = np.abs(x - shift).max(axis=0) ** alpha / w_max ** (1 - alpha)
    total = 0.0
    for weight in weights:
        scaled = weight.astype(np.float64) * s
        step = np.abs(scaled).max(axis=1, keepdims=True) / 127.5
        rounded = np.clip(np.round(scaled / step), -128, 127) * step
        activation = (x - shift) / s
        size = np.abs(activation).max(axis=None if static else 1, keepdims=True) / 127.5
        seen = np.clip(np.round(activation / size), -128, 127) * size
        found = (seen + shift / s) @ rounded.T
        if np.any(shift):
            found -= (x / s).mean(axis=0) @ (rounded - scaled).T
        total += (token * (found - x @ weight.T.astype(np.float64)) ** 2).sum()
    return total / (token * exact**2).sum()


@pytest.mark.parametrize("policy", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_losses_agree_with_rounding_weights_and_tokens(problem, policy):
    """The loss from statistics is the loss of a forward pass, and the best exponent is nearly the best there."""
    x, weights, weight_max = problem
    found = search_exponent(weights, weight_max, statistics_of(x), policy, alphas=ALPHAS, scale_dtype="float32")
    exact = np.array([brute_force(x, weights, alpha, static=policy.is_static) for alpha in ALPHAS])
    ratio = np.array(found.losses) / exact
    if policy.is_static:
        np.testing.assert_allclose(ratio, 1.0, atol=0.1)
    else:
        assert np.all((ratio > 0.6) & (ratio < 1.6))  # the step of a token is an estimate
    assert exact[ALPHAS.index(found.alpha)] <= 1.1 * exact.min()
    assert found.loss == min(found.losses)


@pytest.mark.parametrize("policy", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_tokens_of_ordinary_energy_count_beside_massive_ones(problem, policy):
    """With a weighted Gram matrix the loss is the sum of both relative errors, of all tokens and by token."""
    x, weights, weight_max = problem
    x = x.copy()
    x[7, 3] *= 100
    seen = statistics_of(x, weighted=True)
    found = search_exponent(weights, weight_max, seen, policy, alphas=ALPHAS, scale_dtype="float32")
    exact = [
        sum(brute_force(x, weights, alpha, static=policy.is_static, by_token=b) for b in (False, True))
        for alpha in ALPHAS
    ]
    ratio = np.array(found.losses) / exact
    assert np.all((ratio > 0.4) & (ratio < 2.5))  # a token's energy and step are estimates
    assert exact[ALPHAS.index(found.alpha)] <= 1.25 * min(exact)


def test_the_first_of_equals_wins(problem):
    """With one exponent listed twice the earlier one is taken."""
    x, weights, weight_max = problem
    seen = statistics_of(x)
    found = search_exponent(weights, weight_max, seen, STATIC, alphas=(0.5, 0.5), scale_dtype="float32")
    assert found.losses[0] == found.losses[1]
    assert found.alpha == 0.5
    single = search_exponent(weights, weight_max, seen, STATIC, alphas=(0.5,), scale_dtype="float32")
    np.testing.assert_array_equal(single.scale, found.scale)


def test_plus_searches_up_to_one_on_the_shifted_input(problem):
    """Channels far from 0 are centred, and the loss falls."""
    x, weights, weight_max = problem
    x = x + np.linspace(-40, 40, 32, dtype=np.float32)
    seen = statistics_of(x, histogram=True)
    alphas = QuantPolicy(act_quant_dtype="int8", outliers_suppression="outlier-suppression+").exponents
    assert alphas[-1] == 1.0
    shift, means = (seen.maximum + seen.minimum) / 2, channel_means(seen)
    search = partial(search_exponent, weights, weight_max, seen, STATIC, alphas=alphas, scale_dtype="float32")
    plain, corrected, shifted = search(), search(means=means), search(shift=shift, means=means)
    assert corrected.loss < plain.loss
    assert shifted.loss < corrected.loss
    exact = brute_force(x, weights, shifted.alpha, static=True, shift=shift.astype(np.float64))
    np.testing.assert_allclose(shifted.loss / exact, 1.0, atol=0.25)  # means are known to a fraction of a bin


def test_tied_channels_get_the_same_scale(problem):
    """Whatever must share a scale does."""
    x, weights, _ = problem

    def tie(values):
        pairs = values.reshape(-1, 2)
        return np.repeat(pairs.max(axis=1), 2)

    weight_max = tie(np.abs(np.concatenate(weights)).max(axis=0))
    found = search_exponent(
        weights, weight_max, statistics_of(x), STATIC, alphas=ALPHAS, scale_dtype="float32", tie=tie
    )
    np.testing.assert_array_equal(found.scale[::2], found.scale[1::2])
