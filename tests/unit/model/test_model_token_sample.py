"""A sample of tokens that depends on the tokens alone."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_dist.model.token_sample import SAMPLE_TOKENS, merge_samples, token_ids, token_keys

Sample = tuple[np.ndarray, np.ndarray]


def sample_of(ids: np.ndarray) -> Sample:
    """Brute force: all keys sorted, the first kept; a token's row is its own number."""
    keys = token_keys(ids)
    order = np.argsort(keys)[:SAMPLE_TOKENS]
    return keys[order], ids[order][:, None].astype(np.float32)


def test_places_of_different_micro_batches_and_positions_have_different_keys() -> None:
    """The hash is one to one, so that no two tokens take one another's place."""
    ids = np.concatenate([token_ids(batch, 500) for batch in range(40)])
    assert len(np.unique(token_keys(ids))) == len(ids) == 20_000


def test_keys_are_those_of_the_published_generator() -> None:
    """SplitMix64 seeded with 0 gives these outputs (the reference implementation's first three)."""
    weyl = np.array([0, 0x9E3779B97F4A7C15 - (1 << 64), 2 * 0x9E3779B97F4A7C15 - (1 << 65) + (1 << 64)], np.int64)
    assert [hex(key) for key in token_keys(weyl)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.lists(st.integers(0, 400), max_size=6))
def test_the_sample_of_all_tokens_is_that_of_its_parts_merged_in_any_order(count: int, cuts: list[int]) -> None:
    """However tokens are dealt to workers, and in whatever order their samples merge, the same tokens remain."""
    ids = token_ids(3, count)
    bounds = sorted({0, count, *(cut for cut in cuts if cut < count)})
    parts = [sample_of(ids[a:b]) for a, b in itertools.pairwise(bounds)]
    keys, tokens = sample_of(ids)
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merge_samples(*merged, *part)
        assert np.array_equal(merged[0], keys)
        assert np.array_equal(merged[1], tokens)
