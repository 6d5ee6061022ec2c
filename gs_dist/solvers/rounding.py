"""Rounding of one weight by whatever its policy names: clipped ranges, GPTQ, or to nearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gs_dist.recipe.policy import PrecisionRecovery, QuantPolicy
from gs_dist.results.quantized import Float32, QuantizedLinear
from gs_dist.solvers import affine, clip, gptq
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = ["round_weight"]


def round_weight(
    weight: Float32,
    policy: QuantPolicy,
    objective: Float32 | None,
    scale_dtype: str,
    *,
    threads: Threads = ONE_THREAD,
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """Codes and scales of a weight, without bias and input scale, and what is to be said of them.

    Args:
        weight: (out, in) float32.
        policy: of the linear.
        objective: (in, in) Gram matrix of its input; without one it is rounded to nearest, in whole ranges.
        scale_dtype: dtype the scale will be stored in.
        threads: share the weight's rows.

    Raises:
        UserError: the input channels do not divide into groups.
    """
    task = _Task(weight, policy, scale_dtype, threads)
    if objective is None:
        return _to_nearest(task, None, None)
    if policy.clips_weights and not policy.searches_ranges_on_the_way:
        found = clip.clip_weight(weight, objective, policy, scale_dtype=scale_dtype, threads=threads)
        return _KERNELS[policy.precision_recovery](task, objective, found.ratio)
    return _KERNELS[policy.precision_recovery](task, objective, None)


@dataclass(frozen=True)
class _Task:
    """A weight (out, in) float32 and how it is to be rounded."""

    weight: Float32
    policy: QuantPolicy
    scale_dtype: str
    threads: Threads


Rounded = tuple[QuantizedLinear, tuple[str, ...]]


def _to_nearest(task: _Task, objective: Float32 | None, ratio: Float32 | None) -> Rounded:
    policy = task.policy
    codes, scale, zero_point = affine.quantise_weight(
        task.weight,
        form=policy.weight_format,
        group_size=policy.group_size,
        symmetric=policy.weight_symmetric,
        scale_dtype=task.scale_dtype,
        clip_ratio=ratio,
    )
    return QuantizedLinear(policy=policy, codes=codes, scale=scale, zero_point=zero_point), ()


def _by_gptq(task: _Task, objective: Float32, ratio: Float32 | None) -> Rounded:
    policy = task.policy
    result = gptq.quantise(
        task.weight,
        objective,
        policy,
        scale_dtype=task.scale_dtype,
        clip_ratio=ratio,
        search_ratios=policy.clip_ratios if policy.clips_weights and policy.searches_ranges_on_the_way else (1.0,),
        threads=task.threads,
    )
    solved = QuantizedLinear(
        policy=policy,
        codes=result.codes,
        scale=result.scale,
        zero_point=result.zero_point,
        group_index=result.group_index,
    )
    return solved, result.notes


# The kernel of each method of `gs_dist.methods` that rounds; its ratios (out, groups) shrink ranges, None leaves them.
_KERNELS: Mapping[PrecisionRecovery, Callable[[_Task, Float32, Float32 | None], Rounded]] = {
    PrecisionRecovery.GPTQ: _by_gptq,
    PrecisionRecovery.NONE: _to_nearest,
}
