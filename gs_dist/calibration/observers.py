"""Taking statistics of activations: on the host with BLAS, or on an Ascend card with MindSpore ops.

An observer accumulates one input over one reduction block. Both kinds sum micro-batch by micro-batch in
the order they are shown, so a block's statistics depend on its samples alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import mint, ops
from scipy.sparse import csr_matrix

from gs_dist.calibration.gram_sums import GramSums
from gs_dist.model.sketch import Sketch, rows_and_signs
from gs_dist.model.statistics import (
    HISTOGRAM_BINS,
    HISTOGRAM_BINS_PER_OCTAVE,
    HISTOGRAM_MIN_EXPONENT,
    InputStatistics,
    StatisticsSettings,
    blended_weights,
)
from gs_dist.model.token_sample import SAMPLE_TOKENS, merge_samples, token_keys
from gs_dist.solvers.blas import one_thread
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = ["MIN_EXPERT_TOKENS", "CardObserver", "ExpertObserver", "HostObserver", "InputObserver", "observe"]

Array = npt.NDArray[Any]
Places = npt.NDArray[np.int64]

_FLOAT32_EXPONENT_BIAS = 127
MIN_EXPERT_TOKENS = 16  # of one reduction block
_QUARTERS = 256 * HISTOGRAM_BINS_PER_OCTAVE  # quarters of an octave that 8 bits of exponent tell apart
_LOWER_BITS = 21  # of a float32: the mantissa without its upper two bits, log2 of HISTOGRAM_BINS_PER_OCTAVE
_FIRST_QUARTER = (_FLOAT32_EXPONENT_BIAS + HISTOGRAM_MIN_EXPONENT) * HISTOGRAM_BINS_PER_OCTAVE
_END_QUARTER = _FIRST_QUARTER + HISTOGRAM_BINS
_TOKENS_AT_ONCE, _CHANNELS_AT_ONCE = 32, 32  # what is made of so many stays in cache


class InputObserver(Protocol):
    """Accumulates the statistics of one input."""

    def observe(self, activation: Any, mask: Array | None, ids: Array | None = None) -> None:
        """Adds an activation (..., channels).

        Args:
            activation: of a micro-batch; the axis before the last runs over the tokens of one sample.
            mask: (...) False leaves a token out.
            ids: (tokens,) place of each token among all of the job; None numbers them as they come.
        """

    def take(self) -> InputStatistics:
        """The statistics of everything shown since the last call; starts anew."""


class HostObserver:
    """Statistics by NumPy and BLAS, for activations in host memory.

    The Gram matrix is summed in place: no copy of a matrix that has gigabytes at 28672 channels. The caller holds
    BLAS to one thread (`blas.one_thread`), since OpenBLAS sums in another order on two.

    Args:
        channels: of the activation.
        settings: what is taken of it.
        threads: share the Gram matrix's work, with the same bytes at any number.
    """

    def __init__(self, channels: int, settings: StatisticsSettings, *, threads: Threads = ONE_THREAD) -> None:
        self._threads = threads
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
        plain, weighted = settings.gram, settings.weighted_gram
        sketched = settings.sketches(channels)
        self._gram = GramSums(channels) if plain and not sketched else None
        self._weighted_gram = GramSums(channels) if weighted and not sketched else None
        self._blended_gram = GramSums(channels) if settings.blended_gram else None
        self._sketch = _SketchSums(settings.sketch_rows, channels) if plain and sketched else None
        self._weighted_sketch = _SketchSums(settings.sketch_rows, channels) if weighted and sketched else None
        self._histogram = np.zeros((channels, 2, HISTOGRAM_BINS), np.int32) if settings.histogram else None
        self._sampler = _Sampler(channels) if settings.sample else None

    def observe(self, activation: Any, mask: Array | None, ids: Array | None = None) -> None:
        """Adds an activation, a float32 NumPy array or a MindSpore tensor on the CPU."""
        array = activation.asnumpy() if isinstance(activation, ms.Tensor) else np.asarray(activation)
        tokens = np.ascontiguousarray(array.reshape(-1, self._channels), dtype=np.float32)
        places, samples = self._places.of(len(tokens), ids), _samples_of(array.shape)
        if mask is not None and not mask.all():
            kept = mask.reshape(-1)
            tokens, places, samples = tokens[kept], places[kept], samples[kept]
        if tokens.shape[0] == 0:
            return
        self._add(tokens, places, samples)

    def _add(self, tokens: Array, places: Places, samples: Array) -> None:
        if not self._allocated:
            self._allocate()
        if self._sampler is not None:
            self._sampler.add(places, lambda rows: tokens[rows])
        self._num_tokens += tokens.shape[0]
        energy = self._add_vectors(tokens)
        if self._histogram is not None:
            self._histogram += _count_magnitudes(tokens)
        if self._gram is not None:
            self._gram.add(tokens, self._threads)
        if self._weighted_gram is not None:
            self._weighted_gram.add(_weighted(tokens, _token_weights(energy)), self._threads)
        if self._blended_gram is not None:
            self._blended_gram.add(_weighted(tokens, blended_weights(energy, samples)), self._threads)
        if self._sketch is not None:
            self._sketch.add(tokens, places, np.ones(len(tokens)))
        if self._weighted_sketch is not None:
            self._weighted_sketch.add(tokens, places, _token_weights(energy))

    def _add_vectors(self, tokens: Array) -> npt.NDArray[np.float64]:
        """Adds what is summed for each channel; returns the energy of each token.

        Some tokens at a time, which stay in cache meanwhile.
        """
        energy = np.empty(len(tokens))
        ones = np.ones(_TOKENS_AT_ONCE, dtype=np.float32)
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            part = tokens[start : start + _TOKENS_AT_ONCE]
            np.minimum(self._minimum, part.min(axis=0), out=self._minimum)
            np.maximum(self._maximum, part.max(axis=0), out=self._maximum)
            magnitudes = np.abs(part)
            self._sum_abs += ones[: len(part)] @ magnitudes
            np.square(part, out=magnitudes)
            self._sum_squares += ones[: len(part)] @ magnitudes
            energy[start : start + len(part)] = magnitudes.sum(axis=1, dtype=np.float64)
        return energy

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
            gram=None if self._gram is None else self._gram.taken(),
            weighted_gram=None if self._weighted_gram is None else self._weighted_gram.taken(),
            histogram=self._histogram,
            **_taken(self._sampler),
            sketch=None if self._sketch is None else self._sketch.taken(),
            weighted_sketch=None if self._weighted_sketch is None else self._weighted_sketch.taken(),
            blended_gram=None if self._blended_gram is None else self._blended_gram.taken(),
        )
        self._allocated = False
        del self._gram, self._weighted_gram, self._blended_gram, self._sketch, self._weighted_sketch
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


class _SketchSums:
    """The sums of a sketch (`gs_dist.model.sketch.Sketch`) while tokens are added.

    The product with a sparse matrix reads each token once; a dense one of signs takes forty times as long.
    """

    def __init__(self, num_rows: int, channels: int) -> None:
        self._rows = np.zeros((num_rows, channels), dtype=np.float32)
        self._ones = np.zeros(num_rows)
        self._total, self._squares = np.zeros(channels), np.zeros(channels)
        self._weight = 0.0

    def add(self, tokens: Array, places: Places, weights: npt.NDArray[np.float64]) -> None:
        """Adds (tokens, channels) float32, each token with its weight."""
        rows, signs = rows_and_signs(places, len(self._rows))
        factors = np.sqrt(weights) * signs
        place = np.arange(len(tokens))
        embedding = csr_matrix((factors.astype(np.float32), (rows, place)), shape=(len(self._rows), len(tokens)))
        self._rows += embedding @ tokens
        self._ones += np.bincount(rows, weights=factors, minlength=len(self._ones))
        single = weights.astype(np.float32)
        self._total += single @ tokens
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            self._squares += single[part] @ np.square(tokens[part])
        self._weight += float(weights.sum())

    def taken(self) -> Sketch:
        """What was summed."""
        return Sketch.of_sums(self._rows, self._ones, self._total, self._squares, self._weight)


def _samples_of(shape: tuple[int, ...]) -> Array:
    """Sample that each token of an activation (samples, tokens, channels) is of; one where it has no such axis."""
    return np.repeat(np.arange(math.prod(shape[:-2]) if len(shape) > 2 else 1), shape[-2])


def _token_weights(energy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 / x.x of each token, 0 where it has no energy."""
    return np.divide(1.0, energy, out=np.zeros_like(energy), where=energy > 0)


def _weighted(tokens: Array, weights: npt.NDArray[np.float64]) -> Array:
    """Tokens whose Gram matrix is the sum of w x xT."""
    return np.asarray(tokens * np.sqrt(weights).astype(np.float32)[:, None])


def _count_magnitudes(tokens: Array) -> Array:
    """Histogram (channels, 2, HISTOGRAM_BINS) of (tokens, channels) float32, by exponent and two mantissa bits.

    Sign, exponent and these bits are a float32's upper 11. Some channels at a time, so that their counts stay in cache.
    """
    channels = tokens.shape[1]
    upper = tokens.view(np.uint32)
    counts = np.empty((channels, 2, HISTOGRAM_BINS), dtype=np.int32)
    first = np.arange(_CHANNELS_AT_ONCE, dtype=np.intp) * (2 * _QUARTERS)
    for start in range(0, channels, _CHANNELS_AT_ONCE):
        part = slice(start, min(start + _CHANNELS_AT_ONCE, channels))
        index = (upper[:, part] >> np.uint32(_LOWER_BITS)).astype(np.intp)
        index += first[: index.shape[1]]
        signed = np.bincount(index.reshape(-1), minlength=index.shape[1] * 2 * _QUARTERS)
        for sign, quarters in enumerate(signed.reshape(-1, 2, _QUARTERS).swapaxes(0, 1)):
            # The sign bit is set in negative values, which come first.
            counts[part, 1 - sign] = quarters[:, _FIRST_QUARTER:_END_QUARTER]
            counts[part, 1 - sign, 0] += quarters[:, :_FIRST_QUARTER].sum(axis=1)
            counts[part, 1 - sign, -1] += quarters[:, _END_QUARTER:].sum(axis=1)
    return counts


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
        self._host_sums: dict[str, list[Any]] = {}  # of a sketch: `ones` and `weight`
        self._minimum: Any = None
        self._maximum: Any = None
        shape = (self._channels, 2, HISTOGRAM_BINS)
        self._histogram = np.zeros(shape, np.int32) if self._settings.histogram else None

    def observe(self, activation: Any, mask: Array | None, ids: Array | None = None) -> None:
        """Adds an activation, a MindSpore tensor of any float dtype."""
        tokens = activation.reshape(-1, self._channels).astype(ms.float32)
        places, samples = self._places.of(int(tokens.shape[0]), ids), _samples_of(activation.shape)
        if mask is not None and not mask.all():
            kept = np.flatnonzero(mask.reshape(-1)).astype(np.int32)
            if kept.size == 0:
                return
            tokens = ops.gather(tokens, ms.Tensor(kept), 0)
            places, samples = places[kept], samples[kept]
        if self._sampler is not None:
            self._sampler.add(places, lambda rows: _rows(tokens, rows))
        self._num_tokens += int(tokens.shape[0])
        minimum, maximum = mint.amin(tokens, 0), mint.amax(tokens, 0)
        self._minimum = minimum if self._minimum is None else mint.minimum(self._minimum, minimum)
        self._maximum = maximum if self._maximum is None else mint.maximum(self._maximum, maximum)
        squares = tokens * tokens
        self._add("sum_abs", mint.sum(mint.abs(tokens), 0))
        self._add("sum_squares", mint.sum(squares, 0))
        self._add_moments(tokens, squares, places, samples)
        if self._histogram is not None:
            self._histogram += _count_magnitudes(np.ascontiguousarray(tokens.asnumpy()))

    def _add_moments(self, tokens: Any, squares: Any, places: Places, samples: Array) -> None:
        taken = self._settings
        sketched = taken.sketches(self._channels)
        energy = np.zeros(0)
        if taken.weighted_gram or taken.blended_gram:
            energy = mint.sum(squares, 1).asnumpy().astype(np.float64)
        for name, wanted in (("gram", taken.gram), ("weighted_gram", taken.weighted_gram)):
            weights = _token_weights(energy) if name == "weighted_gram" else np.ones(len(places))
            if wanted and sketched:
                self._add_sketch("sketch" if name == "gram" else "weighted_sketch", tokens, squares, places, weights)
            elif wanted:
                self._add_gram(name, tokens, weights)
        if taken.blended_gram:
            self._add_gram("blended_gram", tokens, blended_weights(energy, samples))

    def _add_gram(self, name: str, tokens: Any, weights: npt.NDArray[np.float64]) -> None:
        weighted = tokens * ms.Tensor(np.sqrt(weights)[:, None], ms.float32)
        self._add(name, mint.matmul(weighted.T, weighted))

    def _add_sketch(
        self, name: str, tokens: Any, squares: Any, places: Places, weights: npt.NDArray[np.float64]
    ) -> None:
        """As a product with a dense matrix of signs: a card multiplies faster than it scatters, and always alike."""
        rows, signs = rows_and_signs(places, self._settings.sketch_rows)
        factors = np.sqrt(weights) * signs
        embedding = np.zeros((self._settings.sketch_rows, len(places)), dtype=np.float32)
        embedding[rows, np.arange(len(places))] = factors
        self._add(f"{name}.rows", mint.matmul(ms.Tensor(embedding), tokens))
        single = ms.Tensor(weights[None, :], ms.float32)
        self._add(f"{name}.total", mint.matmul(single, tokens)[0])
        self._add(f"{name}.squares", mint.matmul(single, squares)[0])
        host = self._host_sums.setdefault(name, [np.zeros(self._settings.sketch_rows), 0.0])
        host[0] += np.bincount(rows, weights=factors, minlength=self._settings.sketch_rows)
        host[1] += float(weights.sum())

    def _add(self, name: str, term: Any) -> None:
        self._sums[name] = term if name not in self._sums else self._sums[name] + term

    def take(self) -> InputStatistics:
        """The statistics since the last call, on the host; the observer starts anew."""
        if self._num_tokens == 0:
            return HostObserver(self._channels, self._settings).take()
        sums = {name: value.asnumpy().copy() for name, value in self._sums.items()}
        sketches = {
            name: Sketch.of_sums(sums[f"{name}.rows"], ones, sums[f"{name}.total"], sums[f"{name}.squares"], weight)
            for name, (ones, weight) in self._host_sums.items()
        }
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
            sketch=sketches.get("sketch"),
            weighted_sketch=sketches.get("weighted_sketch"),
            blended_gram=sums.get("blended_gram"),
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
    """Statistics of one activation (..., channels), on the host; the first axis of three counts samples."""
    observer = HostObserver(int(tokens.shape[-1]), settings)
    with one_thread():
        observer.observe(tokens, mask)
    return observer.take()
