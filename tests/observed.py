"""Statistics of activations by their definitions in float64: what observers, merges and solvers are held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.model.statistics import (
    HISTOGRAM_BINS,
    HISTOGRAM_BINS_PER_OCTAVE,
    HISTOGRAM_MIN_EXPONENT,
    InputStatistics,
)
from gs_dist.model.token_sample import SAMPLE_TOKENS, token_ids, token_keys


def statistics_of(
    x: npt.NDArray[Any],
    *,
    gram: bool = True,
    weighted: bool = False,
    histogram: bool = False,
    sample: bool = False,
) -> InputStatistics:
    """Of tokens (tokens, channels)."""
    wide = x.astype(np.float64)
    energy = (wide**2).sum(axis=1, keepdims=True)
    keys = token_keys(token_ids(0, len(x)))
    kept = np.argsort(keys)[:SAMPLE_TOKENS]
    by_energy = np.divide(wide, energy, out=np.zeros_like(wide), where=energy > 0) if weighted else wide
    return InputStatistics(
        num_tokens=len(x),
        minimum=x.min(axis=0),
        maximum=x.max(axis=0),
        sum_abs=np.abs(wide).sum(axis=0),
        sum_squares=(wide**2).sum(axis=0),
        gram=(wide.T @ wide).astype(np.float32) if gram else None,
        weighted_gram=(by_energy.T @ wide).astype(np.float32) if weighted else None,
        histogram=histogram_of(x) if histogram else None,
        sample_keys=keys[kept] if sample else None,
        sample_tokens=x[kept].astype(np.float32) if sample else None,
    )


def histogram_of(x: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Counts (channels, negative or not, bins) of magnitudes: four bins of equal width an octave."""
    size = np.abs(x.astype(np.float64)) + 1e-30
    octave = np.floor(np.log2(size))
    place = (octave - HISTOGRAM_MIN_EXPONENT) * HISTOGRAM_BINS_PER_OCTAVE + np.floor((size / 2**octave - 1) * 4)
    place = np.clip(place, 0, HISTOGRAM_BINS - 1).astype(int)
    counts = np.zeros((x.shape[1], 2, HISTOGRAM_BINS), np.int32)
    np.add.at(counts, (np.arange(x.shape[1])[None, :], (x >= 0).astype(int), place), 1)
    return counts
