"""Golden Stick's int4 packing: two output channels a byte, input channels first.

The layout of golden-stick's `qint4x2`: the weight is transposed to (in, out), then neighbouring output
channels share a byte, so that [1, 2] becomes 0x21.
"""

from __future__ import annotations

import numpy as np

from gs_dist.errors import UserError
from gs_dist.results.quantized import Int8

__all__ = ["pack_int4", "unpack_int4"]


def pack_int4(codes: Int8) -> Int8:
    """Packs codes (out, in) within [-8, 7] to (in, out / 2) int8: low nibble the even output channel, high the odd.

    Nibbles are two's complement.

    Raises:
        UserError: an odd number of output channels.
        ValueError: a code that does not fit 4 bits.
    """
    rows, _ = codes.shape
    if rows % 2:
        raise UserError(f"{rows} output channels do not pack in pairs: leave this linear at int8 or unquantised")
    if codes.size and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit 4 bits")
    nibbles = codes.view(np.uint8) & 0x0F
    packed = nibbles[0::2] | (nibbles[1::2] << 4)
    return np.ascontiguousarray(packed.T).view(np.int8)


def unpack_int4(packed: Int8) -> Int8:
    """Inverse of `pack_int4`: (in, out / 2) int8 to codes (out, in) int8."""
    columns, pairs = packed.shape
    pairs_first = packed.T
    codes = np.empty((2 * pairs, columns), dtype=np.int8)
    codes[0::2] = (pairs_first << 4) >> 4  # the arithmetic shift extends the sign
    codes[1::2] = pairs_first >> 4
    return codes
