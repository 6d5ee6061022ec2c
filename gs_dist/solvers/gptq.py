"""GPTQ: weights are rounded one input channel at a time, later channels make up for the error so far.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(2023), algorithm 1, minimises tr(D H DT) for D = W - Q(W) and the damped Gram matrix H. Two things are
done otherwise, both without changing the result in exact arithmetic:

* With the channels stored last first, H = L LT needs no inverse: what the rounded channels A ask of the
  channels P still to come is W_P + D_A L_AP L_PP^-1 (Babai's nearest plane). One Cholesky factorisation
  replaces the paper's factorise, invert, factorise.
* Rows of the weight do not meet, so tiles of them are worked on one after the other, transposed. A panel
  of channels receives all earlier errors in one matrix product, and no channel is touched again.

Groups take their scale from weights that hold every earlier error, whatever the block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.methods.gptq import TILE_ROWS
from gs_dist.numbers.groups import num_groups
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import Float32, Int8, QuantizedLinear
from gs_dist.solvers._gptq_tile import Damping, Ranges, Tile, cut_panels, panel_width
from gs_dist.solvers.affine import dequantize, quantize_weight
from gs_dist.solvers.cholesky import lower_factor
from gs_dist.solvers.objective import GramObjective
from gs_dist.solvers.threads import ONE_THREAD, Threads
from gs_dist.solvers.weight_task import Rounded, WeightTask

__all__ = ["GPTQResult", "quantize", "round_weight"]

Float = npt.NDArray[np.floating[Any]]

# Channels transposed at a time.
_STRIP = 64
# Damping, as a share of the mean diagonal, tried after a failed factorisation: at least 1 %, tenfold each time.
_FIRST_RETRY, _LARGEST_DAMPING = 0.01, 1.0


@dataclass(frozen=True, kw_only=True)
class GPTQResult:
    """Codes (out, in) int8, scale (out, groups) float32, zero point (out, groups) int8 or None.

    `group_index` (in,) int32 names each channel's group where groups follow activation order (`desc_act`
    without `static_groups`). `loss` is tr(D G DT) for the Gram matrix given, without damping.
    `damp_percent_used` is None where plain rounding took over; `notes` says why, and of retries.
    """

    codes: Int8
    scale: Float32
    zero_point: Int8 | None
    group_index: npt.NDArray[np.int32] | None
    loss: float
    damp_percent_used: float | None
    notes: tuple[str, ...]


def quantize(
    weight: Float32,
    gram: Float32,
    policy: QuantPolicy,
    *,
    scale_dtype: str,
    clip_ratio: Float | None = None,
    search_ratios: Sequence[float] = (1.0,),
    threads: Threads = ONE_THREAD,
) -> GPTQResult:
    """Rounds a weight so that its output, not each weight, comes out near.

    Args:
        weight: (out, in) float32.
        gram: (in, in) float32, sum of x xT over the calibration tokens, weighted or not.
        policy: number format, group_size, weight_symmetric and algo_args (`block_size`, `desc_act`,
            `static_groups`, `damp_percent`). `block_size` shifts speed and memory, not the result.
        scale_dtype: dtype the scale will be stored in.
        clip_ratio: (out, groups), shrinks ranges. Only for groups of neighbouring channels.
        search_ratios: candidates that shrink a group's range; each group takes, row by row, the one whose
            rounding by GPTQ adds least to the loss. With `static_groups` the scales are found in a first
            pass in natural order and hold for a second in activation order (`desc_act`). Scales per
            channel are not searched: pass the `clip_ratio` that `clip.clip_weight` finds.
        threads: take a tile of rows at a time, and of the factorisation.

    Raises:
        UserError: the input channels do not divide into groups.
        ValueError: `clip_ratio` with groups in activation order.
    """
    args, ratios = policy.algo_args, tuple(search_ratios)
    groups = num_groups(weight.shape[1], policy.group_size)
    on_the_way = policy.group_size > 0 and (not args.static_groups or ratios != (1.0,))
    reordered = args.desc_act and not args.static_groups
    scattered = reordered and groups > 1
    if clip_ratio is not None and scattered:
        raise ValueError("clip ratios belong to groups of neighbouring channels: set static_groups: true with desc_act")
    task = _Task(weight=weight, gram=gram, policy=policy, scale_dtype=scale_dtype, threads=threads)
    diagonal = np.diagonal(gram)
    natural = np.arange(len(gram))
    descending = np.argsort(-diagonal, kind="stable") if args.desc_act else natural
    if on_the_way:
        first = _solve(task, descending if reordered else natural, clip_ratio=clip_ratio, ratios=ratios)
        if not (args.static_groups and args.desc_act) or first.damp_percent_used is None:
            return first
        # A channel's share of the loss grows with its energy times its squared step: the larger goes first.
        steps = np.square(first.scale, dtype=np.float64).mean(axis=0)
        weighted = diagonal * np.repeat(steps, len(gram) // groups)
        return _solve(task, np.argsort(-weighted, kind="stable"), known=(first.scale, first.zero_point))
    _, scale, zero_point = task.plain(clip_ratio)
    return _solve(task, descending, known=(scale, zero_point), clip_ratio=clip_ratio)


def round_weight(task: WeightTask, objective: Float32, ratio: Float32 | None) -> Rounded:
    """GPTQ as a policy asks for it; `ratio` (out, groups) shrinks ranges that are not searched on the way."""
    policy = task.policy
    result = quantize(
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


@dataclass(frozen=True, kw_only=True)
class _Task:
    """The arguments of `quantize` that every pass over the weight shares."""

    weight: Float32
    gram: Float32
    policy: QuantPolicy
    scale_dtype: str
    threads: Threads

    def plain(self, clip_ratio: Float | None) -> tuple[Int8, Float32, Int8 | None]:
        """Codes, scales and zero points of rounding to nearest."""
        return quantize_weight(
            self.weight,
            form=self.policy.weight_format,
            group_size=self.policy.group_size,
            symmetric=self.policy.weight_symmetric,
            scale_dtype=self.scale_dtype,
            clip_ratio=clip_ratio,
            threads=self.threads,
        )


def _solve(
    task: _Task,
    order: npt.NDArray[np.intp],
    *,
    known: tuple[Float32, Int8 | None] | None = None,
    clip_ratio: Float | None = None,
    ratios: tuple[float, ...] = (1.0,),
) -> GPTQResult:
    """One pass over the channels in `order`, with known scales and zero points, or finding them on the way."""
    weight, policy = task.weight, task.policy
    rows, columns = weight.shape
    groups = num_groups(columns, policy.group_size)
    size = columns // groups
    position = order[::-1]  # channel stored at each place; the last place is worked on first
    place = np.empty_like(position)
    place[position] = np.arange(columns)
    notes: list[str] = []
    factor, damping = _factorize(task.gram, position, policy.algo_args.damp_percent, notes, task.threads)
    if factor is None:
        return _rounded_to_nearest(task, clip_ratio, notes)
    ranges = Ranges(
        form=policy.weight_format,
        symmetric=policy.weight_symmetric,
        scale_dtype=task.scale_dtype,
        group_size=0 if known else size,
        ratios=ratios,
    )
    panels = cut_panels(factor, panel_width(policy.algo_args.block_size, ranges.group_size, columns))
    column_group = (position if known else np.arange(columns)[::-1]) // size
    codes = np.empty(weight.shape, dtype=np.int8)
    if known:
        scale, zero_point = known[0].copy(), known[1]
    else:
        scale = np.empty((rows, groups), dtype=np.float32)
        zero_point = None if policy.weight_symmetric else np.empty((rows, groups), dtype=np.int8)

    def solve(start: int) -> float:
        part = slice(start, start + TILE_ROWS)
        tile = Tile(
            weight=_at_places(weight[part], place),
            scale=np.ascontiguousarray(scale[part].T),
            zero=None if zero_point is None else np.ascontiguousarray(zero_point[part].T, dtype=np.float32),
            clip_ratio=None if clip_ratio is None else np.ascontiguousarray(clip_ratio[part].T),
        )
        loss = tile.solve(factor, panels, ranges, column_group) - tile.damped(damping)
        codes[part] = tile.codes[place].T
        if not known:
            scale[part] = tile.scale.T
            if zero_point is not None and tile.zero is not None:
                zero_point[part] = tile.zero.T
        return loss

    loss = 0.0
    for part_loss in task.threads.map(solve, range(0, rows, TILE_ROWS)):
        loss += part_loss  # not by sum(), which compensates from Python 3.12 on
    index = None
    if not known and groups > 1 and not np.array_equal(order, np.arange(columns)):
        index = np.empty(columns, dtype=np.int32)
        index[order] = np.arange(columns) // size
    return GPTQResult(
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        group_index=index,
        loss=max(loss, 0.0),
        damp_percent_used=damping.percent,
        notes=tuple(notes),
    )


def _at_places(rows: Float32, place: npt.NDArray[np.intp]) -> Float32:
    """Some rows of the weight transposed, each channel at its place; in strips, which the cache likes better."""
    tile = np.empty((rows.shape[1], rows.shape[0]), dtype=np.float32)
    for start in range(0, len(tile), _STRIP):
        strip = slice(start, start + _STRIP)
        tile[place[strip]] = rows[:, strip].copy().T
    return tile


def _factorize(
    gram: Float32, position: npt.NDArray[np.intp], percent: float, notes: list[str], threads: Threads
) -> tuple[Float32 | None, Damping]:
    """Lower L with L LT = G (rows and columns at their places) + damping; None where none can be had.

    The upper triangle of the result holds anything.
    """
    diagonal = np.diagonal(gram)[position].astype(np.float64)
    dead = ~(diagonal > 0)
    mean = float(diagonal[~dead].mean()) if not dead.all() else 0.0
    added = np.full(len(position), percent * mean)
    if not (mean > 0 and np.isfinite(mean)):
        reason = "no input channel was ever active" if dead.all() else "the Gram matrix is not finite"
        notes.append(f"GPTQ gave way to plain rounding: {reason}")
        return None, Damping(percent=percent, added=added)
    if dead.any():
        notes.append(f"{int(dead.sum())} input channels were never active: rounded to nearest")
    while True:
        added = np.where(dead, mean, percent * mean)
        damped = (diagonal * ~dead + added).astype(np.float32)

        def block(rows: slice, columns: slice, damped: Float32 = damped) -> Float32:
            entries = np.asarray(gram[np.ix_(position[rows], position[columns])], dtype=np.float32)
            if rows.start == columns.start:
                np.fill_diagonal(entries, damped[columns])
            return entries

        factor = lower_factor(block, len(position), threads)
        if factor is not None:
            return factor, Damping(percent=percent, added=added)
        if percent >= _LARGEST_DAMPING:
            notes.append(f"GPTQ gave way to plain rounding: no factorisation even with damp_percent {percent:g}")
            return None, Damping(percent=percent, added=added)
        wider = min(max(10 * percent, _FIRST_RETRY), _LARGEST_DAMPING)
        notes.append(f"factorisation failed with damp_percent {percent:g}: tried again with {wider:g}")
        percent = wider


def _rounded_to_nearest(task: _Task, clip_ratio: Float | None, notes: Sequence[str]) -> GPTQResult:
    codes, scale, zero_point = task.plain(clip_ratio)
    with np.errstate(invalid="ignore"):  # a Gram matrix that is not finite gives a loss of NaN, and a note says so
        loss = GramObjective(task.gram).error(dequantize(codes, scale, zero_point) - task.weight)
    return GPTQResult(
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        group_index=None,
        loss=loss,
        damp_percent_used=None,
        notes=tuple(notes),
    )
