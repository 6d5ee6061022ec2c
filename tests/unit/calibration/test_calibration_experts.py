"""How tokens are laid out for experts: every choice has its row, and padding shows who came closest."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_dist.calibration._experts import ROWS, dispatch


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 200),
    num_experts=st.integers(2, 9),
    top_k=st.integers(1, 2),
    every=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_choice_of_a_token_has_one_row(
    num_tokens: int, num_experts: int, top_k: int, every: bool, seed: int
) -> None:
    """Its row is the token's, weighs what the router said, and belongs to the expert that was chosen."""
    rng = np.random.default_rng(seed)
    scores = rng.random((num_tokens, num_experts)).astype(np.float32)
    chosen = np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32)
    weights = rng.uniform(0.1, 1.0, chosen.shape).astype(np.float32)
    seen = rng.random(num_tokens) < 0.8
    products, places = dispatch(scores, weights, chosen, seen, every=every)
    rows = np.concatenate([product.rows for product in products])
    share = np.concatenate([product.share[:, 0] for product in products])
    owner = np.concatenate([np.full(product.rows.size, product.expert) for product in products])
    assert np.array_equal(rows[places], np.repeat(np.arange(num_tokens)[:, None], top_k, axis=1))
    assert np.array_equal(owner[places], chosen)
    assert np.array_equal(share[places], weights)
    assert np.count_nonzero(share) == chosen.size
    assert all(product.rows.size % ROWS == 0 for product in products)
    assert not every or [product.expert for product in products] == list(range(num_experts))
    for product in products:
        others = product.rows[product.num_routed :]
        others = others[others >= 0] if every else others[:0]
        assert seen[others].all()
        assert not set(others) & set(product.rows[: product.num_routed])
        assert (np.diff(scores[others, product.expert]) <= 0).all()
