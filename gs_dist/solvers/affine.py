"""Rounding to int8 and int4: scales, zero points, codes and back.

Codes run from -2^(bits-1) to 2^(bits-1) - 1. A symmetric scale is absmax/127.5 (int8) or absmax/7.5
(int4), as in golden-stick `cal_quantization_params` and compressed-tensors `calculate_qparams`; an
asymmetric range is first extended to include 0, so that the zero point fits the integer type. A scale is
rounded to the dtype it will be stored in *before* the codes are computed: codes and stored scale belong
together. Rounding is half to even throughout.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gs_dist.errors import UserError
from gs_dist.model.dtypes import FLOATS
from gs_dist.results.integers import Float32, Int8, dequantise, row_blocks

__all__ = [
    "EPSILON",
    "code_range",
    "dequantise",
    "fake_quantise_per_token",
    "fake_quantise_static",
    "num_groups",
    "quantise_weight",
    "quantise_with",
    "range_parameters",
    "round_scale",
    "row_blocks",
    "symmetric_scale",
]

Float = npt.NDArray[np.floating[Any]]

# Scale of a channel or group that is zero throughout; exact in float32, bfloat16 and float16.
EPSILON = 2.0**-23

# Smallest scale kept by each dtype. float16 has subnormals of use; elsewhere they would cost speed and
# stand for weights of no consequence.
_SCALE_LIMITS: dict[str, tuple[float, float]] = {
    "float32": (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)),
    "bfloat16": (float(ml_dtypes.finfo(ml_dtypes.bfloat16).tiny), float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
    "float16": (2.0**-24, float(np.finfo(np.float16).max)),
}


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of that many bits (8 or 4)."""
    if bits not in (4, 8):
        raise UserError(f"weights of {bits} bits are not served: use int8 or qint4x2")
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def num_groups(columns: int, group_size: int) -> int:
    """Groups along a weight's input axis; 1 for `group_size` 0 (per channel).

    Raises:
        UserError: the columns do not divide into groups.
    """
    if group_size == 0:
        return 1
    if columns % group_size:
        raise UserError(
            f"{columns} input channels do not divide into groups of {group_size}: choose another group_size, "
            "or weight_quant_granularity: per_channel"
        )
    return columns // group_size


def round_scale(scale: npt.ArrayLike, scale_dtype: str) -> Float32:
    """Positive scales rounded to `scale_dtype` and given back as float32; never 0, never infinite.

    A float16 scale below 2^-14 loses precision and is rounded up, so that no range is cut short.

    Raises:
        UserError: a dtype other than float32, float16 and bfloat16.
    """
    if scale_dtype not in FLOATS:
        raise UserError(f"scales of dtype {scale_dtype} are not served: use float32, float16 or bfloat16")
    smallest, largest = _SCALE_LIMITS[scale_dtype]
    exact = np.clip(np.asarray(scale, dtype=np.float64), smallest, largest)
    rounded = exact.astype(np.float32).astype(FLOATS[scale_dtype]).astype(np.float32)
    if scale_dtype == "float16":
        short = (rounded < exact) & (exact < 2.0**-14)
        rounded = np.where(short, rounded + np.float32(2.0**-24), rounded)
    return np.asarray(rounded, dtype=np.float32)


def symmetric_scale(max_abs: npt.ArrayLike, *, bits: int, scale_dtype: str) -> Float32:
    """Scale of symmetric ranges [-max_abs, max_abs]: 2 max_abs / (2^bits - 1), `EPSILON` where that is 0."""
    wide = np.asarray(max_abs, dtype=np.float64)
    return round_scale(np.where(wide > 0, 2.0 * wide / ((1 << bits) - 1), EPSILON), scale_dtype)


def range_parameters(
    low: npt.ArrayLike, high: npt.ArrayLike, *, bits: int, symmetric: bool, scale_dtype: str
) -> tuple[Float32, Int8 | None]:
    """Scale and zero point (None when symmetric) of ranges [low, high], extended to include 0."""
    bottom = np.minimum(np.asarray(low, dtype=np.float64), 0.0)
    top = np.maximum(np.asarray(high, dtype=np.float64), 0.0)
    if symmetric:
        return symmetric_scale(np.maximum(-bottom, top), bits=bits, scale_dtype=scale_dtype), None
    smallest, largest = code_range(bits)
    width = top - bottom
    scale = round_scale(np.where(width > 0, width / (largest - smallest), EPSILON), scale_dtype)
    zero_point = np.clip(np.rint(smallest - bottom / scale), smallest, largest).astype(np.int8)
    return scale, zero_point


def quantise_with(grouped: Float32, scale: Float32, zero_point: Int8 | None, *, bits: int) -> Int8:
    """Codes of `grouped` for given parameters that broadcast against it: clamp(round(w / scale + zero_point))."""
    smallest, largest = code_range(bits)
    values = grouped / scale
    if zero_point is not None:
        values += zero_point.astype(np.float32)
    np.rint(values, out=values)
    np.clip(values, smallest, largest, out=values)
    return values.astype(np.int8)


def quantise_weight(
    weight: Float32,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    clip_ratio: Float | None = None,
) -> tuple[Int8, Float32, Int8 | None]:
    """Rounds a weight to the nearest code, per channel or per group.

    Args:
        weight: (out, in) float32, finite.
        bits: 8 or 4.
        group_size: input channels that share a scale; 0 for one scale per output channel.
        symmetric: without zero point.
        scale_dtype: dtype the scale will be stored in: float32, float16 or bfloat16.
        clip_ratio: (out, groups), shrinks each range; weights outside saturate.

    Returns:
        Codes (out, in) int8, scale (out, groups) float32, zero point (out, groups) int8 or None.

    Raises:
        UserError: the input channels do not divide into groups, or a dtype that is not served.
    """
    rows, columns = weight.shape
    groups = num_groups(columns, group_size)
    codes = np.empty((rows, columns), dtype=np.int8)
    scale = np.empty((rows, groups), dtype=np.float32)
    zero_point = None if symmetric else np.empty((rows, groups), dtype=np.int8)
    for block in row_blocks(rows, columns):
        grouped = np.asarray(weight[block], dtype=np.float32).reshape(-1, groups, columns // groups)
        low, high = grouped.min(axis=2), grouped.max(axis=2)
        if clip_ratio is not None:
            low, high = low * clip_ratio[block], high * clip_ratio[block]
        part, zero = range_parameters(low, high, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
        scale[block] = part
        if zero_point is not None and zero is not None:
            zero_point[block] = zero
        wide_zero = None if zero is None else zero[:, :, None]
        codes[block] = quantise_with(grouped, part[:, :, None], wide_zero, bits=bits).reshape(-1, columns)
    return codes, scale, zero_point


def fake_quantise_static(x: Float32, scale: float, zero_point: int | None = None) -> Float32:
    """Activations rounded to int8 with one scale and back, float32, shape kept."""
    zero = np.float32(zero_point or 0)
    codes = np.clip(np.rint(x / np.float32(scale) + zero), -128, 127)
    return np.asarray((codes - zero) * np.float32(scale), dtype=np.float32)


def fake_quantise_per_token(x: Float32) -> Float32:
    """Activations (..., channels) rounded to int8 with the scale absmax/127.5 of each token, and back."""
    wide = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    scale = np.where(wide > 0, wide / 127.5, EPSILON).astype(np.float32)
    return np.asarray(np.clip(np.rint(x / scale), -128, 127) * scale, dtype=np.float32)
