from __future__ import annotations

import numpy as np
import pytest
from fake_rounding import fake_quantize_static
from observed import statistics_of

from gs_dist.solvers.kv_cache import cache_relative_error, cache_scale


def test_each_channel_is_scaled_by_its_largest_magnitude():
    """absmax/127.5 a channel, never 0."""
    x = np.array([[1.0, -4.0, 0.0], [-2.0, 3.0, 0.0]], np.float32)
    np.testing.assert_allclose(
        cache_scale(statistics_of(x), scale_dtype="float32"), [2 / 127.5, 4 / 127.5, 2.0**-23], rtol=1e-6
    )


def test_the_error_of_a_rounded_cache_is_predicted():
    """The estimate agrees with values that were really rounded."""
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(3000, 8)) * rng.lognormal(size=8)).astype(np.float32)
    seen = statistics_of(x)
    scale = cache_scale(seen, scale_dtype="float32")
    rounded = np.stack([fake_quantize_static(x[:, c], float(scale[c])) for c in range(8)], axis=1)
    exact = ((rounded - x).astype(float) ** 2).sum() / (x.astype(float) ** 2).sum()
    assert cache_relative_error(seen, scale) == pytest.approx(exact, rel=0.05)


def test_a_silent_cache_has_no_error():
    """Zeros stay zeros."""
    seen = statistics_of(np.zeros((3, 2), np.float32))
    assert cache_relative_error(seen, cache_scale(seen, scale_dtype="float32")) == 0.0
