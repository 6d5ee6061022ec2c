"""What each scheme would cost each linear, and the choice of schemes that costs least under a size budget.

The cost of a scheme is the output error of plainly rounding the weight to it: over all tokens, from the second moments
of the input, and of the median token of a sample. The larger of the two counts, since a few tokens of enormous energy
may own the sum, and what ordinary ones lose does not show in it. Solvers that do better than plain rounding lower all
costs in about the same proportion, so the order of the linears stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd, isfinite
from typing import Literal

import numpy as np

from gs_dist.errors import LayerError, UserError
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.recipe.sizes import stored_bytes
from gs_dist.results.costs import FLOAT, SchemeCost
from gs_dist.results.quantized import Float32
from gs_dist.solvers import affine, output_error
from gs_dist.solvers.folding import FoldedTensors
from gs_dist.solvers.layer import LayerProblem
from gs_dist.solvers.objective import plain_objective
from gs_dist.solvers.threads import Threads
from gs_dist.solvers.token_error import median_token_error

__all__ = ["choose_schemes", "fits", "layer_costs", "layer_patterns", "within_ceilings"]

Measure = Literal["relative", "absolute"]

# The most sizes that the choice tells apart; beyond that, sizes are rounded up to this share of the room.
_MAX_UNITS = 1 << 15


def layer_costs(
    problem: LayerProblem, schemes: Mapping[str, Mapping[str, QuantPolicy]], *, num_threads: int = 1
) -> tuple[SchemeCost, ...]:
    """Costs of every scheme and of `FLOAT` for each linear of a layer, in the layer's order.

    Args:
        problem: weights and statistics; its policies are not looked at.
        schemes: linear's name within the layer to scheme to policy; number format, groups and symmetry count.
        num_threads: share the work, with the same figures at any number; the caller holds BLAS to one thread.

    Raises:
        LayerError: weights or statistics are not finite.
        UserError: a linear's input channels do not divide into a scheme's groups, or no statistics.
    """
    with Threads(num_threads) as threads:
        return _costs(problem, schemes, threads)


def _costs(
    problem: LayerProblem, schemes: Mapping[str, Mapping[str, QuantPolicy]], threads: Threads
) -> tuple[SchemeCost, ...]:
    folded = FoldedTensors(problem.tensors)
    costs: list[SchemeCost] = []
    for layer_input in problem.inputs:
        statistics = problem.statistics.get(layer_input.name)
        if statistics is None or statistics.num_tokens == 0:
            raise UserError(f"layer {problem.layer}: no statistics of {layer_input.name} to judge its linears by")
        group, objective = f"{problem.prefix}{layer_input.name}", plain_objective(statistics)
        tokens = statistics.sample_tokens
        for name in layer_input.linears:
            weight = folded.weight(name)
            energy = output_error.output_energy(weight, objective, threads=threads)
            for scheme, policy in (*schemes[name].items(), (FLOAT, None)):
                error, of_token = 0.0, None
                if policy is not None:
                    restored = _plainly_rounded(weight, policy, problem.scale_dtype)
                    if tokens is not None and len(tokens):
                        of_token = median_token_error(weight, restored, tokens, tokens)
                    restored -= weight  # now the change of the weight
                    error = output_error.output_energy(restored, objective, threads=threads)
                if not (isfinite(error) and isfinite(energy)):
                    raise LayerError(
                        f"layer {problem.layer}: the output of {problem.prefix}{name} is not finite; the activation "
                        "overflowed or a weight is damaged"
                    )
                costs.append(
                    SchemeCost(
                        name=problem.prefix + name,
                        group=group,
                        scheme=scheme,
                        num_bytes=stored_bytes(policy, folded.shape(name), problem.scale_dtype),
                        error=error,
                        relative_error=error / energy if energy > 0 else 0.0,
                        token_error=of_token,
                    )
                )
    return tuple(costs)


def _plainly_rounded(weight: Float32, policy: QuantPolicy, scale_dtype: str) -> Float32:
    codes, scale, zero_point = affine.quantize_weight(
        weight,
        form=policy.weight_format,
        group_size=policy.group_size,
        symmetric=policy.weight_symmetric,
        scale_dtype=scale_dtype,
    )
    return affine.dequantize(codes, scale, zero_point)


def within_ceilings(
    costs: Sequence[SchemeCost], *, max_relative_error: float | None, max_token_error: float | None
) -> list[SchemeCost]:
    """Costs without the schemes that would destroy a linear, nor for those which share a scheme with it."""

    def destroyed(cost: SchemeCost) -> bool:
        told = ((cost.relative_error, max_relative_error), (cost.token_error, max_token_error))
        return any(error is not None and most is not None and not error <= most for error, most in told)

    out = {(cost.group, cost.scheme) for cost in costs if destroyed(cost)}
    return [cost for cost in costs if (cost.group, cost.scheme) not in out]


def fits(costs: Sequence[SchemeCost], budget: int) -> bool:
    """Whether some choice takes no more than `budget` bytes."""
    _, sizes, _ = _by_group(costs, "relative")
    return sum(min(options.values()) for options in sizes.values()) <= budget


def choose_schemes(costs: Sequence[SchemeCost], budget: int, *, measure: Measure = "relative") -> dict[str, str]:
    """Scheme of each linear so that the summed cost is least and all linears fit into `budget` bytes.

    A multiple-choice knapsack, solved by dynamic programming over sizes. All sizes of a model are multiples of
    one number, and where that leaves no more than 32768 of them above the smallest choice, the choice is the
    best there is. Beyond that, sizes are rounded up, and what rounding wasted is then spent where it buys most.
    The first of equally good choices wins, so that the same costs give the same choice.

    Args:
        costs: of every linear and scheme.
        budget: bytes that all linears together may take.
        measure: "relative" sums each linear's `largest_error`, shares of its output, which makes layers with loud
            and quiet activations comparable; "absolute" sums tr(D G DT).

    Raises:
        UserError: even the smallest choice is larger than the budget.
    """
    names, sizes, errors = _by_group(costs, measure)
    least = [min(options.values()) for options in sizes.values()]
    room = budget - sum(least)
    if room < 0:
        raise UserError(f"the smallest choice takes {sum(least)} bytes and the budget is {budget}: raise the budget")
    steps = [size - low for options, low in zip(sizes.values(), least, strict=True) for size in options.values()]
    unit = max(gcd(*steps), 1)
    if room // unit > _MAX_UNITS:
        unit = -(-room // _MAX_UNITS)
    units = room // unit
    best = np.zeros(units + 1)  # least error with at most that many units spent
    picks: list[np.ndarray[tuple[int], np.dtype[np.int8]]] = []
    for (group, options), smallest in zip(sizes.items(), least, strict=True):
        found = np.full(units + 1, np.inf)
        pick = np.zeros(units + 1, dtype=np.int8)
        for index, (scheme, size) in enumerate(options.items()):
            extra = -(-(size - smallest) // unit)
            if extra > units:
                continue
            candidate = np.full(units + 1, np.inf)
            candidate[extra:] = best[: units + 1 - extra] + errors[group][scheme]
            better = candidate < found
            found[better], pick[better] = candidate[better], index
        best = found
        picks.append(pick)
    chosen: dict[str, str] = {}
    place = units
    for (group, options), smallest, pick in reversed(list(zip(sizes.items(), least, picks, strict=True))):
        scheme = list(options)[int(pick[place])]
        chosen[group] = scheme
        place -= -(-(options[scheme] - smallest) // unit)
    _spend_rest(chosen, sizes, errors, budget)
    return {name: chosen[group] for name, group in names.items()}


def _by_group(
    costs: Sequence[SchemeCost], measure: Measure
) -> tuple[dict[str, str], dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Group of each linear, and size and error of each group under each scheme."""
    names: dict[str, str] = {}
    sizes: dict[str, dict[str, int]] = {}
    errors: dict[str, dict[str, float]] = {}
    for cost in costs:
        names[cost.name] = cost.group
        size, error = sizes.setdefault(cost.group, {}), errors.setdefault(cost.group, {})
        size[cost.scheme] = size.get(cost.scheme, 0) + cost.num_bytes
        added = cost.largest_error if measure == "relative" else cost.error
        error[cost.scheme] = error.get(cost.scheme, 0.0) + added
    return names, sizes, errors


def _spend_rest(
    chosen: dict[str, str], sizes: dict[str, dict[str, int]], errors: dict[str, dict[str, float]], budget: int
) -> None:
    """Spends bytes that rounding sizes up left over, best gain a byte first."""
    left = budget - sum(sizes[group][scheme] for group, scheme in chosen.items())
    while True:
        offers = [
            ((errors[g][now] - errors[g][s]) / max(size - sizes[g][now], 1), g, s, size - sizes[g][now])
            for g, now in chosen.items()
            for s, size in sizes[g].items()
            if errors[g][s] < errors[g][now] and size - sizes[g][now] <= left
        ]
        if not offers:
            return
        _, group, scheme, extra = max(offers, key=lambda offer: offer[0])
        chosen[group] = scheme
        left -= extra


def layer_patterns(chosen: Mapping[str, str]) -> dict[str, str]:
    """A choice as patterns for `layer_policies`: pattern to scheme, linears of one kind and scheme together.

    Patterns match full dotted names from start to end and no two match one name.
    """
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for name, scheme in chosen.items():
        before, _, rest = name.partition(".layers.")
        index, _, linear = rest.partition(".")
        kinds.setdefault((before, linear, scheme), []).append(int(index))
    patterns = {}
    for (before, linear, scheme), indices in kinds.items():
        layers = "|".join(str(index) for index in sorted(indices))
        head, tail = (part.replace(".", r"\.") for part in (f"{before}.layers.", f".{linear}"))
        patterns[f"{head}({layers}){tail}$"] = scheme
    return patterns
