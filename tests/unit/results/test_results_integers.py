"""What integers stand for, and how two of four bits share a byte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gs_dist.errors import UserError
from gs_dist.results.integers import pack_int4, unpack_int4


def test_one_and_two_pack_to_0x21() -> None:
    """Two output channels of one input channel give one byte, the even one in its low nibble."""
    packed = pack_int4(np.array([[1], [2]], dtype=np.int8))
    assert packed.shape == (1, 1)
    assert packed.view(np.uint8)[0, 0] == 0x21


def test_negative_codes_are_twos_complement_nibbles() -> None:
    """-1 becomes nibble F and -8 nibble 8, and the byte is stored as int8."""
    packed = pack_int4(np.array([[-1], [-8]], dtype=np.int8))
    assert packed.dtype == np.int8
    assert packed.view(np.uint8)[0, 0] == 0x8F


def test_bytes_lie_as_input_channels_by_pairs_of_output_channels() -> None:
    """The packed array is (in, out / 2), contiguous, each byte from the loop a reader would write."""
    codes = np.random.default_rng(0).integers(-8, 8, (6, 5)).astype(np.int8)
    packed = pack_int4(codes)
    assert packed.shape == (5, 3)
    assert packed.flags.c_contiguous
    for column in range(5):
        for pair in range(3):
            low, high = int(codes[2 * pair, column]) & 0xF, int(codes[2 * pair + 1, column]) & 0xF
            assert int(packed.view(np.uint8)[column, pair]) == low + 16 * high


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        np.int8,
        st.tuples(st.integers(1, 8).map(lambda n: 2 * n), st.integers(1, 9)),
        elements=st.integers(-8, 7),
    )
)
def test_unpacking_gives_the_codes_back(codes: npt.NDArray[np.int8]) -> None:
    """Packing loses nothing, whatever the codes."""
    np.testing.assert_array_equal(unpack_int4(pack_int4(codes)), codes)


def test_a_transposed_view_packs_like_its_copy() -> None:
    """Memory layout of the codes does not show in the bytes."""
    codes = np.random.default_rng(1).integers(-8, 8, (7, 4)).astype(np.int8).T
    np.testing.assert_array_equal(pack_int4(codes), pack_int4(np.ascontiguousarray(codes)))


def test_an_odd_number_of_output_channels_is_refused() -> None:
    """The message says how many there are."""
    with pytest.raises(UserError, match="3 output channels"):
        pack_int4(np.zeros((3, 4), dtype=np.int8))


def test_codes_beyond_four_bits_are_refused() -> None:
    """An int8 code must not be cut to a nibble in silence."""
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack_int4(np.array([[8], [0]], dtype=np.int8))
