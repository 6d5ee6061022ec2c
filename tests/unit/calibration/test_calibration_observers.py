from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_dist.calibration.observers import CardObserver, HostObserver, observe
from gs_dist.model.sketch import rows_and_signs
from gs_dist.model.statistics import (
    HISTOGRAM_BINS,
    InputStatistics,
    StatisticsSettings,
    TreeAccumulator,
    block_bounds,
    histogram_magnitudes,
    merge_nodes,
)
from gs_dist.model.token_sample import token_ids

EVERYTHING = StatisticsSettings(gram=True, weighted_gram=True, histogram=True)


def _tokens(num_tokens: int, channels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_tokens, channels)).astype(np.float32)


def _brute_force(x: np.ndarray) -> dict[str, np.ndarray]:
    wide = x.astype(np.float64)
    weighted = wide / np.sqrt((wide**2).sum(axis=1, keepdims=True))
    return {
        "minimum": wide.min(0),
        "maximum": wide.max(0),
        "sum_abs": np.abs(wide).sum(0),
        "sum_squares": (wide**2).sum(0),
        "gram": wide.T @ wide,
        "weighted_gram": weighted.T @ weighted,
    }


@pytest.mark.parametrize("channels", [5, 64, 2100])
def test_host_statistics_equal_their_definitions(channels: int) -> None:
    """Every statistic is what its definition says, also where the Gram matrix is mirrored in several tiles."""
    x = _tokens(33, channels, 1)
    seen = observe(x, EVERYTHING)
    for name, expected in _brute_force(x).items():
        np.testing.assert_allclose(getattr(seen, name), expected, rtol=2e-5, atol=2e-5, err_msg=name)
    assert seen.num_tokens == 33
    assert np.array_equal(seen.gram, seen.gram.T)


def test_card_statistics_equal_host_statistics() -> None:
    """The ops meant for an Ascend card give what the host gives, padding left out by both."""
    x = _tokens(24, 16, 2).reshape(2, 12, 16)
    mask = np.ones((2, 12), dtype=bool)
    mask[1, 7:] = False
    host, card = HostObserver(16, EVERYTHING), CardObserver(16, EVERYTHING)
    for observer in (host, card):
        observer.observe(ms.Tensor(x), mask)
        observer.observe(ms.Tensor(x * 3), None)
    expected, found = host.take(), card.take()
    assert expected.num_tokens == found.num_tokens == 19 + 24
    for name in _brute_force(x[0]):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name)
    assert np.array_equal(found.histogram, expected.histogram)


def test_padding_never_reaches_a_statistic() -> None:
    """Masked tokens, however wild, change nothing; a batch of padding alone counts no token."""
    x = _tokens(10, 4, 3)
    wild = np.concatenate([x, np.full((3, 4), np.nan, np.float32)])
    mask = np.arange(13) < 10
    clean, masked = observe(x, EVERYTHING), observe(wild, EVERYTHING, mask)
    for name, array in clean.to_arrays().items():
        assert np.array_equal(array, masked.to_arrays()[name]), name
    assert observe(wild, EVERYTHING, np.zeros(13, dtype=bool)).num_tokens == 0


@given(st.integers(0, 2**31), st.floats(1e-5, 1e3), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_histogram_holds_each_value_within_its_quarter_octave(seed: int, magnitude: float, num_tokens: int) -> None:
    """Each value is counted once, under its sign, in a bin whose middle is within an eighth of it."""
    x = (_tokens(num_tokens, 1, seed) * magnitude).astype(np.float32)
    counts = observe(x, EVERYTHING).histogram
    assert counts.sum() == num_tokens
    assert counts[0, 0].sum() == (np.signbit(x)).sum()
    expected = np.zeros((2, HISTOGRAM_BINS), np.int64)
    for value in x[:, 0]:
        inside = [b for b in range(HISTOGRAM_BINS) if _edges(b)[0] <= abs(float(value)) < _edges(b)[1]]
        expected[0 if np.signbit(value) else 1, inside[0] if inside else 0] += 1
    assert np.array_equal(counts[0], expected)
    middles = histogram_magnitudes()
    assert all(_edges(b)[0] < middles[b] < _edges(b)[1] for b in range(HISTOGRAM_BINS))


def _edges(index: int) -> tuple[float, float]:
    octave, quarter = divmod(int(index), 4)
    base = 2.0 ** (octave - 20)
    return base * (1 + quarter / 4), base * (1 + (quarter + 1) / 4)


def test_histogram_keeps_values_beyond_its_range_at_its_ends() -> None:
    """Zero lands in the first bin and a huge value in the last: nothing is dropped."""
    x = np.array([[0.0], [1e-12], [1e9]], np.float32)
    counts = observe(x, EVERYTHING).histogram
    assert counts[0, 1, 0] == 2
    assert counts[0, 1, -1] == 1


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_merging_is_the_same_however_blocks_are_dealt(num_batches: int, replicas: int, seed: int) -> None:
    """Any contiguous deal of reduction blocks over replicas gives the same bits, equal to one worker's."""
    batches = [_tokens(6, 5, seed + i) for i in range(num_batches)]
    bounds = block_bounds(num_batches, 8)

    def calibrate(num_replicas: int, taken: StatisticsSettings = EVERYTHING) -> dict[str, np.ndarray]:
        nodes = []
        for replica in range(num_replicas):
            tree = TreeAccumulator()
            for block in range(replica * 8 // num_replicas, (replica + 1) * 8 // num_replicas):
                observer = HostObserver(5, taken)
                for sample in range(*bounds[block]):
                    observer.observe(batches[sample], None, token_ids(sample, 6))
                if bounds[block][0] < bounds[block][1]:
                    tree.push(block, {"x": observer.take()})
            nodes += tree.nodes()
        return merge_nodes(nodes, 8)["x"].to_arrays()

    for taken in (EVERYTHING, replace(SKETCHED, sketch_rows=3)):
        one, many = calibrate(1, taken), calibrate(replicas, taken)
        assert one.keys() == many.keys()
        for name in one:
            assert np.array_equal(one[name], many[name]), name
    one = calibrate(1)
    together = observe(np.concatenate(batches), EVERYTHING)
    np.testing.assert_allclose(one["gram"], together.gram, rtol=1e-4, atol=1e-4)
    assert np.array_equal(one["histogram"], together.histogram)
    assert np.array_equal(one["minimum"], together.minimum)


SKETCHED = StatisticsSettings(gram=True, weighted_gram=True, histogram=True, sketch_rows=16, blended_gram=True)


def _by_definition(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    rows, signs = rows_and_signs(ids, 16)
    sums = np.zeros((16, x.shape[1]))
    for token, row, sign, weight in zip(x.astype(np.float64), rows, signs, weights, strict=True):
        sums[row] += np.sqrt(weight) * sign * token
    return sums


@pytest.mark.parametrize("kind", [HostObserver, CardObserver])
def test_sketches_are_what_they_are_defined_as(kind: type[HostObserver] | type[CardObserver]) -> None:
    """Each token is added to one row with its sign and weight, padding left out; so on the host and on a card."""
    x = _tokens(60, 40, 3).reshape(3, 20, 40)
    x[0, 0] = 0.0
    mask = np.ones((3, 20), dtype=bool)
    mask[2, 11:] = False
    observer, ids = kind(40, SKETCHED), token_ids(5, mask.size)
    observer.observe(ms.Tensor(x), mask, ids)
    seen = observer.take()
    kept = x[mask]
    energy = (kept.astype(np.float64) ** 2).sum(axis=1)
    by_token = np.divide(1.0, energy, out=np.zeros_like(energy), where=energy > 0)
    assert seen.gram is None
    assert seen.weighted_gram is None
    for sketch, weights in ((seen.sketch, np.ones(len(kept))), (seen.weighted_sketch, by_token)):
        assert sketch is not None
        expected = _by_definition(kept, ids[mask.reshape(-1)], weights)
        np.testing.assert_allclose(sketch.rows.astype(np.float64), expected, rtol=2**-8, atol=1e-5)
        np.testing.assert_allclose(sketch.squares, weights @ kept.astype(np.float64) ** 2, rtol=1e-5)
        np.testing.assert_allclose(sketch.total, weights @ kept.astype(np.float64), rtol=1e-4, atol=1e-5)
        assert float(sketch.weight[0]) == pytest.approx(weights.sum())
    blended = np.concatenate([_blended(x[i][mask[i]]) for i in range(3)])
    np.testing.assert_allclose(seen.blended_gram, blended.T @ blended, rtol=1e-4, atol=1e-5)


def _blended(sample: np.ndarray) -> np.ndarray:
    """Tokens of one sample times the root of their weight: 93 % by 1 / x.x, 7 % by the sample's mean energy."""
    wide = sample.astype(np.float64)
    energy = (wide**2).sum(axis=1)
    weights = np.where(energy > 0, 0.93 / np.maximum(energy, 1e-30) + 0.07 / energy.mean(), 0.0)
    return np.asarray(wide * np.sqrt(weights)[:, None])


def test_an_input_narrower_than_a_sketch_has_its_matrix_taken() -> None:
    """A matrix of no more rows than the sketch is smaller and exact."""
    seen = observe(_tokens(33, 16, 1), SKETCHED)
    assert seen.gram is not None
    assert seen.weighted_gram is not None
    assert seen.sketch is None
    assert seen.weighted_sketch is None


def test_statistics_are_stored_by_name_and_read_back() -> None:
    """A sketch's arrays have its name first; nothing is lost."""
    seen = observe(_tokens(33, 40, 1), SKETCHED)
    arrays = seen.to_arrays()
    assert "weighted_sketch.rows" in arrays
    again = InputStatistics.from_arrays(arrays)
    for name, array in again.to_arrays().items():
        assert np.array_equal(array, arrays[name]), name
    assert SKETCHED.nbytes(40) == sum(array.nbytes for name, array in arrays.items() if name != "num_tokens")


def test_what_was_kept_beside_does_not_count() -> None:
    """`only` leaves what a job would have observed; `lacking` tells what it would miss."""
    seen = observe(_tokens(33, 40, 1), SKETCHED)
    plain = StatisticsSettings(gram=True, sketch_rows=16)
    assert seen.only(plain).to_arrays().keys() == observe(_tokens(33, 40, 1), plain).to_arrays().keys()
    assert seen.lacking(plain) == ()
    assert seen.lacking(StatisticsSettings(gram=True)) == ("gram",)
    assert seen.only(plain).lacking(SKETCHED) == ("blended_gram", "histogram", "weighted_sketch")
    assert seen.lacking(StatisticsSettings(gram=True, sketch_rows=20)) == ("sketch_rows: 20",)
