"""The quadratic objective and the mixture of Gram matrices."""

from __future__ import annotations

import numpy as np
import pytest

from gs_dist.solvers.objective import blend, output_error, row_errors


@pytest.mark.parametrize(("out", "columns"), [(3, 5), (40, 600), (1100, 1030)])
def test_the_error_is_that_of_the_outputs(out: int, columns: int) -> None:
    """tr(D G DT) equals |X DT|^2 taken over the tokens, at sizes on both sides of the blocks."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((70, columns))
    delta = rng.standard_normal((out, columns)).astype(np.float32)
    gram = (x.T @ x).astype(np.float32)
    rows = ((x @ delta.T.astype(np.float64)) ** 2).sum(axis=0)
    np.testing.assert_allclose(row_errors(delta, gram), rows, rtol=1e-3)
    assert output_error(delta, gram) == pytest.approx(rows.sum(), rel=1e-4)


def test_a_mixture_weighs_both_matrices_by_their_trace() -> None:
    """A matrix a million times larger has no more say than its share."""
    rng = np.random.default_rng(1)
    a, b = (x.T @ x for x in rng.standard_normal((2, 30, 8)).astype(np.float32))
    mixed = blend(a, b, share=0.25)
    np.testing.assert_allclose(mixed / 8, 0.25 * a / np.trace(a) + 0.75 * b / np.trace(b), rtol=1e-5)
    np.testing.assert_allclose(blend(1e6 * a, b, share=0.25), mixed, rtol=1e-4)
    assert np.trace(mixed) == pytest.approx(8.0, rel=1e-5)


def test_the_ends_of_the_mixture_are_the_matrices_themselves() -> None:
    """Share 1 is the plain matrix, share 0 the weighted one; without a weighted one the plain one counts."""
    a, b = np.eye(3, dtype=np.float32), 2 * np.eye(3, dtype=np.float32)
    assert blend(a, b, share=1.0) is a
    assert blend(a, b, share=0.0) is b
    assert blend(a, None, share=0.0) is a
    assert blend(a, 0 * b, share=0.5) is a
