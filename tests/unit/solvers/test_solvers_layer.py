from __future__ import annotations

import threading
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from observed import statistics_of

from gs_dist.errors import LayerError, UserError
from gs_dist.model.decoder import LayerInput, Linear
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.results import integers
from gs_dist.solvers import awq, clip, gptq
from gs_dist.solvers.layer import LayerProblem, solve_layer

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MIDDLE, TOKENS = 64, 4, 2, 16, 128, 40
INPUTS = (
    LayerInput(
        name="attention_input",
        channels=HIDDEN,
        linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        source="input_layernorm",
    ),
    LayerInput(
        name="attention_output",
        channels=HEADS * HEAD_DIM,
        linears=("self_attn.o_proj",),
        source="self_attn.v_proj",
        repeat=HEADS // KV_HEADS,
        head_dim=HEAD_DIM,
    ),
    LayerInput(
        name="mlp_input",
        channels=HIDDEN,
        linears=("mlp.gate_proj", "mlp.up_proj"),
        source="post_attention_layernorm",
    ),
    LayerInput(name="mlp_activation", channels=MIDDLE, linears=("mlp.down_proj",), source="mlp.up_proj"),
)
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}
PREFIX = "model.layers.3."
W8A16 = QuantPolicy()
STATIC = QuantPolicy(act_quant_dtype="int8")
DYNAMIC = QuantPolicy(act_quant_dtype="int8", act_quant_granularity="per_token")
SMOOTH = QuantPolicy(act_quant_dtype="int8", outliers_suppression="smooth")
FEW = AlgoArgs(smooth_alpha=(0.3, 0.5, 0.7))  # strengths to search where the search is not what is looked at


def softmax(scores):
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def forward(tensors, hidden):
    """A decoder layer in float64 without rotary embedding; returns its output and what its linears read."""
    get = lambda name: tensors[name].astype(np.float64)  # noqa: E731 - reads as the formula does
    seen = {}

    def linear(name, x):
        bias = get(f"{name}.bias") if f"{name}.bias" in tensors else 0.0
        return x @ get(f"{name}.weight").T + bias

    def norm(name, x):
        bias = get(f"{name}.bias") if f"{name}.bias" in tensors else 0.0
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True)) * get(f"{name}.weight") + bias

    x = seen["attention_input"] = norm("input_layernorm", hidden)
    q = linear("self_attn.q_proj", x).reshape(-1, HEADS, HEAD_DIM)
    k = seen["key"] = linear("self_attn.k_proj", x)
    v = seen["value"] = linear("self_attn.v_proj", x)
    k, v = (a.reshape(-1, KV_HEADS, HEAD_DIM) for a in (k, v))
    heads = [softmax(q[:, h] @ k[:, h * KV_HEADS // HEADS].T / 4) @ v[:, h * KV_HEADS // HEADS] for h in range(HEADS)]
    x = seen["attention_output"] = np.concatenate(heads, axis=1)
    hidden = hidden + linear("self_attn.o_proj", x)
    x = seen["mlp_input"] = norm("post_attention_layernorm", hidden)
    gate = linear("mlp.gate_proj", x)
    x = seen["mlp_activation"] = gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", x)
    return hidden + linear("mlp.down_proj", x), seen


def make_problem(policy=W8A16, *, dtype=np.float32, biases=(), seed=0, gram=True, **policies):
    rng = np.random.default_rng(seed)
    tensors = {
        f"{name}.weight": (rng.normal(size=shape) / np.sqrt(shape[1])).astype(dtype) for name, shape in SHAPES.items()
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        # Outliers between channels are what smoothing is for.
        tensors[f"{name}.weight"] = rng.lognormal(sigma=0.8, size=HIDDEN).astype(dtype)
    # Soft attention: hard maxima would turn a small rounding error into another token's value.
    tensors["self_attn.q_proj.weight"] = (tensors["self_attn.q_proj.weight"] * dtype(0.1)).astype(dtype)
    for name in biases:
        tensors[f"{name}.bias"] = rng.normal(size=SHAPES[name][0]).astype(dtype)
    hidden = rng.normal(size=(TOKENS, HIDDEN))
    _, seen = forward(tensors, hidden)
    for array in tensors.values():
        array.flags.writeable = False
    statistics = {}
    for name, x in seen.items():
        statistics[name] = statistics_of(x.astype(np.float32), gram=gram, weighted=gram, histogram=True)
    problem = LayerProblem(
        layer=3,
        prefix=PREFIX,
        inputs=INPUTS,
        linears=tuple(Linear(name=n, out_features=o, in_features=i, bias=n in biases) for n, (o, i) in SHAPES.items()),
        tensors=tensors,
        statistics=statistics,
        policies={name: policies.get(name.rpartition(".")[2], policy) for name in SHAPES},
        scale_dtype={np.float32: "float32", np.float16: "float16"}.get(dtype, "bfloat16"),
    )
    return problem, hidden, seen


def restored(solved):
    """All tensors of the solved layer with integers turned back into floats."""
    tensors = dict(solved.tensors)
    for name, linear in solved.linears.items():
        tensors[f"{name}.weight"] = linear.dequantized()
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias
    return tensors


def test_w8a16_rounds_every_linear_and_leaves_the_rest_bit_for_bit():
    """Codes are those of absmax/127.5, and norms are the very source arrays."""
    problem, _, _ = make_problem()
    solved = solve_layer(problem)
    assert list(solved.linears) == list(SHAPES)
    for name, linear in solved.linears.items():
        weight = problem.tensors[f"{name}.weight"].astype(np.float64)
        scale = (np.abs(weight).max(axis=1, keepdims=True) / 127.5).astype(np.float32)
        np.testing.assert_array_equal(linear.scale, scale)
        np.testing.assert_array_equal(
            linear.codes, np.clip(np.round(weight.astype(np.float32) / scale), -128, 127).astype(np.int8)
        )
        assert linear.input_scale is None
    assert set(solved.tensors) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    for name, tensor in solved.tensors.items():
        assert tensor is problem.tensors[name]
    assert solved.kv_cache is None


def test_rows_hold_the_error_of_a_forward_pass():
    """tr(D G DT) / tr(W G WT) is the squared output error over tokens, computed here by running them."""
    problem, _, seen = make_problem(QuantPolicy(weight_quant_dtype="qint4x2"))
    solved = solve_layer(problem)
    for row in solved.rows:
        name = row.name.removeprefix(PREFIX)
        read = next(i.name for i in INPUTS if name in i.linears)
        weight = problem.tensors[f"{name}.weight"].astype(np.float64)
        exact = seen[read] @ weight.T
        error = seen[read] @ solved.linears[name].dequantized().astype(np.float64).T - exact
        assert row.relative_error == pytest.approx((error**2).sum() / (exact**2).sum(), rel=1e-3)
        assert row.error_source == "gram"
        assert row.strategy == "W4-perchannel"
        assert row.num_tokens == TOKENS
        assert row.activation_error is None


def test_without_gram_matrices_the_diagonal_stands_in_and_the_row_says_so():
    """Errors from sums of squares are of the right size and marked."""
    problem, _, _ = make_problem(gram=False)
    exact, _, _ = make_problem()
    for row, reference in zip(solve_layer(problem).rows, solve_layer(exact).rows, strict=True):
        assert row.error_source == "diagonal"
        assert 0.2 < row.relative_error / reference.relative_error < 5


@pytest.mark.parametrize("suppression", ["smooth", "outlier-suppression-lite", "outlier-suppression+"])
@pytest.mark.parametrize("biases", [(), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), tuple(SHAPES)])
def test_folding_keeps_the_function_of_the_layer(suppression, biases):
    """With 8-bit weights the layer's output moves by rounding only, grouped queries and biases included."""
    policy = QuantPolicy(act_quant_dtype="int8", outliers_suppression=suppression, algo_args=FEW)
    problem, hidden, _ = make_problem(policy, biases=biases)
    solved = solve_layer(problem)
    expected, _ = forward(problem.tensors, hidden)
    found, _ = forward(restored(solved), hidden)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert not np.array_equal(solved.tensors["input_layernorm.weight"], problem.tensors["input_layernorm.weight"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_smoothquant_scales_are_those_of_the_formula(dtype):
    """Norms are divided by max|x|^a / max|W|^(1-a); query heads of a KV head share the larger maximum."""
    policy = SMOOTH.model_copy(update={"algo_args": AlgoArgs(alpha=0.6)})
    problem, _, seen = make_problem(policy, dtype=dtype)
    solved = solve_layer(problem)
    weights = {n: problem.tensors[f"{n}.weight"].astype(np.float64) for n in SHAPES}
    x = np.abs(seen["attention_input"]).max(axis=0)
    w = np.abs(np.concatenate([weights[n] for n in INPUTS[0].linears])).max(axis=0)
    s = x**0.6 / w**0.4
    tolerance = {np.float32: 1e-5, np.float16: 1e-3}.get(dtype, 8e-3)
    norm = solved.tensors["input_layernorm.weight"]
    assert norm.dtype == problem.tensors["input_layernorm.weight"].dtype
    np.testing.assert_allclose(
        norm.astype(float), problem.tensors["input_layernorm.weight"].astype(float) / s, rtol=tolerance
    )
    # v to o, one KV head and one channel at a time
    x = np.abs(seen["attention_output"]).max(axis=0)
    w = np.abs(weights["self_attn.o_proj"]).max(axis=0)
    o = solved.linears["self_attn.o_proj"].dequantized().astype(float)
    for kv_head in range(KV_HEADS):
        for d in range(HEAD_DIM):
            columns = [h * HEAD_DIM + d for h in range(HEADS) if h // 2 == kv_head]
            s_shared = x[columns].max() ** 0.6 / w[columns].max() ** 0.4
            expected = weights["self_attn.o_proj"][:, columns] * s_shared
            step = solved.linears["self_attn.o_proj"].scale
            assert np.abs(o[:, columns] - expected).max() <= step.max() * 1.1


def test_a_list_of_alphas_is_searched_group_by_group():
    """Each group takes the exponent that leaves it the least error, and a single one is used as it is."""
    alphas = (0.3, 0.5, 0.8)

    def run(alpha):
        used = SMOOTH.model_copy(update={"algo_args": AlgoArgs(alpha=alpha), "weight_clip": False})
        return solve_layer(make_problem(used)[0])

    fixed, searched = [run(alpha) for alpha in alphas], run(alphas)
    assert {row.strategy for row in searched.rows} == {"SmoothQuant-W8-perchannel-A8-pertensor"}
    for name, linear in searched.linears.items():
        if name in ("self_attn.v_proj", "mlp.up_proj"):
            continue  # their rows also hold the scale of what they feed
        assert any(np.array_equal(linear.codes, other.linears[name].codes) for other in fixed)

    def total(solved):
        return sum(row.relative_error + row.activation_error for row in solved.rows)

    assert total(searched) <= min(total(solved) for solved in fixed) * 1.1


def test_a_bfloat16_norm_is_folded_with_the_ratio_that_was_stored():
    """Columns are multiplied by old/new of the rounded norm, so that rounding the norm costs nothing."""
    problem, _, _ = make_problem(SMOOTH, dtype=ml_dtypes.bfloat16, o_proj=W8A16, down_proj=W8A16)
    solved = solve_layer(problem)
    expected = problem.tensors["mlp.up_proj.weight"].astype(np.float64) * problem.tensors[
        "post_attention_layernorm.weight"
    ].astype(np.float64)
    up = solved.linears["mlp.up_proj"]
    norm = solved.tensors["post_attention_layernorm.weight"].astype(np.float64)
    assert np.all(np.abs(up.dequantized() * norm - expected) <= up.scale * norm * 1.03)


def test_static_scales_cover_the_rescaled_activation():
    """The input scale is absmax/127.5 of x / s, as a forward pass of the folded layer gives it."""
    problem, hidden, _ = make_problem(SMOOTH)
    solved = solve_layer(problem)
    _, seen = forward(restored(solved), hidden)
    for layer_input in INPUTS[:1] + INPUTS[2:3]:
        for name in layer_input.linears:
            assert solved.linears[name].input_scale == pytest.approx(
                np.abs(seen[layer_input.name]).max() / 127.5, rel=0.02
            )
            assert solved.linears[name].input_zero_point is None


def test_asymmetric_static_activations_get_a_zero_point():
    """act_symmetric false spends 255 steps on the range seen."""
    problem, _, seen = make_problem(STATIC.model_copy(update={"act_symmetric": False, "act_range": "minmax"}))
    linear = solve_layer(problem).linears["mlp.down_proj"]
    low, high = seen["mlp_activation"].min(), seen["mlp_activation"].max()
    assert linear.input_scale == pytest.approx((high - low) / 255, rel=1e-5)
    assert linear.input_zero_point == round(-128 - low / linear.input_scale)


STRATEGIES = {
    "W8-perchannel": W8A16,
    "W8-perchannel-A8-pertensor": STATIC,
    "W8-perchannel-A8-pertoken": DYNAMIC,
    "SmoothQuant-wclip-W8-perchannel-A8-pertensor": SMOOTH,
    "SmoothQuant-W8-perchannel-A8-pertensor": SMOOTH.model_copy(update={"weight_clip": False}),
    "W8-pergroup": QuantPolicy(weight_quant_granularity="per_group", group_size=64),
    "W4-pergroup": QuantPolicy(weight_quant_dtype="qint4x2", weight_quant_granularity="per_group", group_size=64),
    "wclip-W8-perchannel": QuantPolicy(weight_clip=True),
    "AWQ-wclip-W4-pergroup": QuantPolicy(
        weight_quant_dtype="qint4x2",
        weight_quant_granularity="per_group",
        group_size=64,
        outliers_suppression="awq",
    ),
    "GPTQ-W4-pergroup": QuantPolicy(
        weight_quant_dtype="qint4x2",
        weight_quant_granularity="per_group",
        group_size=64,
        precision_recovery="gptq",
    ),
    "AWQ-wclip-GPTQ-W4-pergroup": QuantPolicy(
        weight_quant_dtype="qint4x2",
        weight_quant_granularity="per_group",
        group_size=64,
        outliers_suppression="awq",
        precision_recovery="gptq",
    ),
    "GPTQ-W4-perchannel-A8-pertoken": QuantPolicy(
        weight_quant_dtype="qint4x2",
        act_quant_dtype="int8",
        act_quant_granularity="per_token",
        precision_recovery="gptq",
        algo_args=AlgoArgs(desc_act=True, static_groups=True),
    ),
    "OSL-wclip-W8-perchannel-A8-pertensor": QuantPolicy(
        act_quant_dtype="int8", outliers_suppression="outlier-suppression-lite"
    ),
    "OutlierSuppressionPlus-wclip-W8-perchannel-A8-pertensor": QuantPolicy(
        act_quant_dtype="int8", outliers_suppression="outlier-suppression+"
    ),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_scheme_is_solved_and_spelt_as_the_reference_page_does(strategy):
    """The row's strategy is exact, the error is small, and the source arrays are untouched."""
    problem, hidden, _ = make_problem(STRATEGIES[strategy])
    before = {name: tensor.copy() for name, tensor in problem.tensors.items()}
    grams = {name: s.gram.copy() for name, s in problem.statistics.items()}
    solved = solve_layer(problem)
    assert {row.strategy for row in solved.rows} == {strategy}
    assert max(row.relative_error for row in solved.rows) < 0.05
    expected, _ = forward(problem.tensors, hidden)
    found, _ = forward(restored(solved), hidden)
    assert ((found - expected) ** 2).sum() < 0.05 * (expected**2).sum()
    for name, tensor in before.items():
        np.testing.assert_array_equal(problem.tensors[name], tensor)
    for name, gram in grams.items():
        np.testing.assert_array_equal(problem.statistics[name].gram, gram)


def test_solving_twice_gives_the_same_bytes():
    """A layer is a function of its problem."""
    policy = STRATEGIES["AWQ-wclip-GPTQ-W4-pergroup"]
    first, second = (solve_layer(make_problem(policy)[0]) for _ in range(2))
    for name, linear in first.linears.items():
        assert linear.codes.tobytes() == second.linears[name].codes.tobytes()
        assert linear.scale.tobytes() == second.linears[name].scale.tobytes()
    assert first.rows == second.rows


def test_linears_without_a_policy_keep_their_source_tensors_and_show_na():
    """None leaves weight and bias as they are; the row says NA and has no error."""
    problem, _, _ = make_problem(down_proj=None, biases=("mlp.down_proj",))
    solved = solve_layer(problem)
    assert solved.tensors["mlp.down_proj.weight"] is problem.tensors["mlp.down_proj.weight"]
    assert solved.tensors["mlp.down_proj.bias"] is problem.tensors["mlp.down_proj.bias"]
    row = solved.rows[-1]
    assert (row.name, row.strategy, row.relative_error, row.error_source) == (
        PREFIX + "mlp.down_proj",
        "NA",
        None,
        "none",
    )


def test_a_float_linear_absorbs_the_scale_of_what_follows():
    """v_proj left in float still has its rows divided when o_proj is smoothed."""
    problem, hidden, _ = make_problem(None, o_proj=SMOOTH)
    solved = solve_layer(problem)
    assert list(solved.linears) == ["self_attn.o_proj"]
    assert not np.array_equal(solved.tensors["self_attn.v_proj.weight"], problem.tensors["self_attn.v_proj.weight"])
    expected, found = forward(problem.tensors, hidden)[0], forward(restored(solved), hidden)[0]
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_mixed_policies_within_a_smoothed_group_are_refused_by_name():
    """The message names the linears that share the input."""
    problem, _, _ = make_problem(SMOOTH, k_proj=None)
    with pytest.raises(ValueError, match=r"q_proj, self_attn\.k_proj, self_attn\.v_proj.*policies differ"):
        solve_layer(problem)
    solve_layer(make_problem(STATIC, k_proj=None)[0])  # nothing is rescaled: any mixture will do


@pytest.mark.parametrize("damage", ["absent", "empty", "nan"])
def test_unusable_statistics_end_with_layer_and_linear_named(damage):
    """Absent, empty and non-finite statistics are a LayerError that says where."""
    problem, _, _ = make_problem()
    statistics = dict(problem.statistics)
    if damage == "absent":
        del statistics["mlp_activation"]
    elif damage == "empty":
        statistics["mlp_activation"] = replace(statistics["mlp_activation"], num_tokens=0)
    else:
        broken = statistics["mlp_activation"].sum_squares.copy()
        broken[5] = np.inf
        statistics["mlp_activation"] = replace(statistics["mlp_activation"], sum_squares=broken)
    with pytest.raises(LayerError, match=r"layer 3: input mlp_activation.*mlp\.down_proj"):
        solve_layer(replace(problem, statistics=statistics))


def test_weights_that_are_not_finite_are_named():
    """A damaged tensor stops the layer with its name."""
    problem, _, _ = make_problem()
    broken = problem.tensors["mlp.up_proj.weight"].copy()
    broken[1, 1] = np.nan
    with pytest.raises(UserError, match=r"layer 3.*mlp\.up_proj\.weight"):
        solve_layer(replace(problem, tensors={**problem.tensors, "mlp.up_proj.weight": broken}))


def test_a_linear_above_the_ceiling_fails_the_layer_or_stays_float_with_its_group():
    """Setting fail names linear and setting; keep_float leaves the group in float and the rows say why."""
    four_bits = QuantPolicy(weight_quant_dtype="qint4x2")
    problem, _, _ = make_problem(W8A16, up_proj=four_bits)
    with pytest.raises(LayerError, match=r"mlp\.up_proj.*on_bad_layer: keep_float"):
        solve_layer(problem, max_relative_error=1e-3)
    solved = solve_layer(problem, max_relative_error=1e-3, on_bad_layer="keep_float")
    assert set(SHAPES) - set(solved.linears) == {"mlp.up_proj", "mlp.gate_proj"}
    rows = {row.name.removeprefix(PREFIX): row for row in solved.rows}
    assert rows["mlp.up_proj"].strategy == rows["mlp.gate_proj"].strategy == "NA"
    assert "kept in float" in rows["mlp.gate_proj"].notes[0]
    assert not rows["mlp.down_proj"].notes
    assert solved.tensors["mlp.up_proj.weight"] is problem.tensors["mlp.up_proj.weight"]


def test_a_gated_attention_keeps_its_quantized_cache():
    """Keys and values that stay in float are still cached as int8 when the recipe says so."""
    policy = QuantPolicy(kvcache_quant_dtype="int8")
    problem, _, _ = make_problem(policy)
    solved = solve_layer(problem, max_relative_error=1e-12, on_bad_layer="keep_float")
    assert not solved.linears
    assert solved.kv_cache.key_scale is not None
    assert solved.rows[-1].strategy == "C8-perchannel"
    assert all(row.strategy == "NA" and row.notes for row in solved.rows[:-1])


def test_a_linear_may_be_float_while_keys_and_values_are_cached_as_int8():
    """A null weight_quant_dtype with an int8 cache quantises the cache alone."""
    solved = solve_layer(make_problem(QuantPolicy(weight_quant_dtype=None, kvcache_quant_dtype="int8"))[0])
    assert not solved.linears
    assert solved.kv_cache.value_scale.shape == (KV_HEADS * HEAD_DIM,)


def test_keys_and_values_must_agree_on_the_cache():
    """A policy for k_proj alone is refused by name."""
    problem, _, _ = make_problem(W8A16, k_proj=QuantPolicy(kvcache_quant_dtype="int8"))
    with pytest.raises(UserError, match=r"k_proj and .*v_proj differ in kvcache_quant_dtype"):
        solve_layer(problem)


def test_the_cache_row_tells_the_error_of_the_scales_that_the_dialect_stores():
    """compressed-tensors stores the largest scale for all channels: the row has that error, and notes the finer one."""
    problem, _, _ = make_problem(QuantPolicy(kvcache_quant_dtype="int8"))
    finer = solve_layer(replace(problem, dialects=(DIALECTS["ascend"],))).rows[-1]
    coarse = solve_layer(replace(problem, dialects=(DIALECTS["compressed-tensors"],))).rows[-1]
    both = solve_layer(replace(problem, dialects=tuple(DIALECTS.values()))).rows[-1]

    def expected(name: str) -> float:
        statistics = problem.statistics[name]
        step = np.float64(statistics.max_abs.max()) / 127.5
        lost = np.minimum(statistics.num_tokens * step**2 / 12, statistics.sum_squares)
        return float(lost.sum() / statistics.sum_squares.sum())

    assert coarse.relative_error == pytest.approx(max(expected("key"), expected("value")), rel=1e-5)
    assert coarse.relative_error > finer.relative_error
    assert coarse.scale_min == pytest.approx(min(problem.statistics[n].max_abs.max() for n in ("key", "value")) / 127.5)
    assert both.relative_error == coarse.relative_error
    assert f"the error is {finer.relative_error:.3g}" in both.notes[0]


def test_the_kv_cache_is_scaled_as_the_folded_layer_fills_it():
    """Key and value scales are absmax/127.5 of what the folded layer writes to the cache."""
    policy = SMOOTH.model_copy(update={"kvcache_quant_dtype": "int8"})
    problem, hidden, _ = make_problem(policy)
    solved = solve_layer(problem)
    _, seen = forward(restored(solved), hidden)
    np.testing.assert_allclose(solved.kv_cache.key_scale, np.abs(seen["key"]).max(axis=0) / 127.5, rtol=0.1)
    np.testing.assert_allclose(solved.kv_cache.value_scale, np.abs(seen["value"]).max(axis=0) / 127.5, rtol=0.1)
    row = solved.rows[-1]
    assert (row.name, row.strategy) == (PREFIX + "self_attn.kv_cache", "C8-perchannel")
    dynamic = policy.model_copy(update={"kvcache_quant_granularity": "per_token"})
    cache = solve_layer(make_problem(dynamic)[0])
    assert cache.kv_cache.key_scale is None
    assert cache.rows[-1].strategy == "C8-pertoken"


def test_a_network_without_a_source_reports_the_scale_to_divide_by():
    """Where no tensor absorbs the scale, linears hold it, and dividing x by it restores the output."""
    problem, _, seen = make_problem(SMOOTH)
    problem = replace(problem, inputs=tuple(replace(i, source=None, repeat=1) for i in INPUTS))
    solved = solve_layer(problem)
    for layer_input in INPUTS:
        for name in layer_input.linears:
            linear = solved.linears[name]
            exact = seen[layer_input.name] @ problem.tensors[f"{name}.weight"].T
            found = (seen[layer_input.name] / linear.smooth_scale) @ linear.dequantized().T
            assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()
    assert solved.tensors["input_layernorm.weight"] is problem.tensors["input_layernorm.weight"]


PLUS = QuantPolicy(act_quant_dtype="int8", outliers_suppression="outlier-suppression+", algo_args=FEW)


def off_centre(problem, seen, rng):
    """The problem with inputs whose channels are far from 0, and those inputs."""
    moved = {name: x + 4 * x.std(axis=0) * rng.choice([-1, 1], x.shape[1]) for name, x in seen.items()}
    statistics = {name: statistics_of(x.astype(np.float32), weighted=True, histogram=True) for name, x in moved.items()}
    return replace(problem, statistics=statistics), moved


def test_plus_shifts_where_the_caller_can_subtract():
    """Without a source, channels far from 0 are centred and the bias makes up for it."""
    problem, _, seen = make_problem(PLUS)
    problem = replace(problem, inputs=tuple(replace(i, source=None, repeat=1) for i in INPUTS))
    problem, seen = off_centre(problem, seen, np.random.default_rng(1))
    solved = solve_layer(problem)
    linear, x = solved.linears["mlp.up_proj"], seen["mlp_input"]
    spread = x.max(axis=0) - x.min(axis=0)
    assert np.all(np.abs(linear.smooth_shift - (x.max(axis=0) + x.min(axis=0)) / 2) < 0.35 * spread)
    exact = x @ problem.tensors["mlp.up_proj.weight"].T
    found = ((x - linear.smooth_shift) / linear.smooth_scale) @ linear.dequantized().T + linear.bias
    assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def test_plus_says_where_nothing_absorbs_the_shift():
    """In a decoder without biases the smoothing remains, and the rows note that the shift was left out."""
    rows = solve_layer(make_problem(PLUS)[0]).rows
    assert all("without shift" in row.notes[0] for row in rows)


def test_plus_gives_norms_and_linears_biases_where_they_can_be_published():
    """The layer computes what it did, reading inputs that are shifted by the biases of norms and values."""
    problem, hidden, _ = make_problem(PLUS)
    problem = replace(problem, makes_biases=True)
    solved = solve_layer(problem)
    assert {"input_layernorm.bias", "post_attention_layernorm.bias"} <= set(solved.tensors)
    noted = {row.name: " ".join(row.notes) for row in solved.rows}
    assert "mlp.up_proj is not all" in noted[PREFIX + "mlp.down_proj"]
    assert not any("without shift" in note for name, note in noted.items() if "down_proj" not in name)
    expected, _ = forward(problem.tensors, hidden)
    found, _ = forward(restored(solved), hidden)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_shift_of_every_input_leaves_the_function_of_the_layer():
    """Statistics of channels far from 0 shift norms and values; the layer computes what it did all the same."""
    problem, hidden, seen = make_problem(PLUS)
    problem, _ = off_centre(problem, seen, np.random.default_rng(2))
    solved = solve_layer(replace(problem, makes_biases=True))
    assert np.abs(solved.tensors["input_layernorm.bias"]).max() > 0
    assert solved.linears["self_attn.v_proj"].bias is not None
    expected, _ = forward(problem.tensors, hidden)
    found, shifted = forward(restored(solved), hidden)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    ratio = np.median(np.abs(shifted["mlp_input"].mean(axis=0)) / shifted["mlp_input"].std(axis=0))
    assert 2 < ratio < 6  # by about the 4 deviations that the statistics spoke of


SEARCHED_STATIC = {"act_quant_dtype": "int8", "act_range": "mse"}
FOUR_BITS = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}


@pytest.mark.parametrize(
    ("policy", "biases"),
    [
        (STATIC, ()),
        (QuantPolicy(**SEARCHED_STATIC, outliers_suppression="smooth", algo_args=AlgoArgs(alpha=(0.3, 0.5, 0.7))), ()),
        (QuantPolicy(**SEARCHED_STATIC, outliers_suppression="outlier-suppression-lite", algo_args=FEW), ()),
        (QuantPolicy(**SEARCHED_STATIC, outliers_suppression="outlier-suppression+", algo_args=FEW), tuple(SHAPES)),
        (QuantPolicy(weight_quant_dtype="qint4x2", weight_clip=True), ()),
        (QuantPolicy(**FOUR_BITS, outliers_suppression="awq", weight_clip=True, weight_symmetric=False), ()),
        (QuantPolicy(**FOUR_BITS, outliers_suppression="awq", precision_recovery="gptq"), ()),
        (QuantPolicy(**FOUR_BITS, precision_recovery="gptq", weight_clip=True), ()),
        (
            QuantPolicy(**FOUR_BITS, precision_recovery="gptq", algo_args=AlgoArgs(desc_act=True, static_groups=False)),
            (),
        ),
        (QuantPolicy(weight_quant_dtype="qint4x2", precision_recovery="gptq", weight_clip=True), ()),
    ],
)
def test_any_number_of_threads_gives_the_same_bytes(policy, biases, monkeypatch):
    """Every array and every figure of a layer solved on two and three threads is that of one, over many tiles."""
    for module, name, size in (
        (awq, "TILE_ROWS", 16),
        (gptq, "TILE_ROWS", 16),
        (clip, "_TILE_ELEMENTS", 1 << 10),
        (integers, "_BLOCK_ELEMENTS", 1 << 10),
    ):
        monkeypatch.setattr(module, name, size)
    problem, _, _ = make_problem(policy, biases=biases)
    alone = solve_layer(problem)
    for num_threads in (2, 3):
        assert contents(solve_layer(problem, num_threads=num_threads)) == contents(alone)


def contents(solved):
    """Bytes of all arrays of a solved layer, and its rows."""
    arrays = dict(solved.tensors)
    for name, linear in solved.linears.items():
        arrays |= {f"{name}.{field}": value for field, value in vars(linear).items() if field != "policy"}
    return {n: a.tobytes() if isinstance(a, np.ndarray) else repr(a) for n, a in arrays.items()} | {
        "rows": repr(solved.rows)
    }


def test_threads_end_with_a_layer_that_cannot_be_solved():
    """The error names what one thread would name, and no thread is left behind."""
    problem, _, _ = make_problem(QuantPolicy(**FOUR_BITS, precision_recovery="gptq"))
    weight = problem.tensors["self_attn.k_proj.weight"].copy()
    weight[3, 5] = np.nan
    problem = replace(problem, tensors={**problem.tensors, "self_attn.k_proj.weight": weight})
    before = threading.active_count()
    messages = set()
    for num_threads in (1, 3):
        with pytest.raises(UserError, match="k_proj") as caught:
            solve_layer(problem, num_threads=num_threads)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert threading.active_count() == before


def test_a_dead_input_has_no_error_rather_than_none():
    """0 of 0 is not a perfect score: the row tells no error, and the note why."""
    problem, _, _ = make_problem(STATIC)
    width = SHAPES["mlp.down_proj"][1]
    dead = statistics_of(np.zeros((TOKENS, width), np.float32), gram=True, weighted=True, histogram=True)
    solved = solve_layer(replace(problem, statistics={**problem.statistics, "mlp_activation": dead}))
    rows = {row.name.removeprefix(PREFIX): row for row in solved.rows}
    row = rows.pop("mlp.down_proj")
    assert (row.relative_error, row.activation_error, row.error_source) == (None, None, "none")
    assert any(note.startswith("the input was zero in every calibration token") for note in row.notes)
    assert all(other.relative_error is not None for other in rows.values())
