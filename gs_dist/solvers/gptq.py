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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from gs_dist.policy import QuantPolicy
from gs_dist.quantized import Float32, Int8
from gs_dist.solvers.affine import (
    code_range,
    dequantise,
    num_groups,
    quantise_weight,
    range_parameters,
)
from gs_dist.solvers.objective import output_error

__all__ = ["GPTQResult", "quantise"]

Float = npt.NDArray[np.floating[Any]]

# Rows of a tile: vectors of 8 KiB stay in the first cache, and the tile of a 28672-wide weight takes 235 MB.
_TILE_ROWS = 2048
# Channels between two matrix products within a panel; below, a channel is brought up to date by itself.
_SUB_PANEL = 32
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


def quantise(
    weight: Float32,
    gram: Float32,
    policy: QuantPolicy,
    *,
    scale_dtype: str,
    clip_ratio: Float | None = None,
    search_ratios: Sequence[float] = (1.0,),
) -> GPTQResult:
    """Rounds a weight so that its output, not each weight, comes out near.

    Args:
        weight: (out, in) float32.
        gram: (in, in) float32, sum of x xT over the calibration tokens, weighted or not.
        policy: bits, group_size, weight_symmetric and algo_args (`block_size`, `desc_act`,
            `static_groups`, `damp_percent`). `block_size` shifts speed and memory, not the result.
        scale_dtype: dtype the scale will be stored in.
        clip_ratio: (out, groups), shrinks ranges. Only for groups of neighbouring channels.
        search_ratios: candidates that shrink a group's range; each group takes, row by row, the one whose
            rounding adds least to the loss. For groups that take their scale on the way (neither per
            channel nor `static_groups`); others ignore it.

    Raises:
        UserError: the input channels do not divide into groups.
        ValueError: `clip_ratio` with groups in activation order.
    """
    args = policy.algo_args
    columns = weight.shape[1]
    group_size = policy.group_size
    groups = num_groups(columns, group_size)
    on_the_way = group_size > 0 and not args.static_groups
    if clip_ratio is not None and on_the_way and args.desc_act:
        raise ValueError("clip ratios belong to groups of neighbouring channels: set static_groups: true with desc_act")
    diagonal = np.diagonal(gram)
    dead = ~(diagonal > 0)
    notes: list[str] = []
    if dead.any():
        notes.append(f"{int(dead.sum())} input channels were never active: rounded to nearest")
    order = np.argsort(-diagonal, kind="stable") if args.desc_act else np.arange(columns)
    position = order[::-1]  # channel stored at each place, last worked on first
    factor, damping = _factorise(gram, position, dead[position], args.damp_percent, notes)
    if factor is None:
        return _plain(weight, gram, policy, scale_dtype, clip_ratio, notes)
    ranges = _Ranges(
        bits=policy.weight_bits,
        symmetric=policy.weight_symmetric,
        scale_dtype=scale_dtype,
        group_size=group_size if on_the_way else 0,
        ratios=tuple(search_ratios) if on_the_way else (1.0,),
    )
    panels = _panels(factor, _panel_width(args.block_size, ranges.group_size, columns))
    codes = np.empty(weight.shape, dtype=np.int8)
    zero_point = None if policy.weight_symmetric else np.empty((len(weight), groups), dtype=np.int8)
    if on_the_way:
        scale = np.empty((len(weight), groups), dtype=np.float32)
        column_group = np.arange(columns)[::-1] // group_size
    else:
        _, scale, zero_point = quantise_weight(
            weight,
            bits=ranges.bits,
            group_size=group_size,
            symmetric=ranges.symmetric,
            scale_dtype=scale_dtype,
            clip_ratio=clip_ratio,
        )
        column_group = position // (columns // groups)
    loss = 0.0
    for start in range(0, len(weight), _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        tile = _Tile(
            weight=np.ascontiguousarray(weight[rows].T[position], dtype=np.float32),
            scale=np.ascontiguousarray(scale[rows].T),
            zero=None if zero_point is None else np.ascontiguousarray(zero_point[rows].T, dtype=np.float32),
            clip_ratio=None if clip_ratio is None else np.ascontiguousarray(clip_ratio[rows].T),
        )
        loss += tile.solve(factor, panels, ranges, column_group) - tile.damped(damping)
        codes[rows, position] = tile.codes.T
        scale[rows] = tile.scale.T
        if zero_point is not None and tile.zero is not None:
            zero_point[rows] = tile.zero.T
    index = None
    if on_the_way and args.desc_act:
        index = np.empty(columns, dtype=np.int32)
        index[order] = np.arange(columns) // group_size
    return GPTQResult(
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        group_index=index,
        loss=max(loss, 0.0),
        damp_percent_used=damping.percent,
        notes=tuple(notes),
    )


@dataclass(frozen=True, kw_only=True)
class _Damping:
    """What was added to the diagonal, by place: `percent` of the mean of the live channels."""

    percent: float
    added: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Ranges:
    """How scales are found; `group_size` 0 where they are known before the first channel is rounded."""

    bits: int
    symmetric: bool
    scale_dtype: str
    group_size: int
    ratios: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """Places [start, stop) worked on together, and the inverse of their block of the factor."""

    start: int
    stop: int
    inverse: Float32


def _factorise(
    gram: Float32, position: npt.NDArray[np.intp], dead: npt.NDArray[np.bool_], percent: float, notes: list[str]
) -> tuple[Float32 | None, _Damping]:
    """Lower L with L LT = G (rows and columns at their places) + damping; None where none can be had.

    The upper triangle of the result holds anything.
    """
    diagonal = np.diagonal(gram)[position].astype(np.float64)
    mean = float(diagonal[~dead].mean()) if not dead.all() else 0.0
    added = np.full(len(position), percent * mean)
    if not (mean > 0 and np.isfinite(mean)):
        reason = "no input channel was ever active" if dead.all() else "the Gram matrix is not finite"
        notes.append(f"GPTQ gave way to plain rounding: {reason}")
        return None, _Damping(percent=percent, added=added)
    backwards = bool((position[:-1] > position[1:]).all())
    while True:
        matrix = np.array(
            gram[::-1, ::-1] if backwards else gram[np.ix_(position, position)], dtype=np.float32, order="C"
        )
        added = np.where(dead, mean, percent * mean)
        places = np.arange(len(position))
        matrix[places, places] = (diagonal * ~dead + added).astype(np.float32)
        # The transposed view is Fortran-contiguous: LAPACK works in place, and its upper factor is our lower one.
        upper, failed = lapack.spotrf(matrix.T, lower=False, clean=False, overwrite_a=True)
        factor = np.asarray(upper.T)
        pivots = np.diagonal(factor)
        if not failed and bool(np.isfinite(pivots).all()) and bool((pivots > 0).all()):
            return factor, _Damping(percent=percent, added=added)
        del matrix, upper, factor, pivots
        if percent >= _LARGEST_DAMPING:
            notes.append(f"GPTQ gave way to plain rounding: no factorisation even with damp_percent {percent:g}")
            return None, _Damping(percent=percent, added=added)
        wider = min(max(10 * percent, _FIRST_RETRY), _LARGEST_DAMPING)
        notes.append(f"factorisation failed with damp_percent {percent:g}: tried again with {wider:g}")
        percent = wider


def _plain(
    weight: Float32,
    gram: Float32,
    policy: QuantPolicy,
    scale_dtype: str,
    clip_ratio: Float | None,
    notes: Sequence[str],
) -> GPTQResult:
    codes, scale, zero_point = quantise_weight(
        weight,
        bits=policy.weight_bits,
        group_size=policy.group_size,
        symmetric=policy.weight_symmetric,
        scale_dtype=scale_dtype,
        clip_ratio=clip_ratio,
    )
    with np.errstate(invalid="ignore"):  # a Gram matrix that is not finite gives a loss of NaN, and a note says so
        loss = output_error(dequantise(codes, scale, zero_point) - weight, gram)
    return GPTQResult(
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        group_index=None,
        loss=loss,
        damp_percent_used=None,
        notes=tuple(notes),
    )


def _panel_width(block_size: int, group_size: int, columns: int) -> int:
    """`block_size`, enlarged to hold whole groups where those take their scale on the way."""
    width = min(block_size, columns)
    return -(-width // group_size) * group_size if group_size else width


def _panels(factor: Float32, width: int) -> list[_Panel]:
    """Panels in the order they are worked on: from the last place to the first."""
    panels = []
    for stop in range(len(factor), 0, -width):
        start = max(stop - width, 0)
        block = np.tril(factor[start:stop, start:stop]).astype(np.float64)
        inverse, _ = lapack.dtrtri(block, lower=True)
        panels.append(_Panel(start=start, stop=stop, inverse=np.ascontiguousarray(inverse, dtype=np.float32)))
    return panels


@dataclass(kw_only=True)
class _Tile:
    """Some rows of the weight, transposed, a channel a row at its place; scale and zero are (groups, rows).

    While `solve` runs, `weight` holds W - Q(W) at the places already worked on.
    """

    weight: Float32
    scale: Float32
    zero: Float32 | None
    clip_ratio: Float | None

    def __post_init__(self) -> None:
        self.codes: Int8 = np.empty(self.weight.shape, dtype=np.int8)

    def damped(self, damping: _Damping) -> float:
        """What the damping alone added to the loss, once solved."""
        squares = np.einsum("ij,ij->i", self.weight, self.weight).astype(np.float64)
        return float(squares @ damping.added)

    def solve(
        self, factor: Float32, panels: Sequence[_Panel], ranges: _Ranges, column_group: npt.NDArray[np.intp]
    ) -> float:
        """Rounds all channels, last place first; returns the loss with damping."""
        loss = 0.0
        for panel in panels:
            start, stop = panel.start, panel.stop
            current = self.weight[start:stop].copy()
            if stop < len(factor):
                asked = factor[stop:, start:stop].T @ self.weight[stop:]
                current += panel.inverse.T @ asked
            for low, high in _segments(start, stop, ranges.group_size, len(factor)):
                inner, outer = slice(low - start, high - start), slice(low, high)
                inverse = np.ascontiguousarray(panel.inverse[inner, inner])
                if ranges.group_size:
                    rounded = self._round_group(current[inner], inverse, ranges, int(column_group[low]))
                else:
                    zero = None if self.zero is None else self.zero[column_group[outer]]
                    rounded = _round_channels(
                        current[inner], inverse, self.scale[column_group[outer]], zero, code_range(ranges.bits)
                    )
                codes, values, errors = rounded
                self.codes[outer] = codes
                self.weight[outer] -= values
                loss += float(np.einsum("ij,ij->i", errors, errors).sum(dtype=np.float64))
                if low > start:
                    current[: low - start] -= panel.inverse[inner, : low - start].T @ errors
        return loss

    def _round_group(
        self, current: Float32, inverse: Float32, ranges: _Ranges, group: int
    ) -> tuple[Float32, Float32, Float32]:
        """Finds the group's scale in what its weights have become, and rounds them."""
        low, high = current.min(axis=0), current.max(axis=0)
        if self.clip_ratio is not None:
            low, high = low * self.clip_ratio[group], high * self.clip_ratio[group]
        best: tuple[Float32, Float32, Float32] | None = None
        least: Float32 | None = None
        for ratio in ranges.ratios:
            scale, zero = range_parameters(
                low * ratio,
                high * ratio,
                bits=ranges.bits,
                symmetric=ranges.symmetric,
                scale_dtype=ranges.scale_dtype,
            )
            offset = None if zero is None else zero.astype(np.float32)
            shape = current.shape
            rounded = _round_channels(
                current,
                inverse,
                np.broadcast_to(scale, shape),
                None if offset is None else np.broadcast_to(offset, shape),
                code_range(ranges.bits),
            )
            cost = np.einsum("ij,ij->j", rounded[2], rounded[2])
            if best is None or least is None:
                best, least = rounded, cost
                better = np.ones(len(cost), dtype=np.bool_)
            else:
                better = cost < least
                for kept, new in zip(best, rounded, strict=True):
                    np.copyto(kept, new, where=better)
                np.copyto(least, cost, where=better)
            np.copyto(self.scale[group], scale, where=better)
            if self.zero is not None and offset is not None:
                np.copyto(self.zero[group], offset, where=better)
        assert best is not None  # ratios are never empty
        return best


def _segments(start: int, stop: int, group_size: int, columns: int) -> Iterator[tuple[int, int]]:
    """The panel's groups, last first; the whole panel where scales are known beforehand."""
    if not group_size:
        yield start, stop
        return
    for high in range(stop, start, -group_size):
        yield max(high - group_size, start), high


def _round_channels(
    current: Float32, inverse: Float32, scale: Float32, zero: Float32 | None, code_bounds: tuple[int, int]
) -> tuple[Float32, Float32, Float32]:
    """Rounds the channels (rows) of `current`, last first; the paper's inner loop.

    Args:
        current: (channels, rows), holding all errors made outside; unchanged.
        inverse: (channels, channels) lower, inverse of the factor's block.
        scale: (channels, rows).
        zero: likewise, or None.
        code_bounds: smallest and largest code.

    Returns:
        Codes, dequantised values and errors divided by the pivots, (channels, rows) float32 each.
    """
    channels = len(current)
    pending = current.copy()
    codes, values, errors = np.empty_like(current), np.empty_like(current), np.empty_like(current)
    pivots = np.diagonal(inverse)
    for stop in range(channels, 0, -_SUB_PANEL):
        start = max(stop - _SUB_PANEL, 0)
        for place in range(stop - 1, start - 1, -1):
            wanted = pending[place]
            if place + 1 < stop:
                wanted -= inverse[place + 1 : stop, place] @ errors[place + 1 : stop]
            code, value = codes[place], values[place]
            np.divide(wanted, scale[place], out=code)
            if zero is not None:
                code += zero[place]
            np.rint(code, out=code)
            np.clip(code, code_bounds[0], code_bounds[1], out=code)
            if zero is None:
                np.multiply(code, scale[place], out=value)
            else:
                np.subtract(code, zero[place], out=value)
                value *= scale[place]
            np.subtract(wanted, value, out=errors[place])
            errors[place] /= pivots[place]
        if start:
            pending[:start] -= inverse[start:stop, :start].T @ errors[start:stop]
    return codes, values, errors
