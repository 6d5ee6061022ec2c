from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import statistics_of

from gs_dist.errors import UserError
from gs_dist.model.decoder import LayerInput, Linear
from gs_dist.model.statistics import InputStatistics
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.recipe.sizes import stored_bytes
from gs_dist.results import integers
from gs_dist.results.costs import FLOAT, SchemeCost
from gs_dist.solvers.layer import LayerProblem
from gs_dist.solvers.sensitivity import choose_schemes, fits, layer_costs, layer_patterns, within_ceilings

SCHEMES = {
    "W8": QuantPolicy(),
    "W4": QuantPolicy(weight_quant_dtype="qint4x2", weight_quant_granularity="per_group", group_size=64),
}
BY_LINEAR = {"q": SCHEMES, "k": SCHEMES}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 128)) * rng.lognormal(size=128)
    seen = InputStatistics(
        num_tokens=50,
        minimum=x.min(axis=0).astype(np.float32),
        maximum=x.max(axis=0).astype(np.float32),
        sum_abs=np.abs(x).sum(axis=0),
        sum_squares=(x**2).sum(axis=0),
        gram=(x.T @ x).astype(np.float32),
    )
    tensors = {f"{n}.weight": rng.normal(size=(8, 128)).astype(np.float32) for n in ("q", "k")}
    return x, LayerProblem(
        layer=2,
        prefix="model.layers.2.",
        inputs=(LayerInput(name="x", channels=128, linears=("q", "k"), source=None),),
        linears=tuple(Linear(name=n, out_features=8, in_features=128, bias=False) for n in ("q", "k")),
        tensors=tensors,
        statistics={"x": seen},
        policies={},
        scale_dtype="bfloat16",
    )


def test_costs_are_the_output_error_of_rounding_the_weight(problem):
    """Each scheme's error is that of running the tokens through weights rounded by plain arithmetic."""
    x, solved = problem
    costs = {(c.name, c.scheme): c for c in layer_costs(solved, BY_LINEAR)}
    assert len(costs) == 6
    for name in ("q", "k"):
        weight = solved.tensors[f"{name}.weight"].astype(np.float64)
        for scheme, groups, half in (("W8", 1, 127.5), ("W4", 2, 7.5)):
            grouped = weight.reshape(8, groups, -1)
            scale = np.abs(grouped).max(axis=2, keepdims=True) / half
            rounded = np.clip(np.round(grouped / scale), -half - 0.5, half - 0.5) * scale
            exact = ((x @ (rounded - grouped).reshape(8, 128).T) ** 2).sum()
            found = costs[f"model.layers.2.{name}", scheme]
            assert found.error == pytest.approx(exact, rel=0.1)  # stored scales are bfloat16
            assert found.relative_error == pytest.approx(found.error / ((x @ weight.T) ** 2).sum(), rel=1e-3)
            assert found.group == "model.layers.2.x"
        assert costs[f"model.layers.2.{name}", FLOAT].error == 0


def test_any_number_of_threads_finds_the_same_costs(problem, monkeypatch):
    """To the last bit, with many blocks of rows."""
    monkeypatch.setattr(integers, "_BLOCK_ELEMENTS", 128)
    _, solved = problem
    alone = layer_costs(solved, BY_LINEAR)
    assert [layer_costs(solved, BY_LINEAR, num_threads=n) for n in (2, 3)] == [alone, alone]


def test_sizes_count_codes_scales_and_zero_points():
    """Bytes on storage by hand."""
    assert stored_bytes(None, (8, 128), "bfloat16") == 2048
    assert stored_bytes(SCHEMES["W8"], (8, 128), "bfloat16") == 1024 + 16
    assert stored_bytes(SCHEMES["W4"], (8, 128), "float32") == 512 + 8 * 2 * 4
    asymmetric = SCHEMES["W4"].model_copy(update={"weight_symmetric": False})
    assert stored_bytes(asymmetric, (8, 128), "bfloat16") == 512 + 8 * 2 * 2 + 8


def make_costs(table):
    return [
        SchemeCost(name=f"model.layers.{i}.a", group=str(i), scheme=s, num_bytes=b, error=e, relative_error=e)
        for i, options in enumerate(table)
        for s, (b, e) in options.items()
    ]


tables = st.lists(
    st.fixed_dictionaries(
        {
            "W4": st.tuples(st.integers(1, 40), st.integers(0, 100)),
            "W8": st.tuples(st.integers(1, 40), st.integers(0, 100)),
            FLOAT: st.tuples(st.integers(1, 40), st.just(0)),
        }
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(table=tables, share=st.floats(0, 1))
def test_the_choice_is_the_best_of_all_that_fit(table, share):
    """Trying every combination finds nothing better within the budget."""
    least = sum(min(b for b, _ in options.values()) for options in table)
    most = sum(max(b for b, _ in options.values()) for options in table)
    budget = least + round(share * (most - least))
    chosen = choose_schemes(make_costs(table), budget)
    picked = [options[chosen[f"model.layers.{i}.a"]] for i, options in enumerate(table)]
    assert sum(b for b, _ in picked) <= budget
    best = min(
        sum(e for _, e in combination)
        for combination in itertools.product(*(options.values() for options in table))
        if sum(b for b, _ in combination) <= budget
    )
    assert sum(e for _, e in picked) == best


def test_large_models_stay_within_a_budget_of_gigabytes():
    """Rounded sizes never overrun, and more room never costs accuracy."""
    rng = np.random.default_rng(0)
    table = [
        {"W4": (n // 2, 10 * e), "W8": (n, e), FLOAT: (2 * n, 0.0)}
        for n, e in zip(rng.integers(10**7, 3 * 10**8, 320).tolist(), rng.lognormal(size=320).tolist(), strict=True)
    ]
    errors = []
    for share in (0.5, 0.55, 0.8):
        budget = int(share * sum(options["W8"][0] for options in table)) + 320
        chosen = choose_schemes(make_costs(table), budget)
        picked = [options[chosen[f"model.layers.{i}.a"]] for i, options in enumerate(table)]
        assert 0.99 * budget <= sum(b for b, _ in picked) <= budget
        errors.append(sum(e for _, e in picked))
    assert errors == sorted(errors, reverse=True)


def test_linears_of_one_group_get_one_scheme(problem):
    """What an engine fuses stays together."""
    costs = layer_costs(problem[1], BY_LINEAR)
    for budget in (1500, 2500, 5000):
        assert len(set(choose_schemes(costs, budget).values())) == 1


def test_a_budget_below_the_smallest_choice_is_refused(problem):
    """The message gives both sizes."""
    with pytest.raises(UserError, match="1088 bytes and the budget is 100"):
        choose_schemes(layer_costs(problem[1], BY_LINEAR), 100)


def test_patterns_match_each_linear_once():
    """Every name is matched by one pattern, that of its scheme."""
    chosen = {
        f"model.layers.{i}.{linear}": "W4" if (i + k) % 3 else FLOAT
        for i in range(12)
        for k, linear in enumerate(("mlp.up_proj", "mlp.down_proj"))
    }
    patterns = layer_patterns(chosen)
    assert len(patterns) == 4
    for name, scheme in chosen.items():
        assert [s for p, s in patterns.items() if re.match(p, name)] == [scheme]


def one_massive_token() -> np.ndarray:
    """512 tokens of which one, in channel 5 alone, has 240,000 times the energy of any other."""
    x = np.random.default_rng(0).standard_normal((512, 256)).astype(np.float32)
    x[:, 5] = 0
    x[0, 5] = np.sqrt(240e3 * 256)
    return x


def two_layers_of_one_linear(loud: float) -> list[LayerProblem]:
    """Layer 0's column 5, which one token alone uses, is `loud` times the others; in layer 1 all are alike."""
    rng, problems = np.random.default_rng(1), []
    for layer, factor in enumerate((loud, 1.0)):
        weight = (rng.standard_normal((64, 256)) / 16).astype(np.float32)
        weight[:, 5] *= factor
        problems.append(
            LayerProblem(
                layer=layer,
                prefix=f"model.layers.{layer}.",
                inputs=(LayerInput(name="x", channels=256, linears=("q",), source=None),),
                linears=(Linear(name="q", out_features=64, in_features=256, bias=False),),
                tensors={"q.weight": weight},
                statistics={"x": statistics_of(one_massive_token(), sample=True)},
                policies={},
                scale_dtype="float32",
            )
        )
    return problems


def test_a_linear_that_loses_its_ordinary_tokens_gets_the_bits():
    """One token owns all energy, and of it little is lost where all others lose half: the choice sees the others."""
    per_channel = QuantPolicy(weight_quant_dtype="qint4x2")
    schemes = {"q": {"W8": QuantPolicy(), "W4": per_channel}}
    costs = [cost for problem in two_layers_of_one_linear(30.0) for cost in layer_costs(problem, schemes)]
    four_bits = [cost for cost in costs if cost.scheme == "W4"]
    assert four_bits[0].relative_error < four_bits[1].relative_error, "by energy layer 1 would be the worse one"
    assert four_bits[0].largest_error == four_bits[0].token_error > 0.5
    both = sum(cost.num_bytes for cost in four_bits)
    larger = max(cost.num_bytes for cost in costs if cost.scheme == "W8")
    chosen = choose_schemes(costs, both - four_bits[0].num_bytes + larger)
    assert chosen == {"model.layers.0.q": "W8", "model.layers.1.q": "W4"}


def test_a_scheme_past_a_ceiling_is_offered_to_no_linear_of_its_group():
    """Whichever figure is above its own ceiling; a figure that is no number is above every one."""
    errors = {("b", "W4"): (0.1, 0.9), ("b", "W8"): (0.01, 0.02)}
    costs = [
        SchemeCost(
            name=name, group=group, scheme=scheme, num_bytes=size, error=0.0, relative_error=all_, token_error=one
        )
        for name, group in (("a", "x"), ("b", "x"), ("c", "y"))
        for scheme, size in (("W4", 1), ("W8", 2))
        for all_, one in (errors.get((name, scheme), (0.02, 0.03)),)
    ]
    none = {"max_relative_error": None, "max_token_error": None}
    assert within_ceilings(costs, **none) == costs
    for ceilings in ({"max_token_error": 0.5}, {"max_relative_error": 0.05}):
        left = {(cost.name, cost.scheme) for cost in within_ceilings(costs, **{**none, **ceilings})}
        assert left == {("a", "W8"), ("b", "W8"), ("c", "W4"), ("c", "W8")}
    sound = within_ceilings(costs, max_relative_error=0.5, max_token_error=0.5)
    assert (fits(sound, 5), fits(sound, 4), fits(costs, 3)) == (True, False, True)
    assert choose_schemes(sound, 5) == {"a": "W8", "b": "W8", "c": "W4"}
    nothing = SchemeCost(
        name="d", group="z", scheme="W4", num_bytes=1, error=0.0, relative_error=0.0, token_error=float("nan")
    )
    assert within_ceilings([nothing], max_relative_error=0.5, max_token_error=0.5) == []


def test_the_median_token_of_a_cost_is_that_of_the_tokens_themselves():
    """By hand over all 512 tokens; the sample of 64 tells it to within what their number allows."""
    problem = two_layers_of_one_linear(30.0)[0]
    policy = QuantPolicy(weight_quant_dtype="qint4x2")
    costs = {cost.scheme: cost for cost in layer_costs(problem, {"q": {"W4": policy}})}
    weight = np.asarray(problem.tensors["q.weight"], dtype=np.float64)
    scale = np.abs(weight).max(axis=1, keepdims=True) / 7.5
    change = np.clip(np.round(weight / scale), -8, 7) * scale - weight
    x = one_massive_token().astype(np.float64)
    by_token = ((x @ change.T) ** 2).sum(axis=1) / ((x @ weight.T) ** 2).sum(axis=1)
    low, high = np.quantile(by_token, [0.3, 0.7])
    assert low <= (costs["W4"].token_error or 0.0) <= high
    assert costs[FLOAT].token_error is None
    assert costs[FLOAT].largest_error == 0.0


def test_without_a_sample_energy_alone_decides(problem):
    """No figure of the median token, and no zero that would pass for a good one."""
    assert {cost.token_error for cost in layer_costs(problem[1], BY_LINEAR)} == {None}
