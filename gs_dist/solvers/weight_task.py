"""What a rounding method is given of a weight, what it gives back, and the plainest of them."""

from __future__ import annotations

from dataclasses import dataclass

from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import Float32, QuantizedLinear
from gs_dist.solvers.affine import quantize_weight
from gs_dist.solvers.threads import Threads

__all__ = ["Rounded", "WeightTask", "round_to_nearest"]

Rounded = tuple[QuantizedLinear, tuple[str, ...]]
"""Codes and scales without bias and input scale, and what is to be said of them."""


@dataclass(frozen=True)
class WeightTask:
    """A weight (out, in) float32, its policy, the dtype of its scales, and threads to share its rows."""

    weight: Float32
    policy: QuantPolicy
    scale_dtype: str
    threads: Threads


def round_to_nearest(task: WeightTask, objective: Float32 | None, ratio: Float32 | None) -> Rounded:
    """Each weight by itself, in ranges shrunk by `ratio` (out, groups); the objective is not looked at."""
    policy = task.policy
    codes, scale, zero_point = quantize_weight(
        task.weight,
        form=policy.weight_format,
        group_size=policy.group_size,
        symmetric=policy.weight_symmetric,
        scale_dtype=task.scale_dtype,
        clip_ratio=ratio,
        threads=task.threads,
    )
    return QuantizedLinear(policy=policy, codes=codes, scale=scale, zero_point=zero_point), ()
