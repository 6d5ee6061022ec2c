from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_dist.errors import UserError
from gs_dist.model.decoder import LayerInput
from gs_dist.solvers.folding import FoldedTensors, source_channels, source_index, tie_max
from gs_dist.solvers.threads import Threads


def attention_input(kv_heads, repeat, head_dim):
    return LayerInput(
        name="attention_output",
        channels=kv_heads * repeat * head_dim,
        linears=("o_proj",),
        source="v_proj",
        repeat=repeat,
        head_dim=head_dim,
    )


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))


@given(shape=shapes, seed=st.integers(0, 1000))
def test_channels_of_one_value_row_share_the_largest_value(shape, seed):
    """Tying agrees with a loop over heads, and the source's channels are read off the tied values."""
    kv_heads, repeat, head_dim = shape
    layer_input = attention_input(*shape)
    values = np.random.default_rng(seed).normal(size=layer_input.channels)
    tied = tie_max(values, layer_input)
    rows = source_channels(tied, layer_input)
    index = source_index(layer_input)
    for head in range(kv_heads * repeat):
        for d in range(head_dim):
            kv_head = head // repeat
            group = [(kv_head * repeat + r) * head_dim + d for r in range(repeat)]
            assert tied[head * head_dim + d] == max(values[group])
            assert index[head * head_dim + d] == kv_head * head_dim + d
            assert rows[kv_head * head_dim + d] == max(values[group])


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), bias=st.booleans())
def test_values_to_output_keep_their_function_under_any_tied_scale(shape, seed, bias):
    """o(attention(v(x))) is the same before and after folding, query heads sharing values included."""
    kv_heads, repeat, head_dim = shape
    layer_input = attention_input(*shape)
    rng = np.random.default_rng(seed)
    tensors = {
        "v_proj.weight": rng.normal(size=(kv_heads * head_dim, 6)).astype(np.float32),
        "o_proj.weight": rng.normal(size=(5, layer_input.channels)).astype(np.float32),
    }
    if bias:
        tensors["v_proj.bias"] = rng.normal(size=kv_heads * head_dim).astype(np.float32)
    folded = FoldedTensors(tensors)
    folded.fold(layer_input, tie_max(rng.lognormal(size=layer_input.channels), layer_input).astype(np.float32))
    x = rng.normal(size=(4, 6))
    probabilities = rng.dirichlet(np.ones(4), size=(kv_heads * repeat, 4))  # of each head, for each query

    def run(v_weight, v_bias, o_weight):
        values = (x @ v_weight.T.astype(np.float64) + v_bias).reshape(4, kv_heads, head_dim)
        heads = [probabilities[h] @ values[:, h // repeat] for h in range(kv_heads * repeat)]
        return np.concatenate(heads, axis=1) @ o_weight.T.astype(np.float64)

    before = run(tensors["v_proj.weight"], tensors.get("v_proj.bias", 0.0), tensors["o_proj.weight"])
    after = run(folded.weight("v_proj"), folded.bias("v_proj") if bias else 0.0, folded.weight("o_proj"))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    published = run(
        folded.published("v_proj.weight"),
        folded.published("v_proj.bias") if bias else 0.0,
        folded.published("o_proj.weight"),
    )
    np.testing.assert_array_equal(published, after)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_norm_and_its_readers_keep_their_product_whatever_the_dtype(dtype):
    """Rounding the folded norm to its dtype is made up for by the columns."""
    rng = np.random.default_rng(1)
    tensors = {
        "norm.weight": rng.normal(size=32).astype(dtype),
        "q.weight": rng.normal(size=(8, 32)).astype(dtype),
        "k.weight": rng.normal(size=(4, 32)).astype(dtype),
    }
    layer_input = LayerInput(name="x", channels=32, linears=("q", "k"), source="norm")
    folded = FoldedTensors(tensors)
    effective = folded.fold(layer_input, rng.lognormal(size=32).astype(np.float32))
    norm = folded.published("norm.weight")
    assert norm.dtype == dtype
    for name in ("q", "k"):
        before = tensors[f"{name}.weight"].astype(np.float64) * tensors["norm.weight"].astype(np.float64)
        np.testing.assert_allclose(folded.weight(name) * norm.astype(np.float64), before, rtol=1e-6)
    np.testing.assert_allclose(norm.astype(np.float64) * effective, tensors["norm.weight"].astype(float), rtol=1e-6)


def test_a_channel_whose_norm_would_vanish_or_overflow_is_not_rescaled():
    """float16 norms keep their value where dividing would lose it; zero weights stay zero."""
    norm = np.array([1e-4, 1.0, 0.0, 100.0], np.float16)
    weight = np.ones((2, 4), np.float16)
    folded = FoldedTensors({"norm.weight": norm, "q.weight": weight})
    layer_input = LayerInput(name="x", channels=4, linears=("q",), source="norm")
    effective = folded.fold(layer_input, np.array([1e5, 2.0, 3.0, 1e-4], np.float32))
    assert effective.tolist() == [1.0, 2.0, 3.0, 1.0]
    assert folded.published("norm.weight").tolist() == [norm[0], 0.5, 0.0, 100.0]


def test_untouched_tensors_are_the_source_and_the_source_is_never_written():
    """What no scale reaches is handed out as the same object."""
    tensors = {name: np.ones((4, 4), np.float32) for name in ("a.weight", "b.weight", "c.weight")}
    for array in tensors.values():
        array.flags.writeable = False
    folded = FoldedTensors(tensors)
    folded.fold(LayerInput(name="x", channels=4, linears=("b",), source="a"), np.full(4, 2, np.float32))
    assert folded.published("c.weight") is tensors["c.weight"]
    assert np.all(folded.published("a.weight") == 0.5)
    assert np.all(folded.published("b.weight") == 2.0)
    assert np.all(tensors["a.weight"] == 1)


def test_rows_in_both_directions_multiply():
    """A linear may be scaled by its own input and by what follows it."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=(3, 3)).astype(np.float32) for name in ("a.weight", "b.weight", "c.weight")}
    folded = FoldedTensors(tensors)
    s, t = rng.lognormal(size=(2, 3)).astype(np.float32)
    folded.fold(LayerInput(name="x", channels=3, linears=("b",), source="a"), s)
    folded.fold(LayerInput(name="y", channels=3, linears=("c",), source="b"), t)
    np.testing.assert_allclose(folded.weight("b"), tensors["b.weight"] * s / t[:, None], rtol=1e-6)
    np.testing.assert_allclose(folded.weight("b", slice(0, 3, 2)), folded.weight("b")[::2])


def test_a_float_linear_that_overflows_its_dtype_is_refused_by_name():
    """The message says which tensor and which setting."""
    tensors = {"a.weight": np.full((2, 2), 6e4, np.float16), "b.weight": np.ones((2, 2), np.float16)}
    folded = FoldedTensors(tensors)
    folded.fold(LayerInput(name="x", channels=2, linears=("b",), source="a"), np.full(2, 0.1, np.float32))
    with pytest.raises(UserError, match=r"a\.weight overflows float16.*outliers_suppression"):
        folded.published("a.weight")


@pytest.mark.parametrize("has_bias", [True, False])
def test_shifting_the_bias_of_the_values_shifts_the_attention_output(has_bias):
    """Attention weights add up to 1; a bias that the checkpoint lacks is made."""
    rng = np.random.default_rng(5)
    layer_input = attention_input(2, 2, 3)
    tensors = {
        "v_proj.weight": rng.normal(size=(6, 5)).astype(np.float32),
        "v_proj.bias": rng.normal(size=6).astype(np.float32),
        "o_proj.weight": rng.normal(size=(5, 12)).astype(np.float32),
    }
    if not has_bias:
        tensors["v_proj.bias"] *= 0
    x, probabilities = rng.normal(size=(4, 5)), rng.dirichlet(np.ones(4), size=(4, 4))

    def run(v, v_bias):
        values = (x @ v.T + v_bias).reshape(4, 2, 3)
        return np.concatenate([probabilities[h] @ values[:, h // 2] for h in range(4)], axis=1)

    seen = run(tensors["v_proj.weight"], tensors["v_proj.bias"])
    if not has_bias:
        del tensors["v_proj.bias"]
    folded = FoldedTensors(tensors)
    assert folded.passes_shift(layer_input)
    shift = tie_max(rng.normal(size=12), layer_input).astype(np.float32)
    scale = tie_max(rng.lognormal(size=12), layer_input).astype(np.float32)
    folded.shift(layer_input, shift)
    folded.fold(layer_input, scale)
    moved = run(folded.weight("v_proj"), folded.bias("v_proj"))
    np.testing.assert_allclose(moved, (seen - shift) / scale, rtol=1e-4, atol=1e-5)
    assert sorted(folded.names) == ["o_proj.weight", "v_proj.bias", "v_proj.weight"]
    np.testing.assert_array_equal(folded.published("v_proj.bias"), folded.bias("v_proj"))


@pytest.mark.parametrize("bias", [None, 1.0])
def test_the_bias_of_a_norm_absorbs_a_shift(bias):
    """Subtracting from the norm's bias shifts what its readers see; a norm without one is given one."""
    tensors = {
        "norm.weight": np.array([2.0, 4.0], np.float32),
        "norm.bias": np.array([1.0, 1.0], np.float32),
        "q.weight": np.array([[1.0, 3.0]], np.float32),
    }
    if bias is None:
        del tensors["norm.bias"]
    layer_input = LayerInput(name="x", channels=2, linears=("q",), source="norm")
    folded = FoldedTensors(tensors)
    folded.shift(layer_input, np.array([0.5, -1.0], np.float32))
    folded.fold(layer_input, np.array([2.0, 0.5], np.float32))
    normed = np.array([[0.3, -0.7]])
    seen = normed * folded.published("norm.weight") + folded.published("norm.bias")
    np.testing.assert_allclose(seen, (normed * [2, 4] + (bias or 0) - [0.5, -1]) / [2, 0.5], rtol=1e-6)
    assert sorted(folded.names) == ["norm.bias", "norm.weight", "q.weight"]


class CountsReads(Mapping[str, Any]):
    """Stands for a mapping that decodes a tensor each time it is asked for, and lives on who holds it."""

    def __init__(self, tensors):
        self._tensors = tensors
        self.alive = WeakValueDictionary()
        self.decoded = Counter()

    def __getitem__(self, name):
        if (array := self.alive.get(name)) is None:
            self.decoded[name] += 1
            array = self.alive[name] = self._tensors[name].copy()
        return array

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)


@pytest.mark.parametrize("read", ["column_max", "whole_weight"])
def test_a_weight_is_held_while_its_blocks_are_looked_at(read, monkeypatch):
    """A source in FP8 decodes a tensor whenever nobody holds it: once a weight, however many blocks it has."""
    monkeypatch.setattr("gs_dist.results.integers._BLOCK_ELEMENTS", 8)
    rng = np.random.default_rng(0)
    plain = {f"{name}.weight": rng.normal(size=(6, 4)).astype(np.float32) for name in ("gate", "up")}
    tensors = CountsReads(plain)
    folded = FoldedTensors(tensors)
    with Threads(1) as threads:
        if read == "column_max":
            found, expected = folded.column_max(("gate", "up"), threads), np.abs(np.vstack([*plain.values()])).max(0)
        else:
            found, expected = folded.whole_weight("gate", threads), plain["gate.weight"]
    np.testing.assert_array_equal(found, expected)
    assert set(tensors.decoded.values()) == {1}
