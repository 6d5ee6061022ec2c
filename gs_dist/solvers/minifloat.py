"""Bits of small floats, E4M3 and E2M1: float32 values rounded to them, half to even, beyond the largest saturating.

The same as `SmallFloat.snap` and `encode` in a third of the time, for weights that are streamed.

A value v with exponent E (at least that of the smallest normal) lies on a grid of step 2^(E - m), m being the bits of
mantissa. Added to 1.5 x 2^(E + 23 - m) it is rounded to that grid, and what the sum's bits are past those of the
summand is v over the step; with the exponent above it, that is the code. No subnormal float32 is ever made, which
processors take long for. Formats: OCP 8-bit Floating Point 1.0, OCP Microscaling Formats 1.0, section 5.3.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gs_dist.numbers.scales import Float32
from gs_dist.numbers.small_float import SmallFloat

__all__ = ["MinifloatEncoder"]

_SIGN = np.int32(-(2**31))
_EXPONENT = np.int32(0x7F800000)
_HALF = np.int32(1 << 22)  # a mantissa of 1.5


class MinifloatEncoder:
    """Encodes blocks of up to `size` values; what `SmallFloat.unit` says of whole codes has no part in it."""

    def __init__(self, form: SmallFloat, size: int) -> None:
        found = ml_dtypes.finfo(form.dtype)
        self._bits, self._mantissa = form.bits, int(found.nmant)
        self._largest = np.float32(float(found.max))
        self._exponent = np.empty(size, dtype=np.int32)
        self._sum = np.empty(size, dtype=np.float32)
        self._least = np.full(size, np.float32(float(found.smallest_normal)).view(np.int32), dtype=np.int32)

    def encode(self, values: Float32, codes: npt.NDArray[np.uint8]) -> None:
        """Writes the code of each of the finite `values`, contiguous, which are overwritten."""
        flat, target = values.reshape(-1), codes.reshape(-1)
        count = len(flat)
        exponent, summed, least = self._exponent[:count], self._sum[:count], self._least[:count]
        np.minimum(flat, self._largest, out=flat)
        np.maximum(flat, -self._largest, out=flat)
        bits = flat.view(np.int32)
        np.right_shift(bits, 32 - self._bits, out=summed.view(np.int32))
        sign = (summed.view(np.int32) & np.int32(1 << (self._bits - 1))).astype(np.uint8)
        np.bitwise_and(bits, ~_SIGN, out=bits)
        np.bitwise_and(bits, _EXPONENT, out=exponent)
        np.maximum(exponent, least, out=exponent)
        magic = summed.view(np.int32)
        np.add(exponent, np.int32(((23 - self._mantissa) << 23) | int(_HALF)), out=magic)
        np.add(flat, summed, out=flat)
        np.subtract(bits, magic, out=bits)
        np.subtract(exponent, least, out=exponent)
        np.right_shift(exponent, 23 - self._mantissa, out=exponent)
        np.add(bits, exponent, out=bits)
        np.copyto(target, bits, casting="unsafe")
        np.bitwise_or(target, sign, out=target)
