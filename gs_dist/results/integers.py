"""What a quantised weight's integers stand for, and how two of four bits share a byte."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gs_dist.errors import UserError

__all__ = ["Float32", "Int8", "dequantise", "pack_int4", "row_blocks", "unpack_int4"]

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

# Elements of a float32 block worked on at a time: 16 MiB, so that temporaries of a wide weight stay small.
_BLOCK_ELEMENTS = 1 << 22


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices over the rows of a matrix, each of at most 16 MiB of float32."""
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def dequantise(
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
