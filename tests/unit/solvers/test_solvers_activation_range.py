from __future__ import annotations

from functools import partial

import numpy as np
import observed
import pytest
from fake_rounding import fake_quantize_static
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_dist.model.statistics import histogram_magnitudes
from gs_dist.solvers import activation_range
from gs_dist.solvers.activation_range import (
    central_range,
    channel_rounding,
    least_error_range,
    minmax_range,
    range_profile,
    shifted_counts,
)

statistics_of = partial(observed.statistics_of, gram=False, histogram=True)


def activations(rng, *, outliers=True, tokens=3000, channels=24):
    x = rng.normal(size=(tokens, channels)) * rng.lognormal(size=channels)
    if outliers:
        x[rng.integers(0, tokens, 3), rng.integers(0, channels, 3)] *= 300
    return x.astype(np.float32)


def exact_error(x, scale, columns, chosen):
    """Sum over tokens and channels of the true squared rounding error, in float64."""
    values = (x / scale).astype(np.float32)
    rounded = fake_quantize_static(values, chosen.scale, chosen.zero_point)
    return float((((rounded - values).astype(np.float64) ** 2) * columns).sum())


def test_minmax_covers_everything_seen():
    """absmax/127.5, or the whole range with a zero point, extended to include 0."""
    x = np.array([[0.5, 3.0], [1.0, 2.0]], np.float32)
    seen = statistics_of(x)
    assert minmax_range(seen, symmetric=True, scale_dtype="float32").scale == pytest.approx(3 / 127.5)
    found = minmax_range(seen, symmetric=False, scale_dtype="float32")
    assert (found.scale, found.zero_point) == (pytest.approx(3 / 255), -128)


@pytest.mark.parametrize("zero_point", [None, -100, 0, 90])
@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
def test_the_profile_predicts_the_error_of_any_range(share, zero_point):
    """Expected errors from histograms agree with rounding the very values."""
    rng = np.random.default_rng(0)
    x, scale, columns = activations(rng), rng.lognormal(size=24), rng.lognormal(size=24)
    profile = range_profile(statistics_of(x), scale, columns)
    step = share * np.abs(x / scale).max() / 127.5
    chosen = activation_range.ActivationRange(scale=float(np.float32(step)), zero_point=zero_point)
    exact = exact_error(x, scale, columns, chosen)
    assert profile.error(chosen.scale, zero_point) == pytest.approx(exact, rel=0.1)
    per_channel = channel_rounding(statistics_of(x), scale, chosen)
    assert float(per_channel @ columns) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("peak", [3e3, 2e4, 6e4, 3e5])
def test_massive_values_are_priced_at_their_size(peak):
    """However large a value, the range chosen is nearly the best one, and its error is predicted."""
    rng = np.random.default_rng(3)
    x = rng.normal(scale=30, size=(4000, 8))
    x[rng.integers(0, 4000, 100), rng.integers(0, 8, 100)] = peak * rng.uniform(0.7, 1, 100)
    x = x.astype(np.float32)
    columns, one = np.ones(8), np.ones(8)
    profile = range_profile(statistics_of(x), None, columns)
    found = least_error_range(profile, symmetric=True, scale_dtype="float32")
    largest = float(np.abs(x).max())
    tried = [activation_range.ActivationRange(scale=largest / 2 ** (i / 8) / 127.5, zero_point=None) for i in range(80)]
    best = min(exact_error(x, one, columns, choice) for choice in tried)
    exact = exact_error(x, one, columns, found)
    assert exact < 1.15 * best
    assert found.rounding == pytest.approx(exact, rel=0.25)
    predicted = float(channel_rounding(statistics_of(x), None, found) @ columns)
    assert predicted == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize("zero_point", [None, 90])
@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
def test_the_profile_predicts_the_error_of_a_shifted_activation(share, zero_point):
    """Histograms of x tell what rounding (x - shift) / scale costs."""
    rng = np.random.default_rng(8)
    middle = rng.normal(scale=3, size=24)
    x, scale, columns = activations(rng) + middle.astype(np.float32), rng.lognormal(size=24), rng.lognormal(size=24)
    shift = (0.9 * middle).astype(np.float32)
    profile = range_profile(statistics_of(x), scale, columns, shift=shift)
    step = share * np.abs((x - shift) / scale).max() / 127.5
    chosen = activation_range.ActivationRange(scale=float(np.float32(step)), zero_point=zero_point)
    exact = exact_error(x - shift, scale, columns, chosen)
    assert profile.error(chosen.scale, zero_point) == pytest.approx(exact, rel=0.15)
    per_channel = channel_rounding(statistics_of(x), scale, chosen, shift=shift)
    assert float(per_channel @ columns) == pytest.approx(exact, rel=0.15)
    if share < 0.1:  # wider steps round nearly all values to 0 wherever they are
        unshifted = range_profile(statistics_of(x), scale, columns).error(chosen.scale, zero_point)
        assert unshifted != pytest.approx(exact, rel=0.3)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_shifted_counts_keep_every_value_and_move_their_mean(seed):
    """No value is lost, and each channel's mean moves by the shift, to within the bins' width."""
    rng = np.random.default_rng(seed)
    x = activations(rng, outliers=False, tokens=400, channels=6)
    shift = (x.std(axis=0) * rng.normal(size=6)).astype(np.float32)
    moved = shifted_counts(statistics_of(x).histogram, shift)
    np.testing.assert_allclose(moved.sum(axis=(1, 2)), 400)
    magnitudes = histogram_magnitudes()
    mean = (moved[:, 1] - moved[:, 0]) @ magnitudes / 400
    reach = np.abs(x).max(axis=0) + np.abs(shift)
    np.testing.assert_array_less(np.abs(mean - (x - shift).mean(axis=0)), 0.03 * reach)
    np.testing.assert_array_equal(shifted_counts(statistics_of(x).histogram, 0 * shift), statistics_of(x).histogram)


def test_a_few_massive_values_leave_the_central_range_alone():
    """It is that of quantiles, to within a bin, and never wider than what was seen."""
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(4000, 5)) + np.array([0, 3, -5, 0.1, 40])).astype(np.float32)
    x[17, 1] = 3000.0
    low, high = central_range(statistics_of(x), 0.01)
    for found, wanted in ((low, np.quantile(x, 0.005, axis=0)), (high, np.quantile(x, 0.995, axis=0))):
        np.testing.assert_array_less(np.abs(found - wanted), 0.25 * np.abs(wanted) + 0.02)
    low, high = central_range(statistics_of(x), 0.0)
    assert np.all(low >= x.min(axis=0))
    assert np.all(high <= x.max(axis=0))
    assert high[1] == 3000.0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_chosen_range_is_as_good_as_the_best_by_brute_force(seed, symmetric):
    """No range tried on the very values beats the chosen one by more than 5 %."""
    rng = np.random.default_rng(seed)
    x, scale, columns = activations(rng), rng.lognormal(size=24), rng.lognormal(size=24)
    if not symmetric:
        x = np.abs(x) - np.float32(0.5)
    seen = statistics_of(x)
    found = least_error_range(range_profile(seen, scale, columns), symmetric=symmetric, scale_dtype="float32")
    low, high = (x / scale).min(), (x / scale).max()
    shares = 2.0 ** -np.arange(0, 10, 0.25)
    candidates = [(a, a) for a in shares] if symmetric else [(a, b) for a in shares[::3] for b in shares]
    best = min(
        exact_error(
            x,
            scale,
            columns,
            activation_range._as_range(float(low * a), float(high * b), symmetric, "float32"),
        )
        for a, b in candidates
    )
    assert exact_error(x, scale, columns, found) <= best * 1.05
    assert (found.zero_point is None) == symmetric


def test_massive_values_are_clipped_and_mild_ones_are_not():
    """A few values 300 times the rest lose; without them the range stays near the largest value."""
    rng = np.random.default_rng(1)
    for outliers in (True, False):
        seen = statistics_of(activations(rng, outliers=outliers, tokens=20000))
        whole = minmax_range(seen, symmetric=True, scale_dtype="float32").scale
        profile = range_profile(seen, None, np.ones(24))
        found = least_error_range(profile, symmetric=True, scale_dtype="float32").scale
        assert found <= whole
        assert (found < 0.5 * whole) == outliers


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_rescaling_all_channels_alike_rescales_the_range(factor, seed):
    """Dividing x by f divides the range by f, within the axis' resolution."""
    rng = np.random.default_rng(seed)
    seen = statistics_of(activations(rng))
    columns = rng.lognormal(size=24)
    ranges = [
        least_error_range(range_profile(seen, s, columns), symmetric=True, scale_dtype="float32").scale
        for s in (None, np.full(24, factor))
    ]
    assert ranges[1] * factor == pytest.approx(ranges[0], rel=0.1)


def test_a_token_weighting_lets_massive_values_count_less():
    """With tokens counted by their relative error, the range shrinks further."""
    rng = np.random.default_rng(3)
    seen = statistics_of(activations(rng, tokens=500))
    scales = {
        weighting: least_error_range(
            range_profile(seen, None, np.ones(24), weighting=weighting), symmetric=True, scale_dtype="float32"
        ).scale
        for weighting in ("plain", "token")
    }
    assert scales["token"] < scales["plain"]


def test_both_weightings_together_choose_between_the_two():
    """Massive values neither decide alone nor are given up."""
    rng = np.random.default_rng(3)
    seen = statistics_of(activations(rng, tokens=500))
    scales = [
        least_error_range(
            range_profile(seen, np.full(24, 2.0), np.ones(24), weighting=weighting),
            symmetric=True,
            scale_dtype="float32",
        ).scale
        for weighting in ("token", "both", "plain")
    ]
    assert scales == sorted(scales)


def test_rounding_counted_by_token_agrees_with_the_tokens():
    """Errors weighted by 1 / x.x are estimated from histograms within a quarter."""
    rng = np.random.default_rng(8)
    x = (rng.normal(size=(4000, 64)) * rng.lognormal(sigma=0.5, size=64)).astype(np.float32)
    x[17, 5] *= 200
    scale = rng.lognormal(sigma=0.3, size=64)
    chosen = activation_range.ActivationRange(scale=float(np.abs(x[:17] / scale).max() / 127.5), zero_point=None)
    values = (x / scale).astype(np.float32)
    error = (fake_quantize_static(values, chosen.scale) - values).astype(np.float64) ** 2
    exact = (error / (x.astype(np.float64) ** 2).sum(axis=1, keepdims=True)).sum()
    found = channel_rounding(statistics_of(x), scale, chosen, by_token=True).sum()
    assert found == pytest.approx(exact, rel=0.25)


def test_a_constant_zero_activation_gets_a_positive_scale():
    """Nothing seen but zeros: the scale is positive and finite."""
    seen = statistics_of(np.zeros((5, 3), np.float32))
    found = least_error_range(range_profile(seen, None, np.ones(3)), symmetric=True, scale_dtype="bfloat16")
    assert np.isfinite(found.scale)
    assert found.scale > 0


def test_a_missing_histogram_is_told():
    """The error names act_range."""
    with pytest.raises(ValueError, match="act_range"):
        range_profile(statistics_of(np.ones((2, 2), np.float32), histogram=False), None, np.ones(2))
