"""Weight clipping: a smaller range per output channel and group where that lessens the output error.

Lin et al. (AWQ, 2024) as in golden-stick `LinearClipper`: every ratio of a list shrinks the range
of each group by itself, and the one with the least error of the group's partial product wins. Over all
calibration tokens that error is d G_gg dT, with the group's diagonal block of the second moments: no token
needs to be sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.numbers.groups import num_groups
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import Float32
from gs_dist.solvers.objective import Objective
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = ["ClipResult", "clip_weight"]

# Times the least error so far, beyond which narrower ranges are not tried. Rounding costs less in a narrower range, and
# less than the least error soon; the rest is what was cut off, which doubles within a step or two.
_HOPELESS = 1.5
# Weights of a range from which its error follows the ratio smoothly; that of a small one goes up and down.
_SMOOTH = 1024

# Weights of a tile of rows, 4 MiB: three such arrays are live.
_TILE_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ClipResult:
    """`ratio` (out, groups) float32 of each range kept.

    Round the weight itself with `clip_ratio=ratio` rather than a clipped one: a weight cut to -absmax lies
    half way between two codes of a symmetric range. The losses are sums of d G_gg dT over output channels
    and groups, before with the whole range.
    """

    ratio: Float32
    loss_before: float
    loss_after: float


def clip_weight(
    weight: Float32, objective: Objective, policy: QuantPolicy, *, scale_dtype: str, threads: Threads = ONE_THREAD
) -> ClipResult:
    """Chooses each range's ratio from `algo_args.weight_clip_ratio`, the largest of equals.

    A list is searched, together with the whole range where the list leaves it out; a float is used as it is. The search
    of a row goes from wide to narrow, and of ranges of many weights ends where it loses too much: what a range cuts off
    only grows.

    Args:
        weight: (out, in) float32.
        objective: of the input; groups count as if they were not correlated.
        policy: number format, group_size, weight_symmetric, algo_args.
        scale_dtype: dtype the scale will be stored in.
        threads: take a tile of rows at a time.

    Raises:
        UserError: the input channels do not divide into groups.
    """
    count, columns = weight.shape
    groups = num_groups(columns, policy.group_size)
    size = columns // groups
    given, ratios = policy.algo_args.weight_clip_ratio, sorted(policy.clip_ratios, reverse=True)
    kept = np.empty((count, groups), dtype=np.float32)
    step = max(1, _TILE_ELEMENTS // columns)

    def choose(start: int) -> tuple[float, float]:
        rows = slice(start, min(start + step, count))
        tile = np.asarray(weight[rows], dtype=np.float32).reshape(-1, groups, size).transpose(1, 0, 2)
        tile = np.ascontiguousarray(tile)  # (groups, rows, size)
        low, high = np.minimum(tile.min(axis=2), 0.0), np.maximum(tile.max(axis=2), 0.0)
        if policy.weight_symmetric:
            high = np.maximum(-low, high)
            low = -high
        whole = _block_errors(tile, objective, low, high, policy, scale_dtype)
        least, best = np.full(whole.shape, np.inf), np.ones(whole.shape, dtype=np.float32)
        if not isinstance(given, float) or given == 1.0:
            least[...] = whole
        searched = np.arange(whole.shape[1])
        for ratio in (ratio for ratio in ratios if ratio != 1.0):
            single = np.float32(ratio)
            part = tile if len(searched) == tile.shape[1] else tile[:, searched]
            narrowed = low[:, searched] * single, high[:, searched] * single
            errors = _block_errors(part, objective, *narrowed, policy, scale_dtype)
            before = least[:, searched]
            better = errors < before
            least[:, searched] = np.where(better, errors, before)
            best[:, searched] = np.where(better, single, best[:, searched])
            if size >= _SMOOTH:
                searched = searched[(errors <= _HOPELESS * least[:, searched]).any(axis=0)]
            if not len(searched):
                break
        kept[rows] = best.T
        return float(whole.sum()), float(least.sum())

    before = after = 0.0
    for whole_loss, least_loss in threads.map(choose, range(0, count, step)):
        before += whole_loss
        after += least_loss
    return ClipResult(ratio=kept, loss_before=before, loss_after=after)


def _block_errors(
    tile: Float32,
    objective: Objective,
    low: npt.NDArray[np.floating[Any]],
    high: npt.NDArray[np.floating[Any]],
    policy: QuantPolicy,
    scale_dtype: str,
) -> npt.NDArray[np.float64]:
    """Errors d G_gg dT of rounding within [low, high]: (groups, rows) float64."""
    form = policy.weight_format
    scale, zero = form.range_parameters(low, high, symmetric=policy.weight_symmetric, scale_dtype=scale_dtype)
    change = tile / scale[:, :, None]
    if zero is None:
        form.snap(change)
    else:
        offset = zero.astype(np.float32)[:, :, None]
        change += offset
        form.snap(change)
        change -= offset
    change *= scale[:, :, None]
    change -= tile
    return objective.group_errors(change, tile.shape[2])
