"""Ranges of integer weights searched without data: never worse, the same in any blocks, upstream's rule as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gs_dist.conversion.schemes import find_scheme
from gs_dist.errors import UserError
from gs_dist.numbers.scales import round_scale
from gs_dist.solvers.integer_rounding import IntegerRounding, RangeRule

Array = npt.NDArray[Any]


def weight(rows: int = 24, columns: int = 192) -> Array:
    """Heavy tails, rows of very different sizes, one of them zero."""
    rng = np.random.default_rng(3)
    values = rng.standard_t(4, (rows, columns)) * np.exp(rng.uniform(-6, 1, (rows, 1)))
    values[5] = 0.0
    return values.astype(np.float32)


def rounded(
    values: Array, bits: int, group_size: int, ranges: RangeRule, block: int, dtype: str = "bfloat16"
) -> tuple[Array, Array]:
    """Codes and scales of a weight that is rounded in blocks of so many rows."""
    rounder = IntegerRounding(bits=bits, group_size=group_size, ranges=ranges).rounder(block, values.shape[1], dtype)
    found = []
    for row in range(0, len(values), block):
        part = rounder.round(values[row : row + block].copy())
        found.append(type(part)(codes=part.codes.copy(), scale=part.scale.copy()))
    return np.concatenate([part.codes for part in found]), np.concatenate([part.scale for part in found])


def group_errors(values: Array, codes: Array, scale: Array) -> Array:
    """Squared error of every group in float64."""
    grouped = values.astype(np.float64).reshape(*scale.shape, -1)
    return np.asarray(np.square(codes.reshape(grouped.shape) * scale[:, :, None].astype(np.float64) - grouped).sum(2))


@pytest.mark.parametrize("ranges", ["least-error", "ssz"])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (4, 0), (4, 64)])
def test_no_group_loses_by_a_search_and_four_bits_gain(bits: int, group_size: int, ranges: RangeRule) -> None:
    """Group by group, up to the rounding of the sums; the same bytes whatever the blocks."""
    values = weight()
    whole = group_errors(values, *rounded(values, bits, group_size, "min-max", 24))
    codes, scale = rounded(values, bits, group_size, ranges, 24)
    searched = group_errors(values, codes, scale)
    assert (searched <= whole * (1 + 1e-5)).all()
    if bits == 4:
        assert searched.sum() < (0.95 if ranges == "least-error" else 0.99) * whole.sum()
    for block in (1, 7):
        again = rounded(values, bits, group_size, ranges, block)
        assert (again[0].tobytes(), again[1].tobytes()) == (codes.tobytes(), scale.tobytes())


def test_the_range_of_least_error_is_the_best_of_all_that_were_tried() -> None:
    """Against a loop in float64 over the same shares."""
    values = weight()
    scale = rounded(values, 4, 64, "least-error", 5)[1]
    grouped = values.astype(np.float64).reshape(24, 3, 64)
    whole = rounded(values, 4, 64, "min-max", 5)[1]
    tried = []
    for share in [1 - step / 40 for step in range(21)]:
        step = round_scale(whole.astype(np.float64) * share, "bfloat16").astype(np.float64)[:, :, None]
        tried.append(np.square(np.clip(np.rint(grouped / step), -8, 7) * step - grouped).sum(axis=2))
    found = scale.astype(np.float64)[:, :, None]
    errors = np.square(np.clip(np.rint(grouped / found), -8, 7) * found - grouped).sum(axis=2)
    np.testing.assert_allclose(errors, np.min(tried, axis=0), rtol=1e-4, atol=1e-30)


def test_ssz_is_upstreams_iteration() -> None:
    """Scale and codes in turn, each fitted to the other, for as long as a channel gets better; in float64 here."""
    values = weight()
    found = rounded(values, 4, 0, "ssz", 24, "float32")[1][:, 0]
    start = rounded(values, 4, 0, "min-max", 24, "float32")[1][:, 0]
    for row, first, last in zip(values.astype(np.float64), start.astype(np.float64), found, strict=True):
        scale = best = first
        least = np.square(np.clip(np.rint(row / scale), -8, 7) * scale - row).sum()
        for _ in range(50):
            codes = np.clip(np.rint(row / scale), -8, 7)
            scale = (row @ codes) / (codes @ codes) if codes.any() else scale
            error = np.square(np.clip(np.rint(row / scale), -8, 7) * scale - row).sum()
            if error < least:
                best, least = scale, error
        mine = np.square(np.clip(np.rint(row / last), -8, 7) * last - row).sum()
        assert mine <= least * 1.001 or last == pytest.approx(best, rel=1e-3)


def test_schemes_of_floats_have_no_ranges_to_search() -> None:
    """The message says what to set."""
    with pytest.raises(UserError, match=r"ranges: ssz is for integers, .* set ranges: min-max"):
        find_scheme("W8A8_MXFP8", None, "scheme", "ssz")
