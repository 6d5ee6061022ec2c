"""One decoder layer: from weights, statistics and policies to integers, scales and a row for each linear.

The steps: outlier suppression for each group of linears that share an input, then linear by linear
clipping, weights, activation parameters and the error at the output; KV-cache scales last. A layer is a
pure function of its problem: the same problem gives the same bytes wherever it is solved, on any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from gs_dist.errors import DestroyedError, LayerError, UserError
from gs_dist.methods.method import is_large
from gs_dist.model.decoder import LayerInput, Linear
from gs_dist.model.statistics import InputStatistics, LayerStatistics
from gs_dist.recipe.dialects import Dialect
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import Float32, LinearSummary, QuantizedKVCache, QuantizedLayer, QuantizedLinear
from gs_dist.solvers import affine, kv_cache, output_error
from gs_dist.solvers.activation_range import ActivationRange
from gs_dist.solvers.folding import FoldedTensors, Tensor
from gs_dist.solvers.gates import dead_input_notes, is_dead, lost_channels_notes, overflow_notes
from gs_dist.solvers.input_figures import InputFigures, input_figures
from gs_dist.solvers.linear_figures import linear_figures
from gs_dist.solvers.objective import Objective, plain_objective
from gs_dist.solvers.rescaling import Rescaling
from gs_dist.solvers.rounding import round_weight
from gs_dist.solvers.strategy import strategy
from gs_dist.solvers.suppression import input_ranges, suppress
from gs_dist.solvers.threads import Threads

__all__ = ["LayerProblem", "above_ceilings", "solve_layer"]


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """All that decides a layer's outcome.

    Attributes:
        layer: index of the decoder layer, for messages and rows.
        prefix: of full tensor names, ending in a dot (`model.layers.3.`).
        inputs: activations and the linears that read them, in forward order.
        linears: the layer's linears.
        tensors: source tensors by name within the layer, in the checkpoint's dtype. Never written to.
        statistics: of each input by name, and of `key` and `value` for a KV cache.
        policies: by linear name within the layer; None (or no entry) leaves a linear as it is.
        scale_dtype: dtype scales will be stored in: "float32", "float16" or "bfloat16".
        dialects: what the layer is published as, of which some store one scale for a whole KV cache.
        makes_biases: linears whose policy `makes_bias`, and norms that only such linears read, may be published with
            a bias that the source lacks.
        divides_inputs: whether linears may be handed on with a scale that they divide their input by, where nothing
            before them takes it up; no file has a place for one.
    """

    layer: int
    prefix: str
    inputs: tuple[LayerInput, ...]
    linears: tuple[Linear, ...]
    tensors: Mapping[str, Tensor]
    statistics: LayerStatistics
    policies: Mapping[str, QuantPolicy | None]
    scale_dtype: str
    makes_biases: bool = False
    divides_inputs: bool = True
    dialects: tuple[Dialect, ...] = ()

    def quantized(self, layer_input: LayerInput) -> dict[str, QuantPolicy]:
        """Policies of those readers of an input that are quantised."""
        policies = {name: self.policies.get(name) for name in layer_input.linears}
        return {name: policy for name, policy in policies.items() if policy and policy.quantizes_linear}


def solve_layer(
    problem: LayerProblem,
    *,
    max_relative_error: float | None = None,
    max_token_error: float | None = None,
    on_bad_layer: Literal["fail", "keep_float"] = "fail",
    num_threads: int = 1,
) -> QuantizedLayer:
    """Quantises a decoder layer.

    Args:
        problem: weights, statistics and policies.
        max_relative_error: ceiling of a linear's error over all tokens, rounded activations included; None for none.
        max_token_error: ceiling of its error on the median token of a sample; None for none.
        on_bad_layer: what to do about a linear above one. `keep_float` leaves it unquantised together with
            the linears that read the same input, because serving engines fuse those and take one scheme
            for all; the rows say so.
        num_threads: share the work, with the same bytes at any number. The caller holds BLAS to one thread
            (`blas.one_thread`) while the layer is solved.

    An input that float16 cannot hold, in a checkpoint of float16, is treated like a linear above the ceiling.

    Raises:
        LayerError: statistics are missing, empty or not finite, an input overflows float16, or a linear is above
            the ceiling.
        UserError: weights are not finite, do not divide into groups, or policies within one group differ.
    """
    current, notes = _without_overflow(problem, on_bad_layer)
    while True:
        try:
            with Threads(num_threads) as threads:
                solved = _solve(current, threads)
        except UserError as error:
            raise type(error)(f"layer {problem.layer}: {error}") from error
        quantized = {problem.prefix + name for name in solved.linears}
        bad = above_ceilings([row for row in solved.rows if row.name in quantized], max_relative_error, max_token_error)
        if not bad:
            rows = tuple(replace(row, notes=row.notes + notes.get(row.name, ())) for row in solved.rows)
            return replace(solved, rows=rows)
        if on_bad_layer == "fail":
            raise DestroyedError(
                f"layer {problem.layer}: destroyed by rounding: {'; '.join(f'{n}: {why}' for n, why in bad.items())}; "
                "choose another policy for them in layer_policies, set on_bad_layer: keep_float, or raise the limit"
            )
        kept = dict(current.policies)
        for readers in _fused(current.inputs):
            failing = [name for name in readers if problem.prefix + name in bad]
            for name in readers if failing else ():
                kept[name] = _without_weight(kept.get(name))
                reasons = "; ".join(f"{problem.prefix + f}: {bad[problem.prefix + f]}" for f in failing)
                notes[problem.prefix + name] = (f"kept in float: {reasons}",)
        current = replace(current, policies=kept)


def _fused(inputs: Sequence[LayerInput]) -> list[tuple[str, ...]]:
    """Linears that serving engines run as one: those that read one input, and all experts of a layer."""
    if not any(layer_input.routed for layer_input in inputs):
        return [layer_input.linears for layer_input in inputs]
    together = [i for i in inputs if i.routed or i.followers]
    return [
        *(i.linears for i in inputs if i not in together),
        tuple(name for layer_input in together for name in layer_input.linears),
    ]


def _without_overflow(
    problem: LayerProblem, on_bad_layer: Literal["fail", "keep_float"]
) -> tuple[LayerProblem, dict[str, tuple[str, ...]]]:
    """The problem less the linears whose input overflows float16, and what their rows say of it."""
    kept, notes = dict(problem.policies), dict[str, tuple[str, ...]]()
    fused = {name: readers for readers in _fused(problem.inputs) for name in readers}
    for layer_input in problem.inputs:
        readers, seen = problem.quantized(layer_input), problem.statistics.get(layer_input.name)
        overflow = overflow_notes(seen, problem.scale_dtype) if readers and seen is not None else ()
        if overflow and on_bad_layer == "fail":
            raise LayerError(
                f"layer {problem.layer}: {', '.join(problem.prefix + name for name in readers)}: {overflow[0]} "
                "(convert the checkpoint first), leave out the samples that do it, or set on_bad_layer: keep_float"
            )
        for name in fused[layer_input.linears[0]] if overflow else ():
            kept[name] = _without_weight(kept.get(name))
            notes[problem.prefix + name] = ("kept in float: its input overflows float16",)
    return replace(problem, policies=kept), notes


def _without_weight(policy: QuantPolicy | None) -> QuantPolicy | None:
    """What remains of a policy for a linear that stays: its part in the KV cache."""
    if policy is None or policy.kvcache_quant_dtype is None:
        return None
    return QuantPolicy(
        weight_quant_dtype=None,
        kvcache_quant_dtype=policy.kvcache_quant_dtype,
        kvcache_quant_granularity=policy.kvcache_quant_granularity,
    )


def above_ceilings(rows: Sequence[LinearSummary], over_all: float | None, of_token: float | None) -> dict[str, str]:
    """Linears above a ceiling, and what is above which; an error that is no number is above all."""
    found: dict[str, str] = {}
    for row in rows:
        told = (
            _beyond(row.energy_error, over_all, "the output's energy", "max_relative_error"),
            _beyond(row.token_error, of_token, "the median token's output", "max_token_error"),
        )
        if any(told):
            found[row.name] = " and ".join(filter(None, told))
    return found


def _beyond(error: float | None, ceiling: float | None, of_what: str, setting: str) -> str | None:
    if error is None or ceiling is None or error <= ceiling:
        return None
    return f"{error:.3g} of {of_what} is lost ({setting} is {ceiling:g})"


def _solve(problem: LayerProblem, threads: Threads) -> QuantizedLayer:
    _check_statistics(problem)
    folded = FoldedTensors(problem.tensors)
    rescalings = {
        layer_input.name: suppress(
            layer_input,
            {name: problem.policies.get(name) for name in layer_input.linears},
            problem.statistics.get(layer_input.name),
            folded,
            problem.scale_dtype,
            new_biases=_new_biases(problem),
            divides_inputs=problem.divides_inputs,
            threads=threads,
        )
        for layer_input in problem.inputs
    }
    linears: dict[str, QuantizedLinear] = {}
    rows: dict[str, LinearSummary] = {}
    for layer_input in problem.inputs:
        for name, solved, row in _solve_group(problem, layer_input, folded, rescalings[layer_input.name], threads):
            linears[name], rows[name] = solved, row
    for linear in problem.linears:
        rows.setdefault(linear.name, _untouched_row(problem, linear.name))
    tensors = {name: folded.published(name) for name in folded.names if name.rpartition(".")[0] not in linears}
    cache, cache_rows = _solve_cache(problem, rescalings)
    ordered = tuple(rows[linear.name] for linear in problem.linears)
    return QuantizedLayer(
        layer=problem.layer, linears=linears, tensors=tensors, kv_cache=cache, rows=ordered + cache_rows
    )


def _new_biases(problem: LayerProblem) -> frozenset[str]:
    """Norms and linears that can be published with a bias though the source has none."""
    if not problem.makes_biases:
        return frozenset()
    made = {name for name, policy in problem.policies.items() if policy is not None and policy.makes_bias}
    linears = {linear.name for linear in problem.linears}
    norms = {i.source for i in problem.inputs if i.source not in linears and made.issuperset(i.linears)}
    return frozenset(made | {norm for norm in norms if norm is not None})


def _check_statistics(problem: LayerProblem) -> None:
    for layer_input in problem.inputs:
        readers = problem.quantized(layer_input)
        if readers:
            reader = problem.prefix + next(iter(readers))
            _check_input(problem, layer_input.name, f"which {reader} reads", layer_input.channels)


def _check_input(problem: LayerProblem, name: str, purpose: str, channels: int | None = None) -> InputStatistics:
    statistics = problem.statistics.get(name)
    where = f"layer {problem.layer}: input {name}, {purpose}"
    if statistics is None:
        raise LayerError(f"{where}: no statistics were taken; they must be observed before the layer is solved")
    if statistics.num_tokens <= 0:
        raise LayerError(f"{where}: no calibration token reached it; raise calibration.num_samples")
    if channels is not None and statistics.channels != channels:
        raise LayerError(f"{where}: statistics of {statistics.channels} channels for {channels} input channels")
    for field in ("minimum", "maximum", "sum_abs", "sum_squares", "gram", "weighted_squares", "blended_gram"):
        values = getattr(statistics, field)
        if values is None:
            continue
        # |G_ij| <= sqrt(G_ii G_jj): a finite diagonal vouches for the rest of a Gram matrix.
        finite = np.isfinite(np.diagonal(values) if values.ndim == 2 else values)
        if not finite.all():
            raise LayerError(
                f"{where}: {field} is not finite in {int((~finite).sum())} of {finite.size} channels, the first "
                f"being {int(np.argmin(finite))}; the activation overflowed or a weight is damaged"
            )
    return statistics


def _solve_group(
    problem: LayerProblem, layer_input: LayerInput, folded: FoldedTensors, rescaling: Rescaling, threads: Threads
) -> list[tuple[str, QuantizedLinear, LinearSummary]]:
    """Solves the quantised linears that read one input, several small ones at a time where there are threads.

    A large one is worked on alone, by all threads: two would take twice the memory and end no sooner.
    """
    policies = problem.quantized(layer_input)
    if not policies:
        return []
    statistics = problem.statistics[layer_input.name]
    ranges = input_ranges(policies, statistics, rescaling, folded, problem.scale_dtype)
    objective: Objective | None = None
    if any(method.statistics(p).gram for p in policies.values() for method in p.weight_methods):
        objective = rescaling.objective(statistics)

    def solve(item: tuple[str, QuantPolicy]) -> tuple[str, QuantizedLinear, LinearSummary]:
        name, policy = item
        seen = ranges.get(name)
        try:
            solved, row = _solve_linear(problem, name, policy, statistics, folded, rescaling, seen, objective, threads)
        except UserError as error:
            raise type(error)(f"{problem.prefix}{name}: {error}") from error
        if layer_input.routed:
            row = replace(row, num_given=statistics.num_tokens - statistics.num_borrowed)
        return name, solved, row

    large = {name: policy for name, policy in policies.items() if is_large(*folded.shape(name))}
    small = {name: policy for name, policy in policies.items() if name not in large}
    return [*map(solve, large.items()), *threads.map(solve, small.items())]


def _solve_linear(
    problem: LayerProblem,
    name: str,
    policy: QuantPolicy,
    statistics: InputStatistics,
    folded: FoldedTensors,
    rescaling: Rescaling,
    input_range: ActivationRange | None,
    objective: Objective | None,
    threads: Threads,
) -> tuple[QuantizedLinear, LinearSummary]:
    weight = folded.whole_weight(name, threads)
    solved, notes = round_weight(weight, policy, objective, problem.scale_dtype, threads=threads)
    if not (np.isfinite(solved.scale).all() and (solved.scale > 0).all()):
        raise LayerError(f"layer {problem.layer}: {problem.prefix}{name}: a weight scale is not finite and positive")
    bias, restored = folded.bias(name), None
    if rescaling.means is not None:  # only then is the rounded weight wanted whole
        restored = affine.dequantize(solved.codes, solved.scale, solved.zero_point, solved.group_index)
    solved = replace(
        solved,
        bias=bias if restored is None else rescaling.bias_of(restored, weight, bias),
        input_scale=input_range.scale if input_range else None,
        input_zero_point=input_range.zero_point if input_range else None,
        smooth_scale=rescaling.scale if rescaling.explicit else None,
        smooth_shift=rescaling.shift if rescaling.explicit else None,
    )
    figures = linear_figures(weight, bias, solved, statistics, rescaling, input_range, threads=threads)
    rounding = rescaling.rounding(policy, statistics, input_range)
    energy, error = figures.energy, figures.error
    if restored is not None:
        error = rescaling.left_of(error, rescaling.taken_out(restored - weight))
    unknown = is_dead(statistics)  # a share of nothing
    row = LinearSummary(
        layer=problem.layer,
        name=problem.prefix + name,
        strategy=strategy(policy),
        relative_error=None if unknown else _ratio(error, energy),
        error_source="none" if unknown else plain_objective(statistics).source,
        activation_error=None
        if unknown or rounding is None
        else _ratio(output_error.activation_term(figures.columns, rounding), energy),
        scale_min=float(solved.stored_scale.min()),
        scale_max=float(solved.stored_scale.max()),
        num_tokens=statistics.num_tokens,
        token_error=None if figures.tokens is None else figures.tokens.median,
        **input_figures(statistics),
        notes=(
            *rescaling.notes,
            *notes,
            *overflow_notes(statistics, problem.scale_dtype),
            *dead_input_notes(statistics, solved),
            *lost_channels_notes(statistics, rescaling, solved),
            *_coverage_notes(statistics),
        ),
    )
    return solved, row


def _coverage_notes(statistics: InputStatistics) -> tuple[str, ...]:
    """Of an expert that too few tokens reached."""
    if not statistics.num_borrowed:
        return ()
    given = statistics.num_tokens - statistics.num_borrowed
    return (
        f"{given} tokens reached this expert, and {statistics.num_borrowed} others that came closest stand in: "
        "raise calibration.num_samples, or give data that reach it",
    )


def _ratio(error: float, energy: float) -> float:
    """Share of the output; a linear whose output is zero throughout and stays so has no error."""
    return 0.0 if error <= 0 else error / max(energy, float(np.finfo(np.float32).tiny))


def _untouched_row(problem: LayerProblem, name: str) -> LinearSummary:
    readers = [i.name for i in problem.inputs if name in i.linears or name in i.followers]
    seen = problem.statistics.get(readers[0]) if readers else None
    return LinearSummary(
        layer=problem.layer,
        name=problem.prefix + name,
        strategy="NA",
        relative_error=None,
        error_source="none",
        scale_min=None,
        scale_max=None,
        num_tokens=seen.num_tokens if seen else 0,
        notes=overflow_notes(seen, problem.scale_dtype) if seen and seen.num_tokens else (),
        **(input_figures(seen) if seen and seen.num_tokens else InputFigures()),
    )


def _solve_cache(
    problem: LayerProblem, rescalings: Mapping[str, Rescaling]
) -> tuple[QuantizedKVCache | None, tuple[LinearSummary, ...]]:
    """Scales of keys and values, where the policies of `k_proj` and `v_proj` ask for an int8 cache."""
    owners = {n: p for n, p in problem.policies.items() if n.rpartition(".")[2] in ("k_proj", "v_proj")}
    settings = {
        (p.kvcache_quant_dtype, p.kvcache_quant_granularity) if p and p.kvcache_quant_dtype else None
        for p in owners.values()
    }
    if len(settings) > 1:
        raise UserError(
            f"{' and '.join(problem.prefix + n for n in owners)} differ in kvcache_quant_dtype or "
            "kvcache_quant_granularity, and keys and values share one cache: give both the same policy"
        )
    asked = next(iter(settings), None)
    if asked is None:
        return None, ()
    attention = problem.prefix + next(iter(owners)).rpartition(".")[0]
    row = LinearSummary(
        layer=problem.layer,
        name=f"{attention}.kv_cache",
        strategy=f"C8-{asked[1].replace('_', '')}",
        relative_error=None,
        error_source="none",
        scale_min=None,
        scale_max=None,
        num_tokens=0,
    )
    if asked[1] == "per_token":
        return QuantizedKVCache(key_scale=None, value_scale=None), (row,)
    key = _check_input(problem, "key", "which the KV cache holds")
    value = _check_input(problem, "value", "which the KV cache holds")
    for layer_input in problem.inputs:
        if layer_input.source in owners:
            value = rescalings[layer_input.name].of_source(value, layer_input)
    scales = [kv_cache.cache_scale(s, scale_dtype=problem.scale_dtype) for s in (key, value)]
    row = replace(row, num_tokens=key.num_tokens, **_cache_figures(problem, scales, key, value))
    return QuantizedKVCache(key_scale=scales[0], value_scale=scales[1]), (row,)


def _cache_figures(
    problem: LayerProblem, scales: Sequence[Float32], key: InputStatistics, value: InputStatistics
) -> dict[str, Any]:
    """Error, scales and notes of a cache's row, of the dialect that stores it most coarsely."""

    def error(stored: Sequence[Float32]) -> float:
        return max(kv_cache.cache_relative_error(seen, s) for seen, s in zip((key, value), stored, strict=True))

    coarse = [dialect.name for dialect in problem.dialects if dialect.one_cache_scale]
    stored = [np.full_like(scale, scale.max()) for scale in scales] if coarse else scales
    notes: tuple[str, ...] = ()
    if coarse:
        notes = (f"{', '.join(coarse)}: one scale for all channels",)
        if len(coarse) < len(problem.dialects):
            notes = (f"{notes[0]}; with a scale for each, as in the other formats, the error is {error(scales):.3g}",)
    return {
        "relative_error": error(stored),
        "error_source": "diagonal",
        "scale_min": float(min(s.min() for s in stored)),
        "scale_max": float(max(s.max() for s in stored)),
        "notes": notes,
    }
