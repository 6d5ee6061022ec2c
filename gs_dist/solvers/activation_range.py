"""The one range of a statically quantised activation, after any rescaling of its channels.

`minmax` covers every value seen. A few massive values then set the step for all others, so `mse` weighs
clipping against rounding: it takes the range for which the expected output error
sum_j |W_:j|^2 sum_t (q(x_tj) - x_tj)^2 is least. Per-channel histograms with logarithmic bins supply the
values' distribution; a channel divided by s shifts along the logarithmic axis, so histograms taken before
the scales were known serve afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from gs_dist.methods.activation_range import RATIOS
from gs_dist.model.statistics import (
    HISTOGRAM_BINS,
    HISTOGRAM_BINS_PER_OCTAVE,
    HISTOGRAM_MIN_EXPONENT,
    InputStatistics,
)
from gs_dist.numbers.integer import INT8

__all__ = [
    "ActivationRange",
    "RangeProfile",
    "Weighting",
    "central_range",
    "channel_rounding",
    "least_error_range",
    "minmax_range",
    "range_profile",
    "shifted_counts",
    "token_weights",
    "typical_energy",
]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

Weighting = Literal["plain", "token", "both"]

# Resolution of the common logarithmic axis: a channel's shift is rounded to 1/64 octave (1.1 %).
_STEPS_PER_OCTAVE = 64


@dataclass(frozen=True, kw_only=True)
class ActivationRange:
    """Scale (rounded to its stored dtype) and zero point of a static activation; None when symmetric.

    `rounding` is the expected output error it causes, None where no histogram was at hand.
    """

    scale: float
    zero_point: int | None
    rounding: float | None = None


def minmax_range(statistics: InputStatistics, *, symmetric: bool, scale_dtype: str) -> ActivationRange:
    """The range of all values seen, extended to include 0.

    Args:
        statistics: of the activation as it is rounded, after rescaling.
        symmetric: absmax/127.5 without zero point, else (max - min)/255.
        scale_dtype: dtype the scale will be stored in.
    """
    return _as_range(float(statistics.minimum.min()), float(statistics.maximum.max()), symmetric, scale_dtype)


def _as_range(low: float, high: float, symmetric: bool, scale_dtype: str) -> ActivationRange:
    scale, zero_point = INT8.range_parameters(low, high, symmetric=symmetric, scale_dtype=scale_dtype)
    return ActivationRange(scale=float(scale), zero_point=None if zero_point is None else int(zero_point))


@dataclass(frozen=True, kw_only=True)
class RangeProfile:
    """Values of all channels on one logarithmic axis, each counted by what an error in it costs.

    Attributes:
        edges: (n + 1,) magnitudes, ascending.
        mass: (2, n) float64; row 0 negative values, row 1 the others.
        low, high: smallest and largest value seen after rescaling.
    """

    edges: Float64
    mass: Float64
    low: float
    high: float

    def error(self, scale: float, zero_point: int | None) -> float:
        """Expected output error of rounding with that scale and zero point, clipping included."""
        zero = zero_point or 0
        total = 0.0
        for mass, steps in ((self.mass[0], 128 + zero), (self.mass[1], 127 - zero)):
            integral = _integrated_error(self.edges, scale, steps)
            total += float(mass @ ((integral[1:] - integral[:-1]) / self._widths))
        return total

    @cached_property
    def _widths(self) -> Float64:
        return np.diff(self.edges)


def _integrated_error(x: Float64, step: float, num_steps: int) -> Float64:
    """Integral from 0 to x of (q(v) - v)^2 dv for a grid 0, step .. num_steps * step."""
    nearest = np.floor(x / step + 0.5)
    np.clip(nearest, 0, num_steps, out=nearest)
    rest = x - nearest * step
    # A product: NumPy raises to the third power by way of logarithms, thirty times as long.
    return np.asarray(nearest * step**3 / 12.0 + rest * rest * rest / 3.0)


def range_profile(
    statistics: InputStatistics,
    scale: Array | None,
    column_weights: Float64,
    *,
    weighting: Weighting = "plain",
    shift: Array | None = None,
) -> RangeProfile:
    """Rebins the histograms of all channels of (x - shift) / scale onto one axis.

    Args:
        statistics: of x, not rescaled, with its histogram.
        scale: (channels,) that x is divided by, or None.
        column_weights: (channels,) cost of an error in each channel of x / scale, |W_:j|^2.
        weighting: "plain" counts every value alike. "token" divides a value's count by 1 + x^2 / E, E a
            typical token's energy: an estimate of the relative error of each token's output. "both" adds
            the two, each as a share of its own energy: a few massive tokens neither decide alone nor
            are given up.
        shift: (channels,) subtracted from x before, or None.

    Raises:
        ValueError: the statistics hold no histogram.
    """
    if statistics.histogram is None:
        raise ValueError("no histogram was taken of this activation: act_range mse needs one")
    channels = statistics.channels
    log_scale = np.zeros(channels) if scale is None else np.log2(np.asarray(scale, dtype=np.float64))
    moves, row = np.unique(np.rint(log_scale * _STEPS_PER_OCTAVE).astype(np.int64), return_inverse=True)
    gather = csr_matrix((column_weights, (row, np.arange(channels))), shape=(len(moves), channels))

    def gathered(histogram: Array) -> Float64:
        counts = np.asarray(gather @ histogram.reshape(channels, 2 * HISTOGRAM_BINS), dtype=np.float64)
        return counts.reshape(len(moves), 2, HISTOGRAM_BINS)

    counts = gathered(statistics.histogram)
    weights = _bin_weights(counts, np.exp2(-moves / _STEPS_PER_OCTAVE), statistics, weighting)
    counts = counts * weights
    if shift is not None:  # a value counts for what its token is, wherever the shift takes it
        counts = gathered(shifted_counts(statistics.histogram * weights, shift))
    fine, share = _spread()
    spread = (counts.reshape(2 * len(moves), HISTOGRAM_BINS) @ share).reshape(len(moves), 2, -1)
    first, last = int(moves.max()), int(moves.min())
    total = np.zeros((2, share.shape[1] + first - last))
    for index, offset in enumerate(moves):
        start = first - int(offset)
        total[:, start : start + share.shape[1]] += spread[index]
    exponent = np.log2(fine[0]) * _STEPS_PER_OCTAVE - first
    edges = np.exp2((exponent + np.arange(total.shape[1] + 1)) / _STEPS_PER_OCTAVE)
    inverse = 1.0 if scale is None else 1.0 / np.asarray(scale, dtype=np.float64)
    middle = 0.0 if shift is None else shift
    low = min(float(((statistics.minimum - middle) * inverse).min()), 0.0)
    high = max(float(((statistics.maximum - middle) * inverse).max()), 0.0)
    return _within(edges, total, low, high)


def shifted_counts(counts: Array, shift: Array) -> Float64:
    """Histograms of x - shift from those of x, both (channels, 2, HISTOGRAM_BINS); shift (channels,).

    A bin's values are taken as four, evenly spread over it, so that a channel's total stays and its mean
    moves by the shift to within the width of the bins.
    """
    edges = _bin_edges()
    lower = np.concatenate([[0.0], edges[1:-1]])  # the first bin holds all that is smaller
    points = lower[:, None] + (np.arange(4) + 0.5) / 4 * (edges[1:] - lower)[:, None]
    signed = np.stack([-points, points])  # (2, bins, 4)
    total = np.empty(counts.shape)
    size = 2 * HISTOGRAM_BINS
    for start in range(0, len(shift), 512):  # some 4 MiB for each array below
        part = counts[start : start + 512]
        channel, sign, place = np.nonzero(part)
        moved = signed[sign, place] - shift[start + channel].astype(np.float64)[:, None]
        mantissa, exponent = np.frexp(np.abs(moved))  # in [0.5, 1)
        quarter = np.floor((2.0 * mantissa - 1.0) * HISTOGRAM_BINS_PER_OCTAVE).astype(np.int64)
        place = (exponent - 1 - HISTOGRAM_MIN_EXPONENT) * HISTOGRAM_BINS_PER_OCTAVE + quarter
        place = np.where(moved == 0, 0, np.clip(place, 0, HISTOGRAM_BINS - 1))
        flat = channel[:, None] * size + (moved >= 0) * HISTOGRAM_BINS + place
        weights = np.repeat(part[part != 0] / 4.0, 4)
        total[start : start + 512] = np.bincount(flat.ravel(), weights, len(part) * size).reshape(part.shape)
    return total


def central_range(statistics: InputStatistics, share: float) -> tuple[Float64, Float64]:
    """Bounds (channels,) between which all but `share` of each channel's values lie, half of them on either side.

    Raises:
        ValueError: the statistics hold no histogram.
    """
    if statistics.histogram is None:
        raise ValueError("no histogram was taken of this activation")
    edges = _bin_edges()
    values = np.concatenate([-edges[:0:-1], [0.0], edges[1:]])  # ascending; the two smallest bins meet at 0
    counts = np.concatenate([statistics.histogram[:, 0, ::-1], statistics.histogram[:, 1]], axis=1)
    below = np.cumsum(counts, axis=1, dtype=np.float64)
    tail = 0.5 * share * below[:, -1:]
    first = np.argmax(below > tail, axis=1)
    last = np.argmax(below >= below[:, -1:] - tail, axis=1)
    low = np.maximum(values[first], statistics.minimum)
    high = np.minimum(values[last + 1], statistics.maximum)
    return np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)


def typical_energy(statistics: InputStatistics) -> float:
    """Energy x.x of a typical token, from mean magnitudes, which massive tokens hardly move.

    Of a normal channel E[x^2] is pi/2 times the square of E|x|.
    """
    return np.pi / 2 * float(np.sum(statistics.mean_abs**2))


def token_weights(statistics: InputStatistics) -> Float64:
    """Weight E / (E + x^2) of a value in each histogram bin: about E / (x.x) of the token that holds it.

    Histograms do not know which values share a token: a massive value is taken as its token's only one,
    which is how massive activations come.
    """
    edges, energy = _bin_edges(), typical_energy(statistics)
    middle = 0.5 * (edges[1:] + edges[:-1])
    return np.asarray(energy / (energy + middle**2)) if energy > 0 else np.ones(HISTOGRAM_BINS)


def _bin_weights(counts: Float64, factors: Float64, statistics: InputStatistics, weighting: Weighting) -> Float64:
    """What a count in each bin is worth; `counts` (shifts, 2, bins) of channels multiplied by `factors` (shifts,)."""
    if weighting == "plain":
        return np.ones(HISTOGRAM_BINS)
    weights = token_weights(statistics)
    if weighting == "token":
        return weights
    edges = _bin_edges()
    squares = counts * ((0.5 * (edges[1:] + edges[:-1])) ** 2 * factors[:, None, None] ** 2)
    plain, token = float(squares.sum()), float((squares * weights).sum())
    return np.asarray(1.0 / plain + weights / token) if plain > 0 and token > 0 else np.ones(HISTOGRAM_BINS)


def _bin_edges() -> Float64:
    """Magnitudes between the histogram's bins, (HISTOGRAM_BINS + 1,): quarters of an octave."""
    octave, quarter = np.divmod(np.arange(HISTOGRAM_BINS + 1), HISTOGRAM_BINS_PER_OCTAVE)
    return np.asarray(np.exp2(HISTOGRAM_MIN_EXPONENT + octave) * (1.0 + quarter / HISTOGRAM_BINS_PER_OCTAVE))


@cache
def _spread() -> tuple[Float64, csr_matrix]:
    """Fine edges, and (histogram bins, fine bins) share of each histogram bin that falls in each fine one; to read.

    Within a bin values are taken as evenly spread; the first bin, which holds all that is smaller, too.
    """
    coarse = _bin_edges()
    low, high = np.floor(np.log2(coarse[0])), np.ceil(np.log2(coarse[-1]))
    fine = np.exp2(np.arange(low * _STEPS_PER_OCTAVE, high * _STEPS_PER_OCTAVE + 1) / _STEPS_PER_OCTAVE)
    overlap = np.minimum(coarse[1:, None], fine[None, 1:]) - np.maximum(coarse[:-1, None], fine[None, :-1])
    return fine, csr_matrix(np.maximum(overlap, 0.0) / np.diff(coarse)[:, None])


def _within(edges: Float64, mass: Float64, low: float, high: float) -> RangeProfile:
    """Moves mass that evenly filled bins put beyond the values seen to the last bin that was reached."""
    for sign, bound in ((0, -low), (1, high)):
        last = int(np.clip(np.searchsorted(edges, bound) - 1, 0, mass.shape[1] - 1))
        mass[sign, last] += mass[sign, last + 1 :].sum()
        mass[sign, last + 1 :] = 0.0
    used = np.flatnonzero(mass.any(axis=0))
    start, stop = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 1)
    edges = edges[start : stop + 1].copy()
    # The last bin ends where the values do: beyond the grid's end a fraction of a bin is many steps.
    edges[-1] = max(min(edges[-1], max(-low, high)), edges[-2] * (1 + 1e-6))
    return RangeProfile(edges=edges, mass=mass[:, start:stop], low=low, high=high)


def least_error_range(profile: RangeProfile, *, symmetric: bool, scale_dtype: str) -> ActivationRange:
    """The range of least expected output error among fractions of the range of all values seen.

    Symmetric ranges are searched along one axis; asymmetric ones shrink both ends together, then each by
    itself in turn until neither moves. The first of equals wins, starting from the widest.
    """

    def least(tried: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """The shares of the range's two ends that cost least."""
        lows, highs = np.array(tried).T
        scales, zero_points = INT8.range_parameters(
            profile.low * lows, profile.high * highs, symmetric=symmetric, scale_dtype=scale_dtype
        )
        zeros = itertools.repeat(None) if zero_points is None else map(int, zero_points)
        costs = [profile.error(float(scale), zero) for scale, zero in zip(scales, zeros, strict=False)]
        return tried[int(np.argmin(costs))]

    shares = least([(r, r) for r in RATIOS])
    while not symmetric:
        lower = least([(r, shares[1]) for r in (shares[0], *RATIOS)])
        moved = least([(lower[0], r) for r in (lower[1], *RATIOS)])
        if moved == shares:
            break
        shares = moved
    found = _as_range(profile.low * shares[0], profile.high * shares[1], symmetric, scale_dtype)
    return replace(found, rounding=profile.error(found.scale, found.zero_point))


def channel_rounding(
    statistics: InputStatistics,
    scale: Array | None,
    chosen: ActivationRange,
    *,
    by_token: bool = False,
    shift: Array | None = None,
) -> Float64:
    """Expected sum over tokens of (q(v_j) - v_j)^2 of each channel, clipping included: (in,); v = (x - shift) / scale.

    Args:
        statistics: of x, not rescaled, with its histogram.
        scale: (in,) that x is divided by, or None.
        chosen: the static range.
        by_token: count each token by 1 / x.x, estimated as in `token_weights`.
        shift: (in,) subtracted from x before, or None.
    """
    if statistics.histogram is None:
        raise ValueError("no histogram was taken of this activation")
    channels = statistics.channels
    inverse = np.ones(channels) if scale is None else 1.0 / np.asarray(scale, dtype=np.float64)
    edges, zero = _bin_edges(), chosen.zero_point or 0
    energy = typical_energy(statistics)
    by_token = by_token and energy > 0
    weights = token_weights(statistics) / energy if by_token else np.ones(HISTOGRAM_BINS)
    middle = np.zeros(channels) if shift is None else np.asarray(shift, dtype=np.float64)
    seen = (middle - statistics.minimum, statistics.maximum - middle)
    total = np.empty(channels)
    for start in range(0, channels, 2048):  # some 2 MiB for each array below
        part = slice(start, start + 2048)
        counts = statistics.histogram[part] * weights
        if shift is not None:
            counts = shifted_counts(counts, middle[part])
        factor = inverse[part, None]
        errors = np.zeros(counts.shape[0])
        for sign, steps in ((0, 128 + zero), (1, 127 - zero)):
            reach = np.maximum(seen[sign][part, None], edges[0])
            upper = np.maximum(np.minimum(edges[1:], reach), edges[:-1] * (1 + 1e-6)) * factor
            lower = edges[:-1] * factor
            integral = _integrated_error(upper, chosen.scale, steps) - _integrated_error(lower, chosen.scale, steps)
            errors += np.einsum("cb,cb->c", counts[:, sign], integral / (upper - lower))
        total[part] = errors
    if by_token or shift is not None:
        return total
    return np.minimum(total, statistics.sum_squares * inverse**2)  # 0 is on the grid: no error exceeds its value
