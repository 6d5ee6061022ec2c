from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gs_dist.solvers.smoothquant import smoothing_scale

magnitudes = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=8)


@given(x=magnitudes, w=magnitudes, alpha=st.floats(0, 1))
def test_scales_follow_the_formula_channel_by_channel(x, w, alpha):
    """Each channel gets max|x|^a / max|W|^(1-a), at least 1e-5 and at most 1e15, and 1 where a power is 0."""
    size = min(len(x), len(w))
    scale = smoothing_scale(np.array(x[:size], np.float32), np.array(w[:size], np.float32), alpha)
    assert scale.dtype == np.float32
    for found, a, b in zip(scale, x, w, strict=False):
        upper, lower = a**alpha, b ** (1 - alpha)
        expected = 1.0 if upper == 0 or lower == 0 else min(max(upper / lower, 1e-5), 1e15)
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_ends_of_alpha_leave_all_difficulty_on_one_side():
    """With alpha 1 the activation's channels become equal, with alpha 0 the weight's columns."""
    x, w = np.array([2.0, 8.0]), np.array([5.0, 0.5])
    np.testing.assert_allclose(x / smoothing_scale(x, w, 1.0), 1.0)
    np.testing.assert_allclose(w * smoothing_scale(x, w, 0.0), 1.0)
