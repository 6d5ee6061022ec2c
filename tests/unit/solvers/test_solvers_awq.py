"""AWQ's scale search against brute force over materialised inputs in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gs_dist.errors import UserError
from gs_dist.model.statistics import InputStatistics
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.solvers import awq
from gs_dist.solvers.objective import GramObjective

Array = npt.NDArray[Any]


def policy(*, group_size: int = 64, symmetric: bool = True, bits: int = 4, **algo_args: Any) -> QuantPolicy:
    return QuantPolicy(
        outliers_suppression="awq",
        weight_quant_dtype="qint4x2" if bits == 4 else "int8",
        weight_quant_granularity="per_group" if group_size else "per_channel",
        group_size=group_size,
        weight_symmetric=symmetric,
        algo_args=algo_args,
    )


def observe(x: Array) -> InputStatistics:
    return InputStatistics(
        num_tokens=len(x),
        minimum=x.min(axis=0),
        maximum=x.max(axis=0),
        sum_abs=np.abs(x).sum(axis=0, dtype=np.float64),
        sum_squares=(x.astype(np.float64) ** 2).sum(axis=0),
        gram=x.T @ x,
    )


def problem(columns: int = 128, seed: int = 0) -> tuple[list[Array], Array]:
    """Two weights that share an input, a few of whose channels are large."""
    rng = np.random.default_rng(seed)
    size = np.exp(0.4 * rng.standard_normal(columns))
    size[rng.choice(columns, 6, replace=False)] *= 15
    x = (
        rng.standard_normal((300, columns)) @ (np.eye(columns) + 0.05 * rng.standard_normal((columns, columns)))
    ) * size
    weights = [rng.standard_normal((out, columns)).astype(np.float32) for out in (40, 24)]
    return weights, x.astype(np.float32)


def rounded(weight: Array, group_size: int, symmetric: bool, bits: int) -> Array:
    """Plain rounding and back, row by row and group by group.

    In float32: the most negative weight of a symmetric range lies half way between two codes.
    """
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    result = np.empty(weight.shape)
    size = group_size or weight.shape[1]
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], size):
            w = weight[row, start : start + size].astype(np.float32)
            low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
            scale = np.float32((2 * max(-low, high) if symmetric else high - low) / (2**bits - 1))
            zero = np.float32(0.0 if symmetric else np.clip(np.rint(smallest - low / float(scale)), smallest, largest))
            codes = np.clip(np.rint(w / scale + zero), smallest, largest)
            result[row, start : start + size] = (codes - zero).astype(np.float64) * float(scale)
    return result


def brute_force(
    weights: list[Array], x: Array, alphas: tuple[float, ...], *, duo: bool, group_size: int, symmetric: bool, bits: int
) -> tuple[list[Array], list[float]]:
    """Scales and losses |X (Q(W s) / s - W)T|^2 of every exponent, from the inputs themselves."""
    wide = x.astype(np.float64)
    x_mean = np.abs(wide).mean(axis=0)
    stacked = np.concatenate(weights).astype(np.float64)
    size = group_size or stacked.shape[1]
    grouped = np.abs(stacked).reshape(len(stacked), -1, size)
    w_mean = (grouped / (grouped.max(axis=2, keepdims=True) + 1e-6)).reshape(stacked.shape).mean(axis=0)
    scales, losses = [], []
    for alpha in alphas:
        scale = x_mean**alpha / (w_mean ** (1 - alpha) + 1e-4) if duo else x_mean**alpha
        scale = np.maximum(scale, 1e-4)
        scale = scale / np.sqrt(scale.max() * scale.min())
        scales.append(scale)
        losses.append(
            sum(
                float(
                    (
                        (wide @ (rounded(w * scale.astype(np.float32), group_size, symmetric, bits) / scale - w).T) ** 2
                    ).sum()
                )
                for w in weights
            )
        )
    return scales, losses


@pytest.mark.parametrize("duo", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "bits"), [(64, 4), (0, 4), (0, 8)])
def test_losses_and_choice_are_those_of_materialized_inputs(
    duo: bool, symmetric: bool, group_size: int, bits: int
) -> None:
    """Every exponent's loss from the Gram matrix equals the error of real outputs; the least of them wins."""
    weights, x = problem()
    used = policy(group_size=group_size, symmetric=symmetric, bits=bits, duo_scaling=duo)
    alphas = used.exponents
    assert isinstance(alphas, tuple)
    scales, losses = brute_force(weights, x, alphas, duo=duo, group_size=group_size, symmetric=symmetric, bits=bits)
    result = awq.search_scale(weights, observe(x), used, objective=GramObjective(x.T @ x), scale_dtype="float32")
    np.testing.assert_allclose(result.losses, losses, rtol=2e-3)
    assert result.alpha is not None
    chosen = alphas.index(result.alpha)
    np.testing.assert_allclose(result.scale, scales[chosen], rtol=1e-5)
    assert losses[chosen] == pytest.approx(min(losses), rel=2e-3)
    assert result.loss == result.losses[chosen] == min(result.losses)


def test_the_search_lessens_the_error_of_plain_rounding() -> None:
    """With a few large channels the gain is large, and the loss of plain rounding is told beside it."""
    weights, x = problem()
    result = awq.search_scale(weights, observe(x), policy(), objective=GramObjective(x.T @ x), scale_dtype="float32")
    plain = sum(float(((x @ (rounded(w, 64, True, 4) - w).T) ** 2).sum()) for w in weights)
    assert result.loss_before == pytest.approx(plain, rel=1e-3)
    assert result.loss < 0.6 * plain


def test_a_single_exponent_is_used_as_it_is() -> None:
    """A float is no search: it is taken even where plain rounding would be better."""
    weights, x = problem()
    used = policy(smooth_alpha=1.0, duo_scaling=False)
    result = awq.search_scale(weights, observe(x), used, objective=GramObjective(x.T @ x), scale_dtype="float32")
    x_mean = np.abs(x.astype(np.float64)).mean(axis=0)
    assert result.alpha == 1.0
    assert len(result.losses) == 1
    np.testing.assert_allclose(result.scale, x_mean / np.sqrt(x_mean.max() * x_mean.min()), rtol=1e-5)


def test_the_first_of_equals_wins() -> None:
    """Channels alike make every exponent the same scale: the search stays with the first, or with none."""
    rng = np.random.default_rng(1)
    signs = np.where(rng.standard_normal((64, 64)) > 0, 1.0, -1.0).astype(np.float32)
    weight = rng.standard_normal((8, 64)).astype(np.float32)
    used = policy(smooth_alpha=(0.2, 0.8), duo_scaling=False)
    result = awq.search_scale(
        [weight], observe(signs), used, objective=GramObjective(signs.T @ signs), scale_dtype="float32"
    )
    assert result.losses[0] == result.losses[1] == result.loss_before
    assert result.alpha is None
    np.testing.assert_array_equal(result.scale, np.ones(64, dtype=np.float32))


def test_a_search_that_finds_nothing_better_leaves_weights_alone() -> None:
    """Where every candidate is worse than plain rounding the scale is 1 and no exponent is named."""
    rng = np.random.default_rng(2)
    weight = np.rint(rng.uniform(-7, 7, (16, 64))).astype(np.float32)
    weight[:, 0] = 7.5  # on the grid of its scale as it stands
    weight[:, 1:] = np.rint(weight[:, 1:])
    x = (rng.standard_normal((200, 64)) * np.exp(rng.standard_normal(64))).astype(np.float32)
    result = awq.search_scale([weight], observe(x), policy(), objective=GramObjective(x.T @ x), scale_dtype="float32")
    assert result.alpha is None
    assert result.loss == result.loss_before < min(result.losses)
    np.testing.assert_array_equal(result.scale, np.ones(64, dtype=np.float32))


def test_channels_without_input_or_weight_keep_scale_one() -> None:
    """A channel that was never active, or that no weight reads, is not rescaled, and nothing is infinite."""
    weights, x = problem()
    x[:, 5] = 0.0
    for weight in weights:
        weight[:, 9] = 0.0
    used = policy(smooth_alpha=0.5)
    result = awq.search_scale(weights, observe(x), used, objective=GramObjective(x.T @ x), scale_dtype="float32")
    assert result.scale[5] == 1.0
    assert result.scale[9] == 1.0
    assert np.isfinite(result.scale).all()
    assert (result.scale > 0).all()


@pytest.mark.parametrize("duo", [True, False])
def test_scales_lie_around_one(duo: bool) -> None:
    """The largest and the smallest scale multiply to 1, so that neither side's size drifts."""
    weights, x = problem()
    used = policy(smooth_alpha=0.6, duo_scaling=duo)
    scale = awq.search_scale(weights, observe(x), used, objective=GramObjective(x.T @ x), scale_dtype="float32").scale
    assert float(scale.max()) * float(scale.min()) == pytest.approx(1.0, rel=1e-5)


def test_tied_channels_share_a_scale() -> None:
    """Query heads of one KV head get that head's scale: the larger x_mean and the mean w_mean count."""
    weights, x = problem()
    tie = np.tile(np.arange(32), 4) + 32 * (np.arange(128) // 64)  # two KV heads of 32, two query heads each
    used = policy(smooth_alpha=0.5)
    scale = awq.search_scale(
        weights, observe(x), used, objective=GramObjective(x.T @ x), scale_dtype="float32", tie=tie
    ).scale
    x_mean = np.abs(x.astype(np.float64)).mean(axis=0)
    w_mean = awq.weight_importance(weights, 64)
    expected = np.empty(128)
    for channel in range(128):
        mates = tie == tie[channel]
        expected[channel] = np.sqrt(x_mean[mates].max()) / (np.sqrt(w_mean[mates].mean()) + 1e-4)
    expected /= np.sqrt(expected.max() * expected.min())
    np.testing.assert_allclose(scale, expected, rtol=1e-5)


def test_rounded_scales_enter_the_search() -> None:
    """The loss counts weight scales as they will be stored."""
    weights, x = problem()
    single = awq.search_scale(weights, observe(x), policy(), objective=GramObjective(x.T @ x), scale_dtype="float32")
    half = awq.search_scale(weights, observe(x), policy(), objective=GramObjective(x.T @ x), scale_dtype="bfloat16")
    assert half.losses != single.losses
    np.testing.assert_allclose(half.losses, single.losses, rtol=0.1)


def test_more_rows_than_a_tile_and_more_columns_than_a_block() -> None:
    """Blocking does not show: the loss of a taller and wider weight is that of its outputs."""
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((1100, 640)).astype(np.float32)
    x = (rng.standard_normal((900, 640)) * np.exp(rng.standard_normal(640))).astype(np.float32)
    used = policy(smooth_alpha=0.0, duo_scaling=False)
    result = awq.search_scale([weight], observe(x), used, objective=GramObjective(x.T @ x), scale_dtype="float32")
    grouped = weight.astype(np.float64).reshape(1100, 10, 64)
    step = np.abs(grouped).max(axis=2, keepdims=True) / 7.5
    delta = (np.clip(np.rint(grouped / step), -8, 7) * step - grouped).reshape(1100, 640)
    assert result.loss == pytest.approx(float(((x.astype(np.float64) @ delta.T) ** 2).sum()), rel=1e-3)


@pytest.mark.parametrize("group_size", [0, 64])
def test_arguments_are_left_as_they_were(group_size: int) -> None:
    """Weights and Gram matrix may be read-only views of a checkpoint and of kept statistics."""
    weights, x = problem()
    gram = x.T @ x
    for array in (*weights, gram):
        array.setflags(write=False)
    awq.search_scale(
        weights, observe(x), policy(group_size=group_size), objective=GramObjective(gram), scale_dtype="float32"
    )


def test_columns_that_do_not_divide_are_refused() -> None:
    """The message names channels and group size."""
    x = np.ones((10, 100), dtype=np.float32)
    with pytest.raises(UserError, match="100 input channels"):
        awq.search_scale([x], observe(x), policy(), objective=GramObjective(x.T @ x), scale_dtype="float32")
