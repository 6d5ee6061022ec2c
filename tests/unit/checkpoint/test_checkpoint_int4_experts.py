"""int4 experts of vLLM-Ascend: the stored form, and back."""

from __future__ import annotations

import numpy as np
from conversions import paired_rows
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gs_dist.checkpoint.dialects.ascend.int4_experts import decode_expert, encode_expert, expert_misfit, expert_tensors

CODES = st.tuples(st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda size: arrays.arrays(np.int8, (2 * size[0], 16 * size[1]), elements=st.integers(-8, 7))
)


@given(codes=CODES)
def test_codes_come_back_and_have_the_stated_form(codes: np.ndarray) -> None:
    """Decoding undoes encoding, an independent decoder agrees, and every tensor is what was announced."""
    scale = np.linspace(0.5, 2, len(codes), dtype=np.float32).reshape(-1, 1)
    for name in ("mlp.experts.3.up_proj", "mlp.experts.3.down_proj", "block_sparse_moe.experts.0.w2"):
        stored = encode_expert(name, codes, scale)
        forms = expert_tensors(name, *codes.shape)
        assert {leaf: (array.dtype.name, array.shape) for leaf, array in stored.items()} == {
            leaf: (form.dtype, form.shape) for leaf, form in forms.items()
        }
        decoded, steps = decode_expert(stored["weight"], stored["weight_scale"])
        np.testing.assert_array_equal(decoded, codes)
        np.testing.assert_array_equal(paired_rows(stored["weight"]), codes)
        np.testing.assert_array_equal(steps, scale)
        sums = 8 * (codes * scale).sum(axis=1, dtype=np.float64)
        np.testing.assert_allclose(stored["scale_bias"].sum(axis=1), sums, rtol=1e-5, atol=1e-4)


def test_what_does_not_pack_is_told_with_what_to_choose() -> None:
    """Odd outputs, and inputs that sixteen shares do not divide; only a down projection is shared out."""
    assert "do not pack in pairs" in str(expert_misfit("experts.0.up_proj", 3, 32))
    assert "16 shares" in str(expert_misfit("experts.0.down_proj", 4, 24))
    assert expert_misfit("experts.0.up_proj", 4, 24) is None
