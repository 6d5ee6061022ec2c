from __future__ import annotations

import numpy as np
import pytest
from fake_rounding import fake_quantize_static
from observed import statistics_of

from gs_dist.model.statistics import StatisticsSettings
from gs_dist.results import integers
from gs_dist.solvers import output_error
from gs_dist.solvers.objective import DiagonalObjective, plain_objective


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def test_the_quadratic_form_is_the_squared_output_over_tokens(rng, monkeypatch):
    """tr(M G MT) equals the sum over tokens of |M x|^2, in blocks of rows or not."""
    x, matrix = rng.normal(size=(50, 24)).astype(np.float32), rng.normal(size=(9, 24)).astype(np.float32)
    seen = statistics_of(x)
    exact = ((x.astype(np.float64) @ matrix.T) ** 2).sum()
    assert output_error.output_energy(matrix, plain_objective(seen)) == pytest.approx(exact, rel=1e-5)
    monkeypatch.setattr(integers, "_BLOCK_ELEMENTS", 50)
    assert output_error.output_energy(matrix, plain_objective(seen)) == pytest.approx(exact, rel=1e-5)


def test_a_rescaled_matrix_needs_no_rescaled_gram_matrix(rng):
    """1/s on the matrix's columns serves as well as on both sides of G, with G and with its diagonal."""
    x, matrix = rng.normal(size=(50, 24)).astype(np.float32), rng.normal(size=(9, 24)).astype(np.float32)
    scale = rng.lognormal(size=24)
    seen, rescaled = statistics_of(x), statistics_of((x / scale).astype(np.float32))
    for taken in (StatisticsSettings(), StatisticsSettings(gram=False)):
        before, after = plain_objective(seen.only(taken)), plain_objective(rescaled.only(taken))
        found = output_error.output_energy(matrix, before, 1 / scale)
        assert found == pytest.approx(output_error.output_energy(matrix, after), rel=1e-5)


def test_the_diagonal_is_exact_for_uncorrelated_channels():
    """With one active channel a token, the diagonal says the same as G."""
    x = np.diag(np.arange(1, 9)).astype(np.float32)
    matrix = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    exact = ((x @ matrix.T) ** 2).sum()
    objective = DiagonalObjective(statistics_of(x).sum_squares)
    assert output_error.output_energy(matrix, objective) == pytest.approx(exact, rel=1e-5)


def test_column_energy_is_the_squared_norm_of_each_column(rng):
    """One number a column."""
    weight = rng.normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_allclose(output_error.column_energy(weight), (weight.astype(float) ** 2).sum(axis=0), rtol=1e-6)


def test_the_static_term_predicts_what_rounding_activations_costs(rng):
    """A step d costs n d^2/12 |W|^2, which agrees with tokens that were really rounded, within a tenth."""
    x = (rng.normal(size=(2000, 16)) * rng.lognormal(size=16)).astype(np.float32)
    x[:, 0] *= 1e-4  # far below a step: rounds to 0, and costs its own energy
    weight = rng.normal(size=(32, 16)).astype(np.float32)
    scale = float(np.abs(x).max() / 127.5)
    error = (fake_quantize_static(x, scale) - x) @ weight.T
    rounding = output_error.static_rounding(statistics_of(x), scale**2)
    predicted = output_error.activation_term(output_error.column_energy(weight), rounding)
    assert predicted == pytest.approx((error.astype(float) ** 2).sum(), rel=0.1)
    assert rounding[0] == pytest.approx((x[:, 0].astype(float) ** 2).sum(), rel=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_the_step_of_dynamic_activations_is_estimated_within_a_third(rng, spread):
    """Independent normal channels, alike or of very different loudness."""
    x = (rng.normal(size=(4000, 256)) * rng.lognormal(sigma=spread, size=256)).astype(np.float32)
    exact = np.mean((np.abs(x).max(axis=1).astype(float) / 127.5) ** 2)
    assert output_error.per_token_step_squared(statistics_of(x)) == pytest.approx(exact, rel=0.35)


def test_the_estimated_step_is_bounded_by_the_largest_value():
    """A constant activation has just that value for its step."""
    x = np.full((10, 1), 3.0, np.float32)
    assert output_error.per_token_step_squared(statistics_of(x)) == pytest.approx((3 / 127.5) ** 2)
