"""What a quantised weight's integers stand for, and how two of four bits share a byte."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gs_dist.errors import UserError

__all__ = [
    "Float32",
    "Int8",
    "dequantize",
    "pack_int4",
    "pair_outputs",
    "row_blocks",
    "unpack_int4",
    "unpair_outputs",
]

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

# Elements of a float32 block worked on at a time: 16 MiB, so that temporaries of a wide weight stay small.
_BLOCK_ELEMENTS = 1 << 22


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices over the rows of a matrix, each of at most 16 MiB of float32."""
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def dequantize(
    codes: Int8, scale: Float32, zero_point: Int8 | None = None, group_index: npt.NDArray[np.int32] | None = None
) -> Float32:
    """(codes - zero_point) * scale, (out, in) float32; `group_index` (in,) names each column's group if irregular."""
    rows, columns = codes.shape
    groups = scale.shape[1]
    weight = np.empty((rows, columns), dtype=np.float32)
    for block in row_blocks(rows, columns):
        target = weight[block]
        target[...] = codes[block]
        step = scale[block]
        offset = None if zero_point is None else zero_point[block].astype(np.float32)
        if group_index is None:
            target = target.reshape(-1, groups, columns // groups)
            step, offset = step[:, :, None], None if offset is None else offset[:, :, None]
        else:
            step, offset = step[:, group_index], None if offset is None else offset[:, group_index]
        if offset is not None:
            target -= offset
        target *= step
    return weight


def pack_int4(codes: Int8) -> Int8:
    """Packs codes (out, in) within [-8, 7] to (in, out / 2) int8: low nibble the even output channel, high the odd.

    The layout of golden-stick's `qint4x2`: the weight is transposed, then neighbouring output channels share a byte,
    so that [1, 2] becomes 0x21. Nibbles are two's complement.

    Raises:
        UserError: an odd number of output channels.
        ValueError: a code that does not fit 4 bits.
    """
    rows, _ = codes.shape
    if rows % 2:
        raise UserError(f"{rows} output channels do not pack in pairs: leave this linear at int8 or unquantised")
    if codes.size and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit 4 bits")
    return np.ascontiguousarray(pair_outputs(codes).T)


def unpack_int4(packed: Int8) -> Int8:
    """Inverse of `pack_int4`: (in, out / 2) int8 to codes (out, in) int8."""
    return unpair_outputs(packed.T)


def pair_outputs(codes: Int8) -> Int8:
    """Packs codes (out, in) within [-8, 7] to (out / 2, in) int8: low nibble the even output, high the odd after it."""
    nibbles = codes.view(np.uint8) & 0x0F
    return (nibbles[0::2] | (nibbles[1::2] << 4)).view(np.int8)


def unpair_outputs(packed: Int8) -> Int8:
    """Inverse of `pair_outputs`: (out / 2, in) int8 to codes (out, in) int8."""
    pairs, columns = packed.shape
    codes = np.empty((2 * pairs, columns), dtype=np.int8)
    codes[0::2] = (packed << 4) >> 4  # the arithmetic shift extends the sign
    codes[1::2] = packed >> 4
    return codes
