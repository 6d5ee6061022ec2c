"""The kernel of rounding toward zero."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gs_dist.results.quantized import Float32
from gs_dist.solvers.weight_task import Rounded, WeightTask, round_to_nearest

__all__ = ["round_weight"]


def round_weight(task: WeightTask, objective: Float32, ratio: Float32 | None) -> Rounded:
    """Codes of a weight with one scale an output channel, pulled toward zero by `pull` codes before."""
    nearest, _ = round_to_nearest(task, objective, ratio)
    values = task.weight / nearest.scale
    values = np.sign(values) * np.maximum(np.abs(values) - np.float32(task.policy.algo_args.pull), 0)
    task.policy.weight_format.snap(values)
    return replace(nearest, codes=values.astype(np.int8)), ("pulled toward zero",)
