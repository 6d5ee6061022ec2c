"""Signed integers of 4 or 8 bits in int32 words, as compressed-tensors' pack-quantized stores them.

Each value is made unsigned by adding 2^(bits - 1); value i of a run takes bits [i * bits, (i + 1) * bits)
of its word, and the last word of a row is filled with zero bits
(compressed_tensors/compressors/pack_quantized/helpers.py, `pack_to_int32`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["pack_int32", "pack_pairs", "packed_size", "unpack_int32", "unpack_pairs"]


def packed_size(count: int, bits: int) -> int:
    """Words that `count` values of `bits` (4 or 8) take: ceil(count * bits / 32)."""
    return -(-count * bits // 32)


def pack_int32(codes: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.int32]:
    """Packs (rows, columns) int8 within `bits` along the last axis, to (rows, packed_size) int32."""
    _check(bits)
    rows, columns = codes.shape
    # In two's complement, adding 2^(bits - 1) modulo 2^bits flips the top bit of the value.
    unsigned: npt.NDArray[Any] = (codes.view(np.uint8) ^ np.uint8(1 << (bits - 1))) & np.uint8((1 << bits) - 1)
    words = packed_size(columns, bits)
    padded: npt.NDArray[Any] = np.zeros((rows, words * 32 // bits), dtype=np.uint8)
    padded[:, :columns] = unsigned
    if bits == 4:
        padded = padded[:, 0::2] | (padded[:, 1::2] << 4)
    return np.ascontiguousarray(padded).view("<i4").astype(np.int32, copy=False)


def unpack_int32(packed: npt.NDArray[Any], bits: int, columns: int) -> npt.NDArray[np.int8]:
    """Inverse of `pack_int32`: (rows, words) int32 to (rows, columns) int8."""
    _check(bits)
    octets: npt.NDArray[Any] = np.ascontiguousarray(packed.astype("<i4", copy=False)).view(np.uint8)
    if bits == 4:
        halves = np.empty((octets.shape[0], octets.shape[1] * 2), dtype=np.uint8)
        halves[:, 0::2] = octets & np.uint8(0x0F)
        halves[:, 1::2] = octets >> 4
        octets = halves
    # Adding 2^7 to a value modulo 2^8 is undone by flipping its top bit; nibbles subtract within int8.
    unsigned = np.ascontiguousarray(octets[:, :columns])
    return unsigned.view(np.int8) - np.int8(8) if bits == 4 else (unsigned ^ np.uint8(0x80)).view(np.int8)


def pack_pairs(nibbles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Packs (rows, columns) below 16 along the last axis, the even column in the low half (`pack_fp4_to_uint8`)."""
    return np.ascontiguousarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4))


def unpack_pairs(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Inverse of `pack_pairs`."""
    return np.asarray(np.stack([packed & 0x0F, packed >> 4], axis=2).reshape(len(packed), -1))


def _check(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"values of {bits} bits are not packed; 4 and 8 are")
