"""Rounding of one weight by whatever its policy names, in ranges that are searched before where it asks for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gs_dist.errors import UserError
from gs_dist.recipe.policy import PrecisionRecovery, QuantPolicy
from gs_dist.results.quantized import Float32
from gs_dist.solvers import clip, coordinate_descent, gptq
from gs_dist.solvers.objective import GramObjective, Objective
from gs_dist.solvers.threads import ONE_THREAD, Threads
from gs_dist.solvers.weight_task import Rounded, WeightTask, round_to_nearest

__all__ = ["round_weight"]

Kernel = Callable[[WeightTask, Objective | None, Float32 | None], Rounded]


def _with_matrix(kernel: Callable[[WeightTask, Float32, Float32 | None], Rounded]) -> Kernel:
    """A kernel that factorises the Gram matrix, or looks at its entries."""

    def rounded(task: WeightTask, objective: Objective | None, ratio: Float32 | None) -> Rounded:
        if not isinstance(objective, GramObjective):
            raise UserError("GPTQ factorises the Gram matrix of its input, and none was taken: set gram: on")
        return kernel(task, objective.matrix, ratio)

    return rounded


# The kernel of each method of `gs_dist.methods` that rounds; its ratios (out, groups) shrink ranges, None leaves them.
_KERNELS: Mapping[PrecisionRecovery, Kernel] = {
    PrecisionRecovery.GPTQ: _with_matrix(gptq.round_weight),
    PrecisionRecovery.COORDINATE_DESCENT: _with_matrix(coordinate_descent.round_weight),
    PrecisionRecovery.NONE: lambda task, _, ratio: round_to_nearest(task, None, ratio),
}


def round_weight(
    weight: Float32,
    policy: QuantPolicy,
    objective: Objective | None,
    scale_dtype: str,
    *,
    threads: Threads = ONE_THREAD,
) -> Rounded:
    """Codes and scales of a weight, without bias and input scale, and what is to be said of them.

    Args:
        weight: (out, in) float32.
        policy: of the linear.
        objective: of its input; without one it is rounded to nearest, in whole ranges.
        scale_dtype: dtype the scale will be stored in.
        threads: share the weight's rows.

    Raises:
        UserError: the input channels do not divide into groups.
    """
    task = WeightTask(weight, policy, scale_dtype, threads)
    if objective is None:
        return round_to_nearest(task, None, None)
    ratio: Float32 | None = None
    if policy.clips_weights and not policy.searches_ranges_on_the_way:
        ratio = clip.clip_weight(weight, objective, policy, scale_dtype=scale_dtype, threads=threads).ratio
    return _KERNELS[policy.precision_recovery](task, objective, ratio)
