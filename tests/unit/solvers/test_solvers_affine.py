from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_dist.errors import UserError
from gs_dist.numbers.integer import INT4, INT8
from gs_dist.results import integers
from gs_dist.solvers import affine

FORMS = {8: INT8, 4: INT4}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def reference(weight, bits, group_size, symmetric, dtype):
    """Plain loops in float64, one group at a time."""
    out, columns = weight.shape
    size = group_size or columns
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = np.zeros((out, columns), dtype=int)
    scales = np.zeros((out, columns // size))
    zeros = np.zeros((out, columns // size), dtype=int)
    for row in range(out):
        for group in range(columns // size):
            values = weight[row, group * size : (group + 1) * size].astype(np.float64)
            low, high = min(values.min(), 0.0), max(values.max(), 0.0)
            scale = max(-low, high) / (high_code + 0.5) if symmetric else (high - low) / (high_code - low_code)
            scale = float(np.float32(DTYPES[dtype](scale if scale else 2.0**-23)))
            zero = 0 if symmetric else int(np.clip(np.round(low_code - low / scale), low_code, high_code))
            quotient = (values.astype(np.float32) / np.float32(scale)).astype(np.float32) + np.float32(zero)
            codes[row, group * size : (group + 1) * size] = np.clip(np.round(quotient), low_code, high_code)
            scales[row, group], zeros[row, group] = scale, zero
    return codes, scales, zeros


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_scales_and_zero_points_match_plain_loops(bits, group_size, symmetric, dtype):
    """Every combination of bits, grouping and symmetry gives the codes of a loop over groups."""
    rng = np.random.default_rng(3)
    weight = (rng.normal(size=(5, 32)) * rng.lognormal(size=(5, 1))).astype(np.float32)
    weight[1] = 0
    weight[2] = np.abs(weight[2]) + 1
    expected = reference(weight, bits, group_size, symmetric, dtype)
    codes, scale, zero = affine.quantize_weight(
        weight, form=FORMS[bits], group_size=group_size, symmetric=symmetric, scale_dtype=dtype
    )
    assert codes.dtype == np.int8
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, expected[1])
    np.testing.assert_array_equal(codes, expected[0])
    assert (zero is None) == symmetric
    if zero is not None:
        np.testing.assert_array_equal(zero, expected[2])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([0, 4]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPES)),
    exponent=st.integers(-12, 8),
)
def test_a_round_trip_errs_by_half_a_step_and_little_more_at_the_edge(
    seed, bits, group_size, symmetric, dtype, exponent
):
    """Dequantised weights lie within about half a scale of the source, whatever the magnitudes."""
    weight = (np.random.default_rng(seed).normal(size=(4, 16)) * 2.0**exponent).astype(np.float32)
    codes, scale, zero = affine.quantize_weight(
        weight, form=FORMS[bits], group_size=group_size, symmetric=symmetric, scale_dtype=dtype
    )
    back = affine.dequantize(codes, scale, zero)
    step = np.repeat(scale, 16 // scale.shape[1], axis=1)
    # A rounded scale may cut the range short by 2^-8 (bfloat16) of 127 steps, and a zero point moves it by half a step.
    assert np.all(np.abs(back - weight) <= step * (1.01 + 128 * 2**-8))
    inner = np.abs(weight) < 0.9 * np.abs(weight).max(axis=1, keepdims=True)
    if symmetric and group_size == 0:
        assert np.all(np.abs(back - weight)[inner] <= step[inner] * 0.5001)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([4, 8]), symmetric=st.booleans())
def test_codes_survive_dequantizing_and_rounding_again_with_their_scale(seed, bits, symmetric):
    """A dequantised weight on its own grid gives the same codes back."""
    weight = np.random.default_rng(seed).normal(size=(3, 16)).astype(np.float32)
    codes, scale, zero = affine.quantize_weight(
        weight, form=FORMS[bits], group_size=8, symmetric=symmetric, scale_dtype="bfloat16"
    )
    back = affine.dequantize(codes, scale, zero).reshape(3, 2, 8)
    again = affine.quantize_with(back, scale[:, :, None], None if zero is None else zero[:, :, None], form=FORMS[bits])
    np.testing.assert_array_equal(again.reshape(3, 16), codes)


def test_a_zero_channel_gets_a_positive_scale_and_comes_back_as_zero():
    """No scale is 0, and a channel of zeros stays one."""
    for symmetric in (True, False):
        codes, scale, zero = affine.quantize_weight(
            np.zeros((2, 8), np.float32), form=INT8, group_size=0, symmetric=symmetric, scale_dtype="float16"
        )
        assert np.all(scale == 2.0**-23)
        np.testing.assert_array_equal(affine.dequantize(codes, scale, zero), 0)


@pytest.mark.parametrize("magnitude", [1e-9, 1e-4, 1e12])
def test_float16_scales_neither_vanish_nor_overflow(magnitude):
    """Weights too small or too large for a float16 scale still get one that is finite and positive."""
    weight = np.array([[magnitude, -magnitude / 2]], np.float32)
    _, scale, _ = affine.quantize_weight(weight, form=INT8, group_size=0, symmetric=True, scale_dtype="float16")
    assert np.isfinite(scale.astype(np.float16)).all()
    assert (scale.astype(np.float16) > 0).all()
    np.testing.assert_array_equal(scale.astype(np.float16).astype(np.float32), scale)
    if magnitude == 1e-4:
        assert scale[0, 0] >= magnitude / 127.5


def test_a_range_without_zero_is_extended_so_that_the_zero_point_fits():
    """Weights in [0.5, 3] get zero point -128, where the bare range would ask for -179."""
    weight = np.linspace(0.5, 3, 16, dtype=np.float32)[None]
    _, scale, zero = affine.quantize_weight(weight, form=INT8, group_size=0, symmetric=False, scale_dtype="float32")
    assert zero[0, 0] == -128
    assert scale[0, 0] == np.float32(3 / 255)


def test_clip_ratio_shrinks_each_group_by_its_own_factor():
    """A ratio of a half doubles the resolution and saturates what lies outside."""
    weight = np.array([[1.0, 0.25, 1.0, 0.25]], np.float32)
    codes, scale, _ = affine.quantize_weight(
        weight, form=INT8, group_size=2, symmetric=True, scale_dtype="float32", clip_ratio=np.array([[0.5, 1.0]])
    )
    np.testing.assert_allclose(scale, [[0.5 / 127.5, 1 / 127.5]], rtol=1e-6)
    assert codes.tolist() == [[127, 64, 127, 32]]


def test_blocks_of_rows_do_not_change_a_bit(monkeypatch):
    """Working on few rows at a time gives the same codes and scales."""
    weight = np.random.default_rng(0).normal(size=(37, 64)).astype(np.float32)
    whole = affine.quantize_weight(weight, form=INT4, group_size=16, symmetric=False, scale_dtype="float32")
    monkeypatch.setattr(integers, "_BLOCK_ELEMENTS", 300)
    for a, b in zip(
        whole,
        affine.quantize_weight(weight, form=INT4, group_size=16, symmetric=False, scale_dtype="float32"),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_group_index_assigns_columns_to_groups():
    """Irregular groups dequantise by each column's own group."""
    codes = np.array([[1, 2, 3, 4]], np.int8)
    back = affine.dequantize(codes, np.array([[1.0, 10.0]], np.float32), None, np.array([1, 0, 0, 1], np.int32))
    assert back.tolist() == [[10, 2, 3, 40]]


def test_columns_that_do_not_divide_are_refused_with_the_setting():
    """The message says which setting to change."""
    with pytest.raises(UserError, match="set weight_quant_granularity: per_channel"):
        affine.quantize_weight(
            np.ones((2, 10), np.float32), form=INT4, group_size=4, symmetric=True, scale_dtype="float32"
        )
