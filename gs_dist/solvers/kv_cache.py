"""Scales of an int8 KV cache."""

from __future__ import annotations

from gs_dist.model.statistics import InputStatistics
from gs_dist.numbers.integer import INT8
from gs_dist.results.quantized import Float32

__all__ = ["cache_relative_error", "cache_scale"]


def cache_scale(statistics: InputStatistics, *, scale_dtype: str) -> Float32:
    """Symmetric scale absmax/127.5 of each of num_kv_heads * head_dim channels, float32.

    Args:
        statistics: of what is written to the cache: keys after the rotary embedding, or values, both as
            the folded layer produces them.
        scale_dtype: dtype the scale will be stored in.
    """
    return INT8.symmetric_scale(statistics.max_abs, scale_dtype=scale_dtype)


def cache_relative_error(statistics: InputStatistics, scale: Float32) -> float:
    """Estimate of |q(x) - x|^2 / |x|^2: a step d costs d^2/12 a value, and at most the value itself."""
    rounding = statistics.num_tokens * scale.astype("float64") ** 2 / 12.0
    energy = float(statistics.sum_squares.sum())
    cost = float((rounding.clip(max=statistics.sum_squares)).sum())
    return cost / energy if energy > 0 else 0.0
