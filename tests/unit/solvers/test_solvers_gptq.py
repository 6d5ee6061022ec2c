"""GPTQ against the textbook algorithm, column by column in float64 with explicit inverses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gs_dist.errors import UserError
from gs_dist.numbers.integer import INT4
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedLinear
from gs_dist.solvers import gptq
from gs_dist.solvers.affine import quantize_weight

Float64 = npt.NDArray[np.float64]


def policy(*, group_size: int = 64, symmetric: bool = True, bits: int = 4, **algo_args: Any) -> QuantPolicy:
    return QuantPolicy(
        weight_quant_dtype="qint4x2" if bits == 4 else "int8",
        weight_quant_granularity="per_group" if group_size else "per_channel",
        group_size=group_size,
        weight_symmetric=symmetric,
        algo_args=algo_args,
    )


def problem(out: int = 24, columns: int = 192, seed: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A weight, and the Gram matrix of an input whose channels are correlated and of different sizes."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(columns) + 0.15 * rng.standard_normal((columns, columns))
    x = rng.standard_normal((600, columns)) @ mixing * np.exp(0.7 * rng.standard_normal(columns))
    return rng.standard_normal((out, columns)).astype(np.float32), (x.T @ x).astype(np.float32)


def parameters(low: Float64, high: Float64, bits: int, symmetric: bool) -> tuple[Float64, Float64]:
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        return np.maximum(-low, high) / (2 ** (bits - 1) - 0.5), np.zeros_like(low)
    scale = (high - low) / (2**bits - 1)
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return scale, np.clip(np.rint(smallest - low / scale), smallest, largest)


def textbook(
    weight: npt.NDArray[Any],
    gram: npt.NDArray[Any],
    *,
    group_size: int,
    symmetric: bool,
    bits: int,
    damp_percent: float = 0.01,
    order: npt.NDArray[np.intp] | None = None,
    static: bool = False,
) -> Float64:
    """Optimal brain quantisation in a fixed order: after each column the inverse Hessian of the rest is taken anew."""
    w = weight.astype(np.float64)
    columns = w.shape[1]
    size = group_size or columns
    hessian = gram.astype(np.float64) + damp_percent * np.diagonal(gram).mean() * np.eye(columns)
    order = np.arange(columns) if order is None else order
    scales = np.empty((len(w), columns))
    zeros = np.empty((len(w), columns))
    if static or not group_size:
        for start in range(0, columns, size):
            block = slice(start, start + size)
            s, z = parameters(w[:, block].min(axis=1), w[:, block].max(axis=1), bits, symmetric)
            scales[:, block], zeros[:, block] = s[:, None], z[:, None]
    result = np.empty_like(w)
    for step, column in enumerate(order):
        if group_size and not static and step % size == 0:
            members = order[step : step + size]
            s, z = parameters(w[:, members].min(axis=1), w[:, members].max(axis=1), bits, symmetric)
            scales[:, members], zeros[:, members] = s[:, None], z[:, None]
        codes = np.rint(w[:, column] / scales[:, column] + zeros[:, column])
        codes = np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        result[:, column] = (codes - zeros[:, column]) * scales[:, column]
        remaining = order[step:]
        inverse = np.linalg.inv(hessian[np.ix_(remaining, remaining)])
        error = (w[:, column] - result[:, column]) / inverse[0, 0]
        w[:, remaining] -= error[:, None] * inverse[0]
    return result


def dequantized(result: gptq.GPTQResult, used: QuantPolicy) -> npt.NDArray[np.float32]:
    return QuantizedLinear(
        policy=used,
        codes=result.codes,
        scale=result.scale,
        zero_point=result.zero_point,
        group_index=result.group_index,
    ).dequantized()


def quadratic(delta: npt.NDArray[Any], gram: npt.NDArray[Any]) -> float:
    wide = delta.astype(np.float64)
    return float(np.einsum("ij,jk,ik->", wide, gram.astype(np.float64), wide))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), [(0, 192), (64, 192), (64, 64)])
@pytest.mark.parametrize(("desc_act", "static_groups"), [(False, False), (False, True), (True, False), (True, True)])
def test_it_gives_the_textbook_weights(
    symmetric: bool, group_size: int, columns: int, desc_act: bool, static_groups: bool
) -> None:
    """Every combination of order and groups, one group for all too, dequantises to what the float64 loop gives."""
    weight, gram = problem(columns=columns)
    used = policy(group_size=group_size, symmetric=symmetric, desc_act=desc_act, static_groups=static_groups)
    order = np.argsort(-np.diagonal(gram), kind="stable") if desc_act else None
    expected = textbook(
        weight,
        gram,
        group_size=group_size,
        symmetric=symmetric,
        bits=4,
        order=order,
        static=static_groups,
    )
    got = dequantized(gptq.quantize(weight, gram, used, scale_dtype="float32"), used)
    # One code on the edge of rounding may fall otherwise in float32 and shift later ones of its row.
    same = np.isclose(got, expected, rtol=1e-4, atol=1e-4).all(axis=1)
    assert same.mean() > 0.9
    assert quadratic(got - weight, gram) == pytest.approx(quadratic(expected - weight, gram), rel=0.01)


def test_int8_weights_are_served() -> None:
    """Eight bits per channel give the textbook weights too."""
    weight, gram = problem()
    used = policy(group_size=0, bits=8)
    expected = textbook(weight, gram, group_size=0, symmetric=True, bits=8)
    got = dequantized(gptq.quantize(weight, gram, used, scale_dtype="float32"), used)
    assert quadratic(got - weight, gram) == pytest.approx(quadratic(expected - weight, gram), rel=0.02)


@pytest.mark.parametrize("block_size", [1, 48, 100, 1024])
def test_the_block_size_is_a_matter_of_speed(block_size: int) -> None:
    """Codes of another block size differ at most where rounding is a toss-up."""
    weight, gram = problem()
    reference = gptq.quantize(weight, gram, policy(), scale_dtype="float32")
    other = gptq.quantize(weight, gram, policy(block_size=block_size), scale_dtype="float32")
    assert (other.codes == reference.codes).mean() > 0.97
    assert other.loss == pytest.approx(reference.loss, rel=0.01)


@pytest.mark.parametrize("algo_args", [{}, {"desc_act": True}, {"desc_act": True, "static_groups": True}])
@pytest.mark.parametrize("damp_percent", [0.0, 0.01, 0.3])
def test_the_loss_is_the_output_error_of_what_is_returned(algo_args: dict[str, Any], damp_percent: float) -> None:
    """The loss says |Q(W)x - Wx|^2 over all tokens, damping taken out again."""
    weight, gram = problem()
    used = policy(damp_percent=damp_percent, **algo_args)
    result = gptq.quantize(weight, gram, used, scale_dtype="float32")
    assert result.loss == pytest.approx(quadratic(dequantized(result, used) - weight, gram), rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("algo_args", [{}, {"desc_act": True}, {"static_groups": True}])
def test_the_output_error_falls_below_that_of_plain_rounding(symmetric: bool, algo_args: dict[str, Any]) -> None:
    """GPTQ is worth its time: well under the loss of rounding to nearest."""
    weight, gram = problem()
    used = policy(symmetric=symmetric, **algo_args)
    codes, scale, zero = quantize_weight(weight, form=INT4, group_size=64, symmetric=symmetric, scale_dtype="float32")
    plain = QuantizedLinear(policy=used, codes=codes, scale=scale, zero_point=zero).dequantized()
    result = gptq.quantize(weight, gram, used, scale_dtype="float32")
    assert result.loss < 0.8 * quadratic(plain - weight, gram)


def test_groups_in_activation_order_are_named_by_the_index() -> None:
    """The most active 64 channels form group 0, wherever they stand, and the index says so."""
    weight, gram = problem()
    result = gptq.quantize(weight, gram, policy(desc_act=True), scale_dtype="float32")
    assert result.group_index is not None
    order = np.argsort(-np.diagonal(gram), kind="stable")
    np.testing.assert_array_equal(result.group_index[order], np.arange(192) // 64)
    assert result.group_index.dtype == np.int32


def test_static_groups_keep_their_place_and_their_plain_scale() -> None:
    """With static groups the scales are those of plain rounding, and no index is needed in any order."""
    weight, gram = problem()
    _, scale, _ = quantize_weight(weight, form=INT4, group_size=64, symmetric=True, scale_dtype="float32")
    result = gptq.quantize(weight, gram, policy(desc_act=True, static_groups=True), scale_dtype="float32")
    assert result.group_index is None
    np.testing.assert_array_equal(result.scale, scale)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_scales_are_rounded_to_their_stored_dtype(scale_dtype: str) -> None:
    """A scale survives being stored, and the loss already counts that rounding."""
    import ml_dtypes

    weight, gram = problem()
    used = policy()
    result = gptq.quantize(weight, gram, used, scale_dtype=scale_dtype)
    stored = result.scale.astype(ml_dtypes.bfloat16 if scale_dtype == "bfloat16" else np.float16)
    np.testing.assert_array_equal(stored.astype(np.float32), result.scale)
    assert result.loss == pytest.approx(quadratic(dequantized(result, used) - weight, gram), rel=1e-3)


def test_clip_ratios_shrink_the_ranges() -> None:
    """A ratio of a half halves static scales, exactly that group's."""
    weight, gram = problem()
    ratio = np.ones((24, 3), dtype=np.float32)
    ratio[5, 1] = 0.5
    whole = gptq.quantize(weight, gram, policy(static_groups=True), scale_dtype="float32")
    shrunk = gptq.quantize(weight, gram, policy(static_groups=True), scale_dtype="float32", clip_ratio=ratio)
    np.testing.assert_allclose(shrunk.scale, whole.scale * ratio, rtol=1e-6)


def test_clip_ratios_hold_for_scales_found_on_the_way() -> None:
    """The first group worked on sees original weights: its scale is the ratio times the plain one."""
    weight, gram = problem()
    ratio = np.full((24, 3), 0.75, dtype=np.float32)
    _, plain, _ = quantize_weight(weight, form=INT4, group_size=64, symmetric=True, scale_dtype="float32")
    result = gptq.quantize(weight, gram, policy(), scale_dtype="float32", clip_ratio=ratio)
    np.testing.assert_allclose(result.scale[:, 0], 0.75 * plain[:, 0], rtol=1e-6)


def test_clip_ratios_of_scattered_groups_are_refused() -> None:
    """Ratios per neighbouring group cannot serve groups in activation order; the setting is named."""
    weight, gram = problem()
    with pytest.raises(ValueError, match="static_groups"):
        gptq.quantize(
            weight, gram, policy(desc_act=True), scale_dtype="float32", clip_ratio=np.ones((24, 3), dtype=np.float32)
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_searched_ratios_take_the_best_of_each_group(symmetric: bool, desc_act: bool) -> None:
    """In the group worked on first every row's error is the least over the candidates tried one by one."""
    weight, gram = problem()
    ratios = (1.0, 0.9, 0.8, 0.7)
    used = policy(symmetric=symmetric, desc_act=desc_act)
    found = gptq.quantize(weight, gram, used, scale_dtype="float32", search_ratios=ratios)
    single = [gptq.quantize(weight, gram, used, scale_dtype="float32", search_ratios=(r,)) for r in ratios]
    scales = np.stack([s.scale[:, 0] for s in single])
    chosen = np.abs(scales - found.scale[:, 0]).argmin(axis=0)
    np.testing.assert_array_equal(np.take_along_axis(scales, chosen[None], axis=0)[0], found.scale[:, 0])
    order = np.argsort(-np.diagonal(gram), kind="stable") if desc_act else np.arange(192)
    first, rest = order[:64], order[64:]
    hessian = gram.astype(np.float64) + 0.01 * np.diagonal(gram).mean() * np.eye(192)
    # What remains for the first group once all later channels may still make up for it: the Schur complement.
    cross = hessian[np.ix_(first, rest)]
    schur = hessian[np.ix_(first, first)] - cross @ np.linalg.solve(hessian[np.ix_(rest, rest)], cross.T)

    def errors(result: gptq.GPTQResult) -> Float64:
        delta = (dequantized(result, used) - weight)[:, first].astype(np.float64)
        return np.asarray(np.einsum("ij,jk,ik->i", delta, schur, delta))

    least = np.min([errors(s) for s in single], axis=0)
    np.testing.assert_allclose(errors(found), least, rtol=1e-3)
    assert found.loss < single[0].loss
    assert len(set(chosen.tolist())) > 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_groups_with_searched_ratios_take_two_passes(symmetric: bool) -> None:
    """Scales come from a pass in natural order; rounding in activation order then lessens the loss further."""
    weight, gram = problem()
    ratios = (1.0, 0.9, 0.8, 0.7)
    both = policy(symmetric=symmetric, desc_act=True, static_groups=True)
    natural = gptq.quantize(weight, gram, policy(symmetric=symmetric), scale_dtype="float32", search_ratios=ratios)
    found = gptq.quantize(weight, gram, both, scale_dtype="float32", search_ratios=ratios)
    np.testing.assert_array_equal(found.scale, natural.scale)
    if not symmetric:
        assert found.zero_point is not None
        assert natural.zero_point is not None
        np.testing.assert_array_equal(found.zero_point, natural.zero_point)
    assert found.group_index is None
    assert found.loss < natural.loss
    assert found.loss == pytest.approx(quadratic(dequantized(found, both) - weight, gram), rel=1e-3)


def test_static_groups_in_natural_order_need_no_second_pass() -> None:
    """The second pass would find the same codes: the first is the result."""
    weight, gram = problem()
    ratios = (1.0, 0.8)
    static = gptq.quantize(weight, gram, policy(static_groups=True), scale_dtype="float32", search_ratios=ratios)
    natural = gptq.quantize(weight, gram, policy(), scale_dtype="float32", search_ratios=ratios)
    np.testing.assert_array_equal(static.codes, natural.codes)
    np.testing.assert_array_equal(static.scale, natural.scale)


def test_a_channel_that_was_never_active_is_rounded_to_nearest() -> None:
    """It neither breaks the factorisation nor changes the others' codes, and is noted."""
    weight, gram = problem()
    gram[[7, 80], :] = 0.0
    gram[:, [7, 80]] = 0.0
    used = policy(static_groups=True, damp_percent=0.0)
    result = gptq.quantize(weight, gram, used, scale_dtype="float32")
    codes, _, _ = quantize_weight(weight, form=INT4, group_size=64, symmetric=True, scale_dtype="float32")
    np.testing.assert_array_equal(result.codes[:, [7, 80]], codes[:, [7, 80]])
    assert "2 input channels were never active" in result.notes[0]
    assert result.damp_percent_used == 0.0
    assert result.loss == pytest.approx(quadratic(dequantized(result, used) - weight, gram), rel=1e-3)


def test_a_failed_factorization_is_tried_again_with_more_damping() -> None:
    """A Gram matrix of fewer tokens than channels needs damping; how much was used is told."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((20, 128)).astype(np.float32)
    gram = x.T @ x
    used = policy(damp_percent=0.0)
    result = gptq.quantize(rng.standard_normal((8, 128)).astype(np.float32), gram, used, scale_dtype="float32")
    assert result.damp_percent_used == 0.01
    assert "damp_percent 0: tried again with 0.01" in result.notes[0]


def test_a_matrix_that_no_damping_mends_ends_in_plain_rounding() -> None:
    """An indefinite matrix gives the codes of rounding to nearest; every attempt is on record."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((8, 128)).astype(np.float32)
    gram = (np.ones((128, 128)) - 40 * np.eye(128)[::-1]).astype(np.float32)
    np.fill_diagonal(gram, 1.0)
    result = gptq.quantize(weight, gram, policy(damp_percent=0.05), scale_dtype="float32")
    codes, scale, _ = quantize_weight(weight, form=INT4, group_size=64, symmetric=True, scale_dtype="float32")
    np.testing.assert_array_equal(result.codes, codes)
    np.testing.assert_array_equal(result.scale, scale)
    assert result.damp_percent_used is None
    assert [note[:20] for note in result.notes] == [
        "factorisation failed",
        "factorisation failed",
        "GPTQ gave way to pla",
    ]


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_a_gram_matrix_that_says_nothing_ends_in_plain_rounding(fill: float) -> None:
    """All zero or not finite: plain codes, and the note gives the reason."""
    weight = np.random.default_rng(5).standard_normal((8, 128)).astype(np.float32)
    gram = np.full((128, 128), fill, dtype=np.float32)
    result = gptq.quantize(weight, gram, policy(), scale_dtype="float32")
    codes, _, _ = quantize_weight(weight, form=INT4, group_size=64, symmetric=True, scale_dtype="float32")
    np.testing.assert_array_equal(result.codes, codes)
    assert result.damp_percent_used is None
    assert "plain rounding" in result.notes[-1]


def test_one_number_that_is_not_finite_is_not_overlooked() -> None:
    """A NaN off the diagonal ends in plain rounding, not in NaN."""
    weight, gram = problem()
    gram[3, 150] = gram[150, 3] = np.nan
    result = gptq.quantize(weight, gram, policy(), scale_dtype="float32")
    assert result.damp_percent_used is None
    assert np.isfinite(result.scale).all()


def test_arguments_are_left_as_they_were() -> None:
    """Weight and Gram matrix may be read-only views of a checkpoint and of kept statistics."""
    weight, gram = problem()
    weight.setflags(write=False)
    gram.setflags(write=False)
    gptq.quantize(weight, gram, policy(), scale_dtype="float32")


def test_columns_that_do_not_divide_are_refused() -> None:
    """The message names channels and group size."""
    with pytest.raises(UserError, match="100 input channels"):
        gptq.quantize(
            np.zeros((4, 100), dtype=np.float32), np.eye(100, dtype=np.float32), policy(), scale_dtype="float32"
        )


def test_more_rows_than_a_tile_are_all_solved() -> None:
    """Rows do not meet: each comes out as it would alone, up to the order of float32 sums."""
    weight, gram = problem(out=2100, columns=64)
    used = policy()
    all_rows = gptq.quantize(weight, gram, used, scale_dtype="float32")
    last = gptq.quantize(weight[2040:], gram, used, scale_dtype="float32")
    assert (all_rows.codes[2040:] == last.codes).mean() > 0.97
