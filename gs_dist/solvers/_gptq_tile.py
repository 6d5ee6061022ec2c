"""The inner part of GPTQ: rows of a weight, transposed, rounded channel by channel with known factors.

Channels stand at places, the last place is worked on first; `gptq` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from gs_dist.numbers.number_format import NumberFormat
from gs_dist.results.quantized import Float32, Int8

__all__ = ["Damping", "Panel", "Ranges", "Tile", "cut_panels", "panel_width"]

Float = npt.NDArray[np.floating[Any]]

# Channels between two matrix products within a panel; below, a channel is brought up to date by itself.
_SUB_PANEL = 32
# Rows times ratios rounded at the same time: vectors of 16 KiB.
_WIDTH = 4096


@dataclass(frozen=True, kw_only=True)
class Damping:
    """What was added to the diagonal, by place: `percent` of the mean of the live channels."""

    percent: float
    added: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """How scales are found; `group_size` 0 where they are known before the first channel is rounded."""

    form: NumberFormat
    symmetric: bool
    scale_dtype: str
    group_size: int
    ratios: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Places [start, stop) worked on together, and the inverse of their block of the factor."""

    start: int
    stop: int
    inverse: Float32


def panel_width(block_size: int, group_size: int, columns: int) -> int:
    """`block_size`, enlarged to hold whole groups where those take their scale on the way."""
    width = min(block_size, columns)
    return -(-width // group_size) * group_size if group_size else width


def cut_panels(factor: Float32, width: int) -> list[Panel]:
    """Panels in the order they are worked on: from the last place to the first."""
    panels = []
    for stop in range(len(factor), 0, -width):
        start = max(stop - width, 0)
        block = np.tril(factor[start:stop, start:stop]).astype(np.float64)
        inverse, _ = lapack.dtrtri(block, lower=True)
        panels.append(Panel(start=start, stop=stop, inverse=np.ascontiguousarray(inverse, dtype=np.float32)))
    return panels


@dataclass(kw_only=True)
class Tile:
    """Some rows of the weight, transposed, a channel a row at its place; scale and zero are (groups, rows).

    While `solve` runs, `weight` holds W - Q(W) at the places already worked on.
    """

    weight: Float32
    scale: Float32
    zero: Float32 | None
    clip_ratio: Float | None

    def __post_init__(self) -> None:
        self.codes: Int8 = np.empty(self.weight.shape, dtype=np.int8)

    def damped(self, damping: Damping) -> float:
        """What the damping alone added to the loss, once solved."""
        squares = np.einsum("ij,ij->i", self.weight, self.weight).astype(np.float64)
        return float(squares @ damping.added)

    def solve(
        self, factor: Float32, panels: Sequence[Panel], ranges: Ranges, column_group: npt.NDArray[np.intp]
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
                        current[inner], inverse, self.scale[column_group[outer]], zero, ranges.form
                    )
                codes, values, errors = rounded
                self.codes[outer] = codes
                self.weight[outer] -= values
                loss += float(np.einsum("ij,ij->i", errors, errors).sum(dtype=np.float64))
                if low > start:
                    current[: low - start] -= panel.inverse[inner, : low - start].T @ errors
        return loss

    def _round_group(
        self, current: Float32, inverse: Float32, ranges: Ranges, group: int
    ) -> tuple[Float32, Float32, Float32]:
        """Finds the group's scale in what its weights have become, and rounds them.

        Several ratios are tried at once, side by side, as if each were more rows.
        """
        channels, rows = current.shape
        low, high = current.min(axis=0), current.max(axis=0)
        if self.clip_ratio is not None:
            low, high = low * self.clip_ratio[group], high * self.clip_ratio[group]
        best = (np.empty_like(current), np.empty_like(current), np.empty_like(current))
        least = np.full(rows, np.inf, dtype=np.float32)
        together = max(1, _WIDTH // rows)
        for start in range(0, len(ranges.ratios), together):
            ratios = np.array(ranges.ratios[start : start + together], dtype=np.float32)[:, None]
            scale, zero = ranges.form.range_parameters(
                low * ratios, high * ratios, symmetric=ranges.symmetric, scale_dtype=ranges.scale_dtype
            )
            offset = None if zero is None else zero.astype(np.float32)
            shape = (channels, ratios.size * rows)
            tried = _round_channels(
                np.tile(current, (1, ratios.size)),
                inverse,
                np.broadcast_to(scale.ravel(), shape),
                None if offset is None else np.broadcast_to(offset.ravel(), shape),
                ranges.form,
            )
            costs = np.einsum("ij,ij->j", tried[2], tried[2]).reshape(ratios.size, rows)
            chosen = costs.argmin(axis=0)
            everywhere = np.arange(rows)
            if start == 0:
                better = everywhere
                for kept, new in zip(best, tried, strict=True):
                    np.take(new, chosen * rows + everywhere, axis=1, out=kept, mode="clip")
            else:
                better = np.nonzero(costs[chosen, everywhere] < least)[0]
                for kept, new in zip(best, tried, strict=True):
                    kept[:, better] = np.take(new, chosen[better] * rows + better, axis=1)
            picked = chosen[better]
            least[better] = costs[picked, better]
            self.scale[group, better] = scale[picked, better]
            if self.zero is not None and offset is not None:
                self.zero[group, better] = offset[picked, better]
        return best


def _segments(start: int, stop: int, group_size: int, columns: int) -> Iterator[tuple[int, int]]:
    """The panel's groups, last first; the whole panel where scales are known beforehand."""
    if not group_size:
        yield start, stop
        return
    for high in range(stop, start, -group_size):
        yield max(high - group_size, start), high


def _round_channels(
    current: Float32, inverse: Float32, scale: Float32, zero: Float32 | None, form: NumberFormat
) -> tuple[Float32, Float32, Float32]:
    """Rounds the channels (rows) of `current`, last first; the paper's inner loop.

    Args:
        current: (channels, rows), holding all errors made outside; unchanged.
        inverse: (channels, channels) lower, inverse of the factor's block.
        scale: (channels, rows).
        zero: likewise, or None.
        form: of the codes.

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
            form.snap(code)
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
