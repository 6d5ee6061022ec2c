"""Taking statistics of activations: on the host with BLAS, or on an Ascend card with MindSpore ops.

An observer accumulates one input over one reduction block. Both kinds sum micro-batch by micro-batch in
the order they are shown, so a block's statistics depend on its samples alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import mint, ops
from scipy.linalg.blas import ssyrk

from gs_dist.model.statistics import (
    HISTOGRAM_BINS,
    HISTOGRAM_BINS_PER_OCTAVE,
    HISTOGRAM_MIN_EXPONENT,
    InputStatistics,
    StatisticsSettings,
)
from gs_dist.model.token_sample import SAMPLE_TOKENS, merge_samples, token_keys
from gs_dist.solvers.blas import one_thread

__all__ = ["MIN_EXPERT_TOKENS", "CardObserver", "ExpertObserver", "HostObserver", "InputObserver", "observe"]

Array = npt.NDArray[Any]

_FLOAT32_EXPONENT_BIAS = 127
_UPPER_MANTISSA_BITS = 7  # of the 23, those in the upper half of a float32
_UPPER_HALF = 1 if sys.byteorder == "little" else 0
_QUARTER_BITS = 2  # log2 of HISTOGRAM_BINS_PER_OCTAVE
MIN_EXPERT_TOKENS = 16  # of one reduction block
_TINY_ENERGY = 1e-30
_MIRROR_TILE = 2048  # columns mirrored at a time, so that the copy stays in cache


class InputObserver(Protocol):
    """Accumulates the statistics of one input."""

    def observe(self, activation: Any, mask: Array | None, ids: Array | None = None) -> None:
        """Adds an activation (..., channels).

        Args:
            activation: of a micro-batch.
            mask: (...) False leaves a token out.
            ids: (tokens,) place of each token among all of the job; None numbers them as they come.
        """

    def take(self) -> InputStatistics:
        """The statistics of everything shown since the last call; starts anew."""


class HostObserver:
    """Statistics by NumPy and BLAS, for activations in host memory.

    The Gram matrix is a symmetric rank-k update in place: half the work of a product, and no copy of a
    matrix that has gigabytes at 28672 channels. The caller holds BLAS to one thread
    (`blas.one_thread`), since OpenBLAS sums in another order on two.
    """

    def __init__(self, channels: int, settings: StatisticsSettings) -> None:
        self._channels = channels
        self._settings = settings
        self._places = _Places()
        self._allocated = False

    def _allocate(self) -> None:
        # Not before the first token: after the last block, nothing should be held beside the tree.
        channels, settings = self._channels, self._settings
        self._allocated = True
        self._num_tokens = 0
        self._minimum = np.full(channels, np.inf, dtype=np.float32)
        self._maximum = np.full(channels, -np.inf, dtype=np.float32)
        self._sum_abs = np.zeros(channels, dtype=np.float64)
        self._sum_squares = np.zeros(channels, dtype=np.float64)
        # Column-major, as BLAS updates it without a copy; symmetric once mirrored, so order is no matter.
        self._gram = np.zeros((channels, channels), np.float32, order="F") if settings.gram else None
        self._weighted_gram = np.zeros((channels, channels), np.float32, order="F") if settings.weighted_gram else None
        self._histogram = np.zeros((channels, 2, HISTOGRAM_BINS), np.int32) if settings.histogram else None
        self._sampler = _Sampler(channels) if settings.sample else None

    def observe(self, activation: Any, mask: Array | None, ids: Array | None = None) -> None:
        """Adds an activation, a float32 NumPy array or a MindSpore tensor on the CPU."""
        array = activation.asnumpy() if isinstance(activation, ms.Tensor) else np.asarray(activation)
        tokens = np.ascontiguousarray(array.reshape(-1, self._channels), dtype=np.float32)
        places = self._places.of(len(tokens), ids) if self._settings.sample else None
        if mask is not None and not mask.all():
            kept = mask.reshape(-1)
            tokens, places = tokens[kept], None if places is None else places[kept]
        if tokens.shape[0] == 0:
            return
        self._add(tokens, places)

    def _add(self, tokens: Array, places: Array | None) -> None:
        if not self._allocated:
            self._allocate()
        if self._sampler is not None and places is not None:
            self._sampler.add(places, lambda rows: tokens[rows])
        self._num_tokens += tokens.shape[0]
        np.minimum(self._minimum, tokens.min(axis=0), out=self._minimum)
        np.maximum(self._maximum, tokens.max(axis=0), out=self._maximum)
        ones = np.ones(tokens.shape[0], dtype=np.float32)
        magnitudes = np.abs(tokens)
        self._sum_abs += ones @ magnitudes
        np.square(tokens, out=magnitudes)
        self._sum_squares += ones @ magnitudes
        if self._gram is not None:
            self._gram = ssyrk(1.0, tokens.T, beta=1.0, c=self._gram, overwrite_c=1)
        if self._weighted_gram is not None:
            energy = magnitudes.sum(axis=1, dtype=np.float64)
            inverse_norm = np.divide(1.0, np.sqrt(energy), out=np.zeros_like(energy), where=energy > 0)
            np.multiply(tokens, inverse_norm.astype(np.float32)[:, None], out=magnitudes)
            self._weighted_gram = ssyrk(1.0, magnitudes.T, beta=1.0, c=self._weighted_gram, overwrite_c=1)
        if self._histogram is not None:
            self._histogram += _count_magnitudes(tokens)

    def take(self) -> InputStatistics:
        """The statistics since the last call; the observer starts anew."""
        if not self._allocated:
            self._allocate()
        statistics = InputStatistics(
            num_tokens=self._num_tokens,
            minimum=self._minimum,
            maximum=self._maximum,
            sum_abs=self._sum_abs,
            sum_squares=self._sum_squares,
            gram=_mirror(self._gram),
            weighted_gram=_mirror(self._weighted_gram),
            histogram=self._histogram,
            **_taken(self._sampler),
        )
        self._allocated = False
        del self._gram, self._weighted_gram
        return statistics


class _Places:
    """Places of tokens among all of the job: those given, or numbers in the order they come."""

    def __init__(self) -> None:
        self._next = 0

    def of(self, count: int, ids: Array | None) -> Array:
        self._next += count
        return np.arange(self._next - count, self._next, dtype=np.int64) if ids is None else ids


class _Sampler:
    """The sample of the tokens shown since the last `take`."""

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._start()

    def _start(self) -> None:
        self._keys = np.empty(0, np.uint64)
        self._tokens = np.empty((0, self._channels), np.float32)

    def add(self, places: Array, rows_of: Callable[[Array], Array]) -> None:
        """Adds tokens by their places; `rows_of` gives the rows (k, channels) float32 of those with these indices."""
        keys = token_keys(places)
        small = np.argsort(keys, kind="stable")[:SAMPLE_TOKENS]
        if len(self._keys) == SAMPLE_TOKENS:
            small = small[keys[small] < self._keys[-1]]
        if small.size:
            self._keys, self._tokens = merge_samples(self._keys, self._tokens, keys[small], rows_of(small))

    def take(self) -> dict[str, Array]:
        """Fields of the statistics; starts anew."""
        taken: dict[str, Array] = {"sample_keys": self._keys, "sample_tokens": self._tokens}
        self._start()
        return taken


def _mirror(upper: Array | None) -> Array | None:
    """Fills the lower triangle from the upper one, in place."""
    if upper is None:
        return None
    size = upper.shape[0]
    for start in range(0, size, _MIRROR_TILE):
        stop = min(start + _MIRROR_TILE, size)
        tile = upper[start:stop, start:stop]
        tile[...] = np.triu(tile) + np.triu(tile, 1).T
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    # Symmetric, so the transpose is the same matrix in row-major order.
    return upper.T


def _bin_of_upper_half() -> npt.NDArray[np.intp]:
    """Sign and bin, as one index below 2 * HISTOGRAM_BINS, for each value of a float32's upper 16 bits."""
    upper = np.arange(1 << 16, dtype=np.uint32)
    # Seven bits of mantissa are left in the upper half; exponent and two of them make a quarter of an octave.
    quarters = ((upper & 0x7FFF) >> (_UPPER_MANTISSA_BITS - _QUARTER_BITS)).astype(np.int64)
    quarters -= (_FLOAT32_EXPONENT_BIAS + HISTOGRAM_MIN_EXPONENT) * HISTOGRAM_BINS_PER_OCTAVE
    is_positive = 1 - (upper >> 15).astype(np.int64)
    return (np.clip(quarters, 0, HISTOGRAM_BINS - 1) + is_positive * HISTOGRAM_BINS).astype(np.intp)


_BIN_OF_UPPER_HALF = _bin_of_upper_half()
_TOKENS_AT_ONCE = 128  # indices of that many tokens stay in cache between the look-up and the count


def _count_magnitudes(tokens: Array) -> Array:
    """Histogram (channels, 2, HISTOGRAM_BINS) of (tokens, channels) float32, by exponent and two mantissa bits."""
    channels = tokens.shape[1]
    upper = tokens.view(np.uint16).reshape(*tokens.shape, 2)[:, :, _UPPER_HALF]
    first = np.arange(channels, dtype=np.intp) * (2 * HISTOGRAM_BINS)
    counts = np.zeros(channels * 2 * HISTOGRAM_BINS, np.intp)
    for start in range(0, len(tokens), _TOKENS_AT_ONCE):
        index = _BIN_OF_UPPER_HALF[upper[start : start + _TOKENS_AT_ONCE]]
        index += first
        counts += np.bincount(index.reshape(-1), minlength=len(counts))
    return counts.reshape(channels, 2, HISTOGRAM_BINS).astype(np.int32)


def _taken(sampler: _Sampler | None) -> dict[str, Any]:
    return {} if sampler is None else sampler.take()


class CardObserver:
    """The same statistics by MindSpore ops, so that activations need not leave an Ascend card.

    Sums over tokens run in float32 on the card, micro-batch by micro-batch; what is taken is brought to
    the host once a block. Counting magnitudes has no fast card op and runs on the host.
    """

    def __init__(self, channels: int, settings: StatisticsSettings) -> None:
        self._channels = channels
        self._settings = settings
        self._places = _Places()
        self._sampler = _Sampler(channels) if settings.sample else None
        self._start()

    def _start(self) -> None:
        self._num_tokens = 0
        self._sums: dict[str, Any] = {}
        self._minimum: Any = None
        self._maximum: Any = None
        shape = (self._channels, 2, HISTOGRAM_BINS)
        self._histogram = np.zeros(shape, np.int32) if self._settings.histogram else None

    def observe(self, activation: Any, mask: Array | None, ids: Array | None = None) -> None:
        """Adds an activation, a MindSpore tensor of any float dtype."""
        tokens = activation.reshape(-1, self._channels).astype(ms.float32)
        places = self._places.of(int(tokens.shape[0]), ids) if self._settings.sample else None
        if mask is not None and not mask.all():
            kept = np.flatnonzero(mask.reshape(-1)).astype(np.int32)
            if kept.size == 0:
                return
            tokens = ops.gather(tokens, ms.Tensor(kept), 0)
            places = None if places is None else places[kept]
        if self._sampler is not None and places is not None:
            self._sampler.add(places, lambda rows: _rows(tokens, rows))
        self._num_tokens += int(tokens.shape[0])
        minimum, maximum = mint.amin(tokens, 0), mint.amax(tokens, 0)
        self._minimum = minimum if self._minimum is None else mint.minimum(self._minimum, minimum)
        self._maximum = maximum if self._maximum is None else mint.maximum(self._maximum, maximum)
        squares = tokens * tokens
        self._add("sum_abs", mint.sum(mint.abs(tokens), 0))
        self._add("sum_squares", mint.sum(squares, 0))
        if self._settings.gram:
            self._add("gram", mint.matmul(tokens.T, tokens))
        if self._settings.weighted_gram:
            energy = mint.sum(squares, 1, True)
            # A token of no energy is zero, and stays so times any finite number.
            weighted = tokens * ops.rsqrt(ops.maximum(energy, ms.Tensor(_TINY_ENERGY, ms.float32)))
            self._add("weighted_gram", mint.matmul(weighted.T, weighted))
        if self._histogram is not None:
            self._histogram += _count_magnitudes(np.ascontiguousarray(tokens.asnumpy()))

    def _add(self, name: str, term: Any) -> None:
        self._sums[name] = term if name not in self._sums else self._sums[name] + term

    def take(self) -> InputStatistics:
        """The statistics since the last call, on the host; the observer starts anew."""
        if self._num_tokens == 0:
            return HostObserver(self._channels, self._settings).take()
        sums = {name: value.asnumpy().copy() for name, value in self._sums.items()}
        statistics = InputStatistics(
            num_tokens=self._num_tokens,
            minimum=self._minimum.asnumpy().copy(),
            maximum=self._maximum.asnumpy().copy(),
            sum_abs=sums["sum_abs"].astype(np.float64),
            sum_squares=sums["sum_squares"].astype(np.float64),
            gram=sums.get("gram"),
            weighted_gram=sums.get("weighted_gram"),
            histogram=self._histogram,
            **_taken(self._sampler),
        )
        self._start()
        return statistics


def _rows(tokens: Any, rows: Array) -> Array:
    """Those rows of a tensor (tokens, channels), on the host."""
    return np.array(ops.gather(tokens, ms.Tensor(rows.astype(np.int32)), 0).asnumpy())


class ExpertObserver:
    """The tokens given to one expert; where a block gave it fewer than `MIN_EXPERT_TOKENS`, the closest others too.

    An expert that no token reaches would have no statistics, and one that a few reach poor ones. What it makes of the
    tokens that came closest to being given to it is the next best, and is counted apart.
    """

    def __init__(self, observer: InputObserver) -> None:
        self._observer = observer
        self._start()

    def _start(self) -> None:
        self._routed = 0
        self._spare: list[tuple[Array, Array]] = []

    def observe(self, activation: Any, mask: Array | None, ids: Array | None = None) -> None:
        """Adds a `network.RoutedActivation`; `mask` (...) and `ids` are those of all tokens of the micro-batch."""
        places = None if ids is None else ids[np.maximum(activation.tokens, 0)]
        counted = activation.tokens >= 0
        if mask is not None:
            counted &= mask.reshape(-1)[np.maximum(activation.tokens, 0)]
        routed = np.arange(counted.size) < activation.num_routed
        given = counted & routed
        if given.any():
            self._observer.observe(activation.values, given, places)
            self._routed += int(given.sum())
        lacking = MIN_EXPERT_TOKENS - self._routed - sum(len(tokens) for tokens, _ in self._spare)
        kept = np.flatnonzero(counted & ~routed)[: max(lacking, 0)]
        if kept.size:
            taken = np.arange(kept.size) if places is None else places[kept]
            self._spare.append((activation.values.asnumpy()[kept], taken))

    def take(self) -> InputStatistics:
        """The statistics since the last call; the observer starts anew."""
        lacking, num_borrowed = MIN_EXPERT_TOKENS - self._routed, 0
        for tokens, places in self._spare:
            borrowed = tokens[: max(lacking - num_borrowed, 0)]
            if len(borrowed):
                self._observer.observe(ms.Tensor(borrowed), None, places[: len(borrowed)])
            num_borrowed += len(borrowed)
        statistics = replace(self._observer.take(), num_borrowed=num_borrowed)
        self._start()
        return statistics


def observe(tokens: Array, settings: StatisticsSettings, mask: Array | None = None) -> InputStatistics:
    """Statistics of one activation (..., channels), on the host."""
    observer = HostObserver(int(tokens.shape[-1]), settings)
    with one_thread():
        observer.observe(tokens, mask)
    return observer.take()
