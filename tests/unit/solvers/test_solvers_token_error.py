"""What the median token loses, and layers that only this figure gives away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from observed import statistics_of

from gs_dist.errors import LayerError
from gs_dist.model.decoder import LayerInput, Linear
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedLayer
from gs_dist.solvers.layer import LayerProblem, solve_layer

CHANNELS, TOKENS = 256, 512


def problem_of(x: np.ndarray, weight: np.ndarray, **policy: Any) -> LayerProblem:
    return LayerProblem(
        layer=0,
        prefix="model.layers.0.",
        inputs=(LayerInput(name="mlp_activation", channels=CHANNELS, linears=("mlp.down_proj",), source="n"),),
        linears=(Linear(name="mlp.down_proj", out_features=64, in_features=CHANNELS, bias=False),),
        tensors={"mlp.down_proj.weight": weight, "n.weight": np.ones(CHANNELS, np.float32)},
        statistics={"mlp_activation": statistics_of(x, weighted=True, histogram=True, sample=True)},
        policies={"mlp.down_proj": QuantPolicy(weight_quant_dtype="int8", **policy)},
        scale_dtype="float32",
    )


def one_massive_token(times: float = 240e3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, CHANNELS)).astype(np.float32)
    x[0, 5] = np.sqrt(times * CHANNELS)
    return x, (rng.standard_normal((64, CHANNELS)) / 16).astype(np.float32)


def true_errors(x: np.ndarray, weight: np.ndarray, solved: QuantizedLayer) -> np.ndarray:
    """Of every token, by hand."""
    linear = solved.linears["mlp.down_proj"]
    read = x * solved.tensors["n.weight"]
    if linear.input_scale is not None:
        read = np.clip(np.rint(read / linear.input_scale), -128, 127) * linear.input_scale
    output = x @ weight.T
    return np.asarray(((read @ linear.dequantized().T - output) ** 2).sum(1) / (output**2).sum(1))


@pytest.mark.parametrize(
    "policy",
    [
        {"act_quant_dtype": "int8", "act_range": "minmax"},
        {"act_quant_dtype": "int8", "act_range": "mse"},
        {"act_quant_dtype": "int8", "act_range": "minmax", "outliers_suppression": "smooth"},
        {"act_quant_dtype": "int8", "act_quant_granularity": "per_token", "outliers_suppression": "smooth"},
        {},
    ],
)
def test_the_figure_is_close_to_the_median_over_all_tokens(policy: dict[str, Any]) -> None:
    """64 tokens tell the median of 512 to within what their number allows, whatever rounds inputs and weights."""
    x, weight = one_massive_token()
    solved = solve_layer(problem_of(x, weight, **policy))
    told = solved.rows[0].token_error
    if policy.get("act_quant_granularity") == "per_token":
        assert told is not None
        assert 1e-5 < told < 1e-2
        return
    low, high = np.quantile(true_errors(x, weight, solved), [0.3, 0.7])
    assert low <= (told or 0.0) <= high


def test_a_step_that_rounds_all_but_one_token_to_zero_is_refused() -> None:
    """The sum over all tokens loses 0.2 % and 511 of 512 tokens everything: max_token_error names them."""
    x, weight = one_massive_token()
    problem = problem_of(x, weight, act_quant_dtype="int8", act_range="minmax")
    free = solve_layer(problem)
    assert (true_errors(x, weight, free) == 1.0).sum() == TOKENS - 1
    assert (free.rows[0].energy_error or 1.0) < 0.01
    with pytest.raises(LayerError, match=r"1 of the median token's output is lost \(max_token_error is 0\.5"):
        solve_layer(problem, max_relative_error=0.5, max_token_error=0.5)
    kept = solve_layer(problem, max_relative_error=0.5, max_token_error=0.5, on_bad_layer="keep_float")
    assert not kept.linears
    assert "median token" in kept.rows[0].notes[0]


def test_a_loud_column_that_ruins_the_weights_of_ordinary_tokens_is_refused() -> None:
    """A column that only one token uses sets each row's range: of all energy 1e-5 is lost, of the median token most."""
    x, weight = one_massive_token()
    weight[:, 5] *= 3000
    x[1:, 5] = 0
    problem = problem_of(x, weight)
    row = solve_layer(problem).rows[0]
    assert (row.energy_error or 1.0) < 1e-3
    assert (row.token_error or 0.0) > 0.5
    assert row.largest_error == row.token_error
    with pytest.raises(LayerError, match="median token"):
        solve_layer(problem, max_relative_error=0.5, max_token_error=0.5)


def test_a_range_that_gives_up_the_one_massive_token_is_refused_for_what_it_loses() -> None:
    """The median token is served, the token that owns the energy is not: the message says which."""
    x, weight = one_massive_token()
    problem = problem_of(x, weight, act_quant_dtype="int8", act_range="mse")
    with pytest.raises(LayerError, match=r"of the output's energy is lost \(max_relative_error is 0\.5\); choose"):
        solve_layer(problem, max_relative_error=0.5, max_token_error=0.5)


def test_without_a_sample_there_is_no_figure() -> None:
    """None, and no zero that would pass for a good one."""
    x, weight = one_massive_token()
    problem = problem_of(x, weight)
    seen = statistics_of(x, weighted=True)
    assert (
        solve_layer(LayerProblem(**{**vars(problem), "statistics": {"mlp_activation": seen}})).rows[0].token_error
        is None
    )
