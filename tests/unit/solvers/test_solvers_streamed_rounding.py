"""Weights rounded a block of rows at a time, against ml_dtypes and against rounding them whole."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gs_dist.numbers.integer import INT4, INT8
from gs_dist.numbers.number_format import NumberFormat
from gs_dist.numbers.small_float import FP8, MXFP4, MXFP8, SmallFloat
from gs_dist.solvers.affine import quantize_weight
from gs_dist.solvers.float_rounding import Fp8BlockRounding, Fp8ChannelRounding, MicroscalingRounding, ScaleRule
from gs_dist.solvers.integer_rounding import IntegerRounding
from gs_dist.solvers.minifloat import MinifloatEncoder
from gs_dist.solvers.weight_rounding import WeightRounding

Array = npt.NDArray[Any]


def weight(rows: int, columns: int, seed: int = 0) -> Array:
    """Rows of very different sizes, heavy tails, a row of zeros and a tiny one."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(4, (rows, columns)) * np.exp(rng.uniform(-8, 3, (rows, 1)))
    values[1], values[2] = 0.0, values[2] * 1e-30
    return values.astype(np.float32)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("form", [INT8, INT4])
def test_integers_have_the_bits_of_rounding_a_weight_whole(
    form: NumberFormat, group_size: int, symmetric: bool, scale_dtype: str
) -> None:
    """However the rows are cut into blocks."""
    values = weight(23, 192)
    if not symmetric:
        values[4] = np.abs(values[4])
    codes, scale, zero = quantize_weight(
        values, form=form, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype
    )
    rounding = IntegerRounding(bits=form.bits, group_size=group_size, symmetric=symmetric)
    rounder = rounding.rounder(5, 192, scale_dtype)
    for start in range(0, 23, 5):
        block = slice(start, min(23, start + 5))
        found = rounder.round(values[block].copy())
        assert found.codes.tobytes() == codes[block].tobytes()
        assert found.scale.tobytes() == scale[block].tobytes()
        assert zero is None or (found.zero_point is not None and found.zero_point.tobytes() == zero[block].tobytes())


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("form", [FP8, MXFP4], ids=["e4m3", "e2m1"])
@given(values=arrays(np.float32, st.integers(1, 50), elements=finite | st.floats(-500, 500, width=32)))
def test_bits_of_small_floats_are_those_of_ml_dtypes(form: SmallFloat, values: Array) -> None:
    """Ties to even, subnormals, zeros of either sign, and what lies beyond the largest saturates."""
    largest = float(ml_dtypes.finfo(form.dtype).max)
    codes = np.empty(values.shape, dtype=np.uint8)
    MinifloatEncoder(form, values.size).encode(values.copy(), codes)
    assert codes.tobytes() == np.clip(values, -largest, largest).astype(form.dtype).view(np.uint8).tobytes()


@pytest.mark.parametrize("form", [FP8, MXFP4], ids=["e4m3", "e2m1"])
def test_every_tie_of_small_floats_goes_to_the_even_code(form: SmallFloat) -> None:
    """All middles of neighbouring values, and the float32 values next to these."""
    codes = np.arange(1 << form.bits, dtype=np.uint8)
    values = codes.view(form.dtype).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    tried = np.concatenate([middles, np.nextafter(middles, np.float32(1e9)), np.nextafter(middles, np.float32(-1e9))])
    found = np.empty(tried.shape, dtype=np.uint8)
    MinifloatEncoder(form, tried.size).encode(tried.copy(), found)
    assert found.tobytes() == tried.astype(form.dtype).view(np.uint8).tobytes()


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_fp8_per_channel_is_the_weight_over_its_scale_cast(scale_dtype: str) -> None:
    """The scale is absmax / 448, rounded first."""
    values = weight(9, 128)
    found = Fp8ChannelRounding().rounder(9, 128, scale_dtype).round(values.copy())
    scale = found.scale
    expected = np.abs(values).max(axis=1, keepdims=True) / 448
    np.testing.assert_allclose(scale[expected > 1e-36], expected[expected > 1e-36], rtol=2**-8)
    cast = np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert found.codes.tobytes() == cast.tobytes()


def test_fp8_blocks_have_a_scale_each_those_at_the_edges_too() -> None:
    """200 x 72 in blocks of 64: the last are cut short."""
    values = weight(200, 72)
    rounder = Fp8BlockRounding(size=64).rounder(128, 72, "float32")
    for start in (0, 128):
        block = values[start : start + 128]
        found = rounder.round(block.copy())
        assert found.scale.shape == (-(-len(block) // 64), 2)
        for i in range(found.scale.shape[0]):
            for j in range(2):
                part = block[64 * i : 64 * i + 64, 64 * j : 64 * j + 64]
                np.testing.assert_allclose(found.scale[i, j], np.abs(part).max() / 448, rtol=1e-6)
                cast = np.clip(part / found.scale[i, j], -448, 448).astype(ml_dtypes.float8_e4m3fn)
                assert found.codes[64 * i : 64 * i + 64, 64 * j : 64 * j + 64].tobytes() == cast.tobytes()


def microscaled(values: Array, exponent: Array, form: SmallFloat) -> tuple[Array, Array]:
    """Codes by ml_dtypes of blocks (n, 32) with the scales 2^exponent, and each block's squared error."""
    scale = 2.0 ** exponent[:, None].astype(np.float64)
    largest = float(ml_dtypes.finfo(form.dtype).max)
    codes = np.clip(values / scale, -largest, largest).astype(np.float32).astype(form.dtype)
    return codes.view(np.uint8), np.square(values - codes.astype(np.float64) * scale).sum(axis=1)


@pytest.mark.parametrize("rule", ["floor", "ceil", "least-error"])
@pytest.mark.parametrize("form", [MXFP8, MXFP4], ids=["mxfp8", "mxfp4"])
def test_microscaling_follows_its_rule(form: SmallFloat, rule: ScaleRule) -> None:
    """Exponents by logarithm, codes by ml_dtypes; the least error is that of the better of the two other rules."""
    values = weight(11, 256)
    found = MicroscalingRounding(element=form, rule=rule).rounder(11, 256, "").round(values.copy())
    blocks = values.astype(np.float64).reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1)
    top = float(ml_dtypes.finfo(form.dtype).max)
    exact = np.maximum(largest, 2.0**-120)
    floor = np.clip(np.floor(np.log2(exact)) - np.floor(np.log2(top)), -127, 127)
    ceil = np.clip(np.ceil(np.log2(exact / top)), -127, 127)
    (floor_codes, floor_error), (ceil_codes, ceil_error) = (microscaled(blocks, e, form) for e in (floor, ceil))
    take_ceil = {"floor": np.zeros(len(blocks), bool), "ceil": np.ones(len(blocks), bool)}.get(
        rule, ceil_error < floor_error
    )
    used = largest > 1e-30  # blocks of nothing have any scale
    exponent = found.scale.reshape(-1).astype(np.int64) - 127
    np.testing.assert_array_equal(exponent[used], np.where(take_ceil, ceil, floor)[used])
    expected = np.where(take_ceil[:, None], ceil_codes, floor_codes)
    np.testing.assert_array_equal(found.codes.reshape(-1, 32)[used] & 0x7F, expected[used] & 0x7F)
    assert not (found.codes[1] & 0x7F).any()


@pytest.mark.parametrize(
    "rounding",
    [IntegerRounding(bits=8), Fp8ChannelRounding(), Fp8BlockRounding(size=32), MicroscalingRounding(element=MXFP4)],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(rounding: WeightRounding, value: float) -> None:
    """Wherever it stands in the block."""
    values = weight(4, 64)
    values[3, 17] = value
    with pytest.raises(ValueError, match="not finite"):
        rounding.rounder(4, 64, "bfloat16").round(values)
