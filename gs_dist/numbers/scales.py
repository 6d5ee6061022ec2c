"""Scales: positive, and rounded to the dtype that stores them before any code is computed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gs_dist.errors import UserError
from gs_dist.model.dtypes import FLOATS

__all__ = ["EPSILON", "power_of_two_below", "round_scale"]

Float32 = npt.NDArray[np.float32]

# Scale of a channel or group that is zero throughout; exact in float32, bfloat16 and float16.
EPSILON = 2.0**-23

# Smallest scale kept by each dtype. float16 has subnormals of use; elsewhere they would cost speed and
# stand for weights of no consequence.
_LIMITS: dict[str, tuple[float, float]] = {
    "float32": (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)),
    "bfloat16": (float(ml_dtypes.finfo(ml_dtypes.bfloat16).tiny), float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
    "float16": (2.0**-24, float(np.finfo(np.float16).max)),
}


def round_scale(scale: npt.ArrayLike, scale_dtype: str) -> Float32:
    """Positive scales rounded to `scale_dtype` and given back as float32; never 0, never infinite.

    A float16 scale below 2^-14 loses precision and is rounded up, so that no range is cut short.

    Raises:
        UserError: a dtype other than float32, float16 and bfloat16.
    """
    if scale_dtype not in FLOATS:
        raise UserError(f"scales of dtype {scale_dtype} are not served: use float32, float16 or bfloat16")
    smallest, largest = _LIMITS[scale_dtype]
    exact = np.clip(np.asarray(scale, dtype=np.float64), smallest, largest)
    rounded = exact.astype(np.float32).astype(FLOATS[scale_dtype]).astype(np.float32)
    if scale_dtype == "float16":
        short = (rounded < exact) & (exact < 2.0**-14)
        rounded = np.where(short, rounded + np.float32(2.0**-24), rounded)
    return np.asarray(rounded, dtype=np.float32)


def power_of_two_below(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """The largest power of two that is at most each positive value, within those of E8M0 (2^-127 to 2^127)."""
    _, exponent = np.frexp(np.asarray(values, dtype=np.float64))
    return np.asarray(np.ldexp(1.0, np.clip(exponent - 1, -127, 127)), dtype=np.float64)
