"""Coordinate descent on codes: channel by channel, the one that leaves the least output error beside all others.

With D = Q(W) - W and the Gram matrix G, the loss tr(D G DT) is quadratic in the values of one channel j, and least at
q_j - (D G)_j / G_jj; the nearest code to that is the best there is, since rows do not meet (COMQ, Zhang et al. 2024,
section 3; CDQuant, Nair & Suggala 2024, calls the order cyclic). Blocks of channels take (D G) from one matrix product,
and keep it up to date among themselves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.methods.coordinate_descent import BLOCK, TILE_ROWS
from gs_dist.numbers.number_format import NumberFormat
from gs_dist.results.quantized import Float32, Int8
from gs_dist.solvers import gptq
from gs_dist.solvers.affine import dequantize
from gs_dist.solvers.threads import ONE_THREAD, Threads
from gs_dist.solvers.weight_task import Rounded, WeightTask

__all__ = ["descend", "round_weight"]


def round_weight(task: WeightTask, objective: Float32, ratio: Float32 | None) -> Rounded:
    """GPTQ, and its codes bettered; see `gptq.round_weight`."""
    solved, notes = gptq.round_weight(task, objective, ratio)
    codes = descend(
        task.weight,
        solved.codes,
        solved.scale,
        solved.zero_point,
        solved.group_index,
        objective,
        form=task.policy.weight_format,
        sweeps=task.policy.algo_args.sweeps,
        threads=task.threads,
    )
    return replace(solved, codes=codes), notes


def descend(
    weight: Float32,
    codes: Int8,
    scale: Float32,
    zero_point: Int8 | None,
    group_index: npt.NDArray[np.int32] | None,
    gram: Float32,
    *,
    form: NumberFormat,
    sweeps: int,
    threads: Threads = ONE_THREAD,
) -> Int8:
    """Better codes for the same scales.

    Args:
        weight: (out, in) float32.
        codes: (out, in) to start from; not changed.
        scale: (out, groups) float32.
        zero_point: (out, groups), or None.
        group_index: (in,) group of each channel, None where groups are neighbours.
        gram: (in, in) float32, symmetric, the objective.
        form: of the codes.
        sweeps: over all channels, at most.
        threads: take a tile of rows at a time.

    Returns:
        (out, in) int8; the loss is at most that of `codes`, up to rounding in float32.
    """
    columns = codes.shape[1]
    index = np.arange(columns) * scale.shape[1] // columns if group_index is None else group_index
    found = codes.copy()

    def improve(start: int) -> None:
        rows = slice(start, start + TILE_ROWS)
        zero = None if zero_point is None else zero_point[rows]
        change = dequantize(found[rows], scale[rows], zero, group_index)
        change -= weight[rows]
        tile = _Tile(found[rows], change, scale[rows], zero, index)
        for _ in range(sweeps):
            if not tile.sweep(gram, form):
                break

    threads.map(improve, range(0, len(codes), TILE_ROWS))
    return found


class _Tile:
    """Some rows: their codes, changed in place, and the change of the weight that these stand for."""

    def __init__(
        self, codes: Int8, change: Float32, scale: Float32, zero: Int8 | None, index: npt.NDArray[np.integer[Any]]
    ) -> None:
        self._codes, self._change, self._scale, self._zero, self._index = codes, change, scale, zero, index

    def sweep(self, gram: Float32, form: NumberFormat) -> bool:
        """Visits every channel that was ever active; whether a code changed."""
        changed = False
        for start in range(0, len(gram), BLOCK):
            block = slice(start, min(start + BLOCK, len(gram)))
            slope = (self._change @ gram[:, block]).T.copy()  # (channels, rows): a channel is a row
            within = np.ascontiguousarray(gram[block, block])
            for place, channel in enumerate(range(block.start, block.stop)):
                if within[place, place] > 0:
                    step = self._visit(channel, slope[place] / within[place, place], form)
                    if step is not None:
                        slope[place + 1 :] += within[place, place + 1 :, None] * step
                        changed = True
        return changed

    def _visit(self, channel: int, excess: Float32, form: NumberFormat) -> Float32 | None:
        """Gives a channel its best codes; by how much values changed (rows,), None for not at all."""
        scale = self._scale[:, self._index[channel]]
        before = self._codes[:, channel].astype(np.float32)
        code = before - excess / scale
        form.snap(code)
        difference = code - before
        if not difference.any():
            return None
        step = np.asarray(difference * scale, dtype=np.float32)
        self._codes[:, channel] = code
        self._change[:, channel] += step
        return step
