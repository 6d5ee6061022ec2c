"""Number formats: codes, scales and bytes against ml_dtypes and plain arithmetic."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from gs_dist.numbers.integer import INT4, INT8
from gs_dist.numbers.number_format import NumberFormat
from gs_dist.numbers.scales import power_of_two_below
from gs_dist.numbers.small_float import FP8, MXFP4, MXFP8, SmallFloat
from gs_dist.numbers.table import WEIGHT_FORMATS

ALL = (INT8, INT4, FP8, MXFP8, MXFP4)
FLOATS = (FP8, MXFP8, MXFP4)

values = npst.arrays(np.float32, st.integers(1, 60), elements=st.floats(-2000, 2000, width=32))


def codes_of(form: NumberFormat) -> np.ndarray:
    """Every code there is."""
    if form in (INT8, INT4):
        low, high = form.limits
        return np.arange(low, high + 1, dtype=np.float32)
    stored = np.arange(1 << form.bits, dtype=np.uint8)
    found = form.decode(stored)
    return found[np.isfinite(found)]


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)
@given(given_values=values)
def test_snapping_finds_the_nearest_code(form: NumberFormat, given_values: np.ndarray) -> None:
    """No code lies nearer than the one found, and what lies beyond the range takes its end."""
    snapped = given_values.copy()
    form.snap(snapped)
    codes = codes_of(form)
    assert np.isin(snapped, codes).all()
    nearest = np.abs(given_values[:, None].astype(np.float64) - codes).min(axis=1)
    np.testing.assert_array_equal(np.abs(given_values.astype(np.float64) - snapped), nearest)


@pytest.mark.parametrize("form", FLOATS, ids=lambda form: form.name)
@given(given_values=values)
def test_floats_snap_as_ml_dtypes_casts(form: SmallFloat, given_values: np.ndarray) -> None:
    """Ties go where a cast to the dtype takes them."""
    snapped = given_values.copy()
    form.snap(snapped)
    within = np.clip(given_values, *form.limits) / np.float32(form.unit)
    np.testing.assert_array_equal(snapped, within.astype(form.dtype).astype(np.float32) * np.float32(form.unit))


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)
def test_codes_survive_storage(form: NumberFormat) -> None:
    """Every code is stored and read back, in as many bits as the format says."""
    codes = codes_of(form)
    stored = form.encode(codes.copy())
    assert stored.shape == codes.shape
    assert len(np.unique(stored.view(np.uint8))) <= 1 << form.bits
    np.testing.assert_array_equal(form.decode(stored), codes)


@given(largest=st.floats(2.0**-100, 2.0**100))
def test_microscaling_shares_the_exponent_of_the_largest_value(largest: float) -> None:
    """The stored byte is floor(log2(absmax)) less the element's largest exponent, plus 127 (OCP MX, section 6.3)."""
    for form, top in ((MXFP4, 2), (MXFP8, 8)):
        scale = form.symmetric_scale(np.array([largest]), scale_dtype="bfloat16")
        (stored,) = form.encode_scale(scale)
        assert stored == math.frexp(largest)[1] - 1 - top + 127
        np.testing.assert_array_equal(form.decode_scale(np.array([stored], np.uint8)), scale)


def test_mxfp4_reads_as_ocp_values_times_a_power_of_two() -> None:
    """A block's bytes, decoded by the format's page alone, give what codes and scale stand for."""
    block = np.array([[0.0, 0.4, -0.6, 1.0, 1.6, 2.4, -3.4, 7.9]], np.float32)
    scale = MXFP4.symmetric_scale(np.abs(block).max(axis=1), scale_dtype="float32")
    codes = block / scale[:, None]
    MXFP4.snap(codes)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table += [-value for value in table]
    decoded = [table[nibble] * 2.0 ** (int(MXFP4.encode_scale(scale)[0]) - 127) for nibble in MXFP4.encode(codes)[0]]
    np.testing.assert_array_equal(decoded, (codes * scale[:, None])[0])
    np.testing.assert_array_equal(decoded, [0.0, 0.5, -0.5, 1.0, 1.5, 2.0, -3.0, 6.0])


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)
def test_a_range_of_zeros_has_a_positive_scale(form: NumberFormat) -> None:
    """Nothing is divided by zero."""
    assert (form.symmetric_scale(np.zeros(3), scale_dtype="float16") > 0).all()


@given(value=st.floats(2.0**-126, 2.0**126))
def test_the_power_of_two_below_is_the_largest_that_is_not_above(value: float) -> None:
    """2^k <= value < 2^(k + 1)."""
    (below,) = power_of_two_below(np.array([value]))
    assert below <= value < 2 * below
    assert np.log2(below) == np.rint(np.log2(below))


def test_recipes_name_formats_by_their_own_names() -> None:
    """The table's keys are the formats' names."""
    assert {name: form.name for name, form in WEIGHT_FORMATS.items()} == {name: name for name in WEIGHT_FORMATS}
    assert float(ml_dtypes.finfo(FP8.dtype).max) == FP8.limits[1] == 448.0
