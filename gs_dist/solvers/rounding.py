"""Rounding of one weight by whatever its policy names: clipped ranges, GPTQ, or to nearest."""

from __future__ import annotations

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
        objective: (in, in) Gram matrix of its input; without one ranges are not clipped and GPTQ does not run.
        scale_dtype: dtype the scale will be stored in.
        threads: share the weight's rows.

    Raises:
        UserError: the input channels do not divide into groups.
    """
    ratio: Float32 | None = None
    rounds_by_gptq = policy.precision_recovery is PrecisionRecovery.GPTQ and objective is not None
    searches_on_the_way = rounds_by_gptq and policy.group_size > 0
    if policy.clips_weights and objective is not None and not searches_on_the_way:
        ratio = clip.clip_weight(weight, objective, policy, scale_dtype=scale_dtype, threads=threads).ratio
    if rounds_by_gptq and objective is not None:
        # A range found by plain rounding does not suit GPTQ, which makes up for what rounding does.
        ratios = policy.clip_ratios if policy.clips_weights and searches_on_the_way else (1.0,)
        result = gptq.quantise(
            weight,
            objective,
            policy,
            scale_dtype=scale_dtype,
            clip_ratio=ratio,
            search_ratios=ratios,
            threads=threads,
        )
        solved = QuantizedLinear(
            policy=policy,
            codes=result.codes,
            scale=result.scale,
            zero_point=result.zero_point,
            group_index=result.group_index,
        )
        return solved, result.notes
    codes, scale, zero_point = affine.quantise_weight(
        weight,
        bits=policy.weight_bits,
        group_size=policy.group_size,
        symmetric=policy.weight_symmetric,
        scale_dtype=scale_dtype,
        clip_ratio=ratio,
    )
    return QuantizedLinear(policy=policy, codes=codes, scale=scale, zero_point=zero_point), ()
