"""Rounding a weight to nearest: scales, zero points, codes and back.

What codes and scales there are is the number format's to say (`gs_dist.numbers`); an asymmetric range is first
extended to include 0, so that the zero point fits the integer type. A scale is rounded to the dtype it will be stored
in *before* the codes are computed: codes and stored scale belong together. Rounding is half to even throughout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.numbers.groups import num_groups
from gs_dist.numbers.number_format import NumberFormat
from gs_dist.results.integers import Float32, Int8, dequantize, row_blocks
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = [
    "dequantize",
    "quantize_weight",
    "quantize_with",
    "row_blocks",
]

Float = npt.NDArray[np.floating[Any]]


def quantize_with(grouped: Float32, scale: Float32, zero_point: Int8 | None, *, form: NumberFormat) -> Int8:
    """Codes of `grouped` for given parameters that broadcast against it: the nearest to w / scale + zero_point."""
    values = grouped / scale
    if zero_point is not None:
        values += zero_point.astype(np.float32)
    form.snap(values)
    return values.astype(np.int8)


def quantize_weight(
    weight: Float32,
    *,
    form: NumberFormat,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    clip_ratio: Float | None = None,
    threads: Threads = ONE_THREAD,
) -> tuple[Int8, Float32, Int8 | None]:
    """Rounds a weight to the nearest code, per channel or per group.

    Args:
        weight: (out, in) float32, finite.
        form: whose codes are whole numbers.
        group_size: input channels that share a scale; 0 for one scale per output channel.
        symmetric: without zero point.
        scale_dtype: dtype the scale will be stored in: float32, float16 or bfloat16.
        clip_ratio: (out, groups), shrinks each range; weights outside saturate.
        threads: share the rows.

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

    def quantize(block: slice) -> None:
        grouped = np.asarray(weight[block], dtype=np.float32).reshape(-1, groups, columns // groups)
        low, high = grouped.min(axis=2), grouped.max(axis=2)
        if clip_ratio is not None:
            low, high = low * clip_ratio[block], high * clip_ratio[block]
        part, zero = form.range_parameters(low, high, symmetric=symmetric, scale_dtype=scale_dtype)
        scale[block] = part
        if zero_point is not None and zero is not None:
            zero_point[block] = zero
        wide_zero = None if zero is None else zero[:, :, None]
        codes[block] = quantize_with(grouped, part[:, :, None], wide_zero, form=form).reshape(-1, columns)

    threads.map(quantize, row_blocks(rows, columns))
    return codes, scale, zero_point
