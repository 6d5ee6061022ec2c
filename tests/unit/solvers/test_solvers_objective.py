"""The quadratic objective and the mixture of Gram matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from observed import statistics_of

from gs_dist.errors import UserError
from gs_dist.model.sketch import Sketch, rows_and_signs
from gs_dist.model.statistics import InputStatistics
from gs_dist.model.token_sample import token_ids
from gs_dist.solvers.objective import (
    GramObjective,
    blend,
    corrected_objective,
    plain_objective,
    searched_objective,
)


@pytest.mark.parametrize(("out", "columns"), [(3, 5), (40, 600), (1100, 1030)])
def test_the_error_is_that_of_the_outputs(out: int, columns: int) -> None:
    """tr(D G DT) equals |X DT|^2 taken over the tokens, at sizes on both sides of the blocks."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((70, columns))
    delta = rng.standard_normal((out, columns)).astype(np.float32)
    gram = (x.T @ x).astype(np.float32)
    rows = ((x @ delta.T.astype(np.float64)) ** 2).sum(axis=0)
    np.testing.assert_allclose(GramObjective(gram).row_errors(delta), rows, rtol=1e-3)
    assert GramObjective(gram).error(delta) == pytest.approx(rows.sum(), rel=1e-4)


def test_a_mixture_weighs_both_matrices_by_their_trace() -> None:
    """A matrix a million times larger has no more say than its share."""
    rng = np.random.default_rng(1)
    a, b = (x.T @ x for x in rng.standard_normal((2, 30, 8)).astype(np.float32))
    plain, weighted = GramObjective(a), GramObjective(b)
    mixed = blend(plain, weighted, share=0.25).matrix
    np.testing.assert_allclose(mixed / 8, 0.25 * a / np.trace(a) + 0.75 * b / np.trace(b), rtol=1e-5)
    np.testing.assert_allclose(blend(plain.times(1e6), weighted, share=0.25).matrix, mixed, rtol=1e-4)
    assert np.trace(mixed) == pytest.approx(8.0, rel=1e-5)


def test_the_ends_of_the_mixture_are_the_matrices_themselves() -> None:
    """Share 1 is the plain matrix, share 0 the weighted one; without a weighted one the plain one counts."""
    a = GramObjective(np.eye(3, dtype=np.float32))
    b = a.times(2.0)
    assert blend(a, b, share=1.0) is a
    assert blend(a, b, share=0.0) is b
    assert blend(a, None, share=0.0) is a
    assert blend(a, b.times(0.0), share=0.5) is a


def _sketched(x: np.ndarray, num_rows: int) -> tuple[InputStatistics, InputStatistics]:
    """Statistics of tokens with Gram matrices and with sketches."""
    exact = statistics_of(x, weighted=True)
    rows, signs = rows_and_signs(token_ids(0, len(x)), num_rows)
    wide = x.astype(np.float64)
    sketches = []
    for weights in (np.ones(len(x)), 1.0 / (wide**2).sum(axis=1)):
        embedding = np.zeros((num_rows, len(x)))
        embedding[rows, np.arange(len(x))] = signs * np.sqrt(weights)
        sums = (embedding @ wide).astype(np.float32)
        ones = embedding.sum(axis=1)
        sketches.append(Sketch.of_sums(sums, ones, weights @ wide, weights @ wide**2, float(weights.sum())))
    plain, weighted = sketches
    light = replace(exact, gram=None, weighted_gram=None, sketch=plain, weighted_sketch=weighted)
    return exact, light


def test_every_objective_follows_from_either_form() -> None:
    """Plain, searched and corrected errors come out alike from sketches and matrices, rescaled ones too."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((3000, 8)) @ rng.standard_normal((8, 200)) + 2 * rng.standard_normal((3000, 200))).astype(
        np.float32
    )
    exact, light = _sketched(x, 128)
    delta = rng.standard_normal((64, 200)).astype(np.float32)
    inverse = rng.lognormal(size=200).astype(np.float32)
    for made in (plain_objective, searched_objective, corrected_objective):
        one, other = made(exact), made(light)
        assert (one.source, other.source) == ("gram", "sketch")
        assert other.trace == pytest.approx(one.trace, rel=1e-3)
        assert other.error(delta) == pytest.approx(one.error(delta), rel=0.05)
        assert other.scaled(inverse).error(delta) == pytest.approx(one.scaled(inverse).error(delta), rel=0.05)
        groups = np.ascontiguousarray(delta.reshape(64, 4, 50).transpose(1, 0, 2))
        found, expected = other.group_errors(groups, 50), one.group_errors(groups, 50)
        assert found.sum() == pytest.approx(expected.sum(), rel=0.05)
        np.testing.assert_allclose(found, expected, rtol=0.8)


def test_what_needs_second_moments_says_so() -> None:
    """Searches refuse to go by the diagonal alone."""
    seen = statistics_of(np.ones((3, 4), np.float32), gram=False)
    assert plain_objective(seen).source == "diagonal"
    with pytest.raises(UserError, match="set gram: on"):
        corrected_objective(seen)
