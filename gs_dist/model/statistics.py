"""Statistics of a linear's input, and how they merge.

Every field declares its merge: a maximum, a minimum or a sum. Floating sums depend on order, so the
order is fixed by the data: micro-batches form reduction blocks, a block is summed in sample order on one
worker, and blocks merge along one binary tree however many workers there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.model.sketch import Sketch, sketch_nbytes
from gs_dist.model.token_sample import SAMPLE_TOKENS, merge_samples

__all__ = [
    "HISTOGRAM_BINS",
    "HISTOGRAM_BYTES_PER_CHANNEL",
    "PLAIN_SHARE",
    "InputStatistics",
    "LayerStatistics",
    "StatisticsSettings",
    "TreeAccumulator",
    "TreeNode",
    "blended_weights",
    "block_bounds",
    "histogram_magnitudes",
    "merge_layers",
    "merge_nodes",
]

Array = npt.NDArray[Any]

# A histogram bin is a sign, an exponent of two and a quarter of the octave above it: 4 bins from each of
# the octaves 2^-20 .. 2^19, smaller magnitudes in the first bin and larger ones in the last. The top lies far
# above float16's 65504: massive activations of tens of thousands occur, and decide static ranges.
HISTOGRAM_MIN_EXPONENT = -20
HISTOGRAM_OCTAVES = 40
HISTOGRAM_BINS_PER_OCTAVE = 4
HISTOGRAM_BINS = HISTOGRAM_OCTAVES * HISTOGRAM_BINS_PER_OCTAVE
HISTOGRAM_BYTES_PER_CHANNEL = 2 * HISTOGRAM_BINS * 4
# Minimum and maximum in float32, sums of magnitudes and of squares in float64.
_VECTOR_BYTES_PER_CHANNEL = 4 + 4 + 8 + 8

# Shifted, placed and counted, each value of a histogram.
_COUNT_OPERATIONS = 3

_SUM, _MIN, _MAX = np.add, np.minimum, np.maximum


def histogram_magnitudes() -> npt.NDArray[np.float64]:
    """Middle magnitude of each of the `HISTOGRAM_BINS` bins, ascending."""
    octave, quarter = np.divmod(np.arange(HISTOGRAM_BINS), HISTOGRAM_BINS_PER_OCTAVE)
    middle = 1.0 + (quarter + 0.5) / HISTOGRAM_BINS_PER_OCTAVE
    return np.asarray(np.exp2(HISTOGRAM_MIN_EXPONENT + octave) * middle, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class StatisticsSettings:
    """Which of the costly statistics to take of an input; the cheap ones are always taken.

    Attributes:
        gram, weighted_gram: second moments of all tokens alike, and of tokens weighted by 1 / x.x.
        histogram: counts of each channel's values.
        sketch_rows: rows of the sketches that stand for these two matrices; 0 takes the matrices themselves.
        blended_gram: one matrix of both, for solvers that need a matrix.
    """

    gram: bool = True
    weighted_gram: bool = False
    histogram: bool = False
    sample: bool = False
    sketch_rows: int = 0
    blended_gram: bool = False

    def sketches(self, channels: int) -> bool:
        """Whether second moments are sketched: where a matrix has no more rows than a sketch, it is taken itself."""
        return 0 < self.sketch_rows < channels

    def nbytes(self, channels: int) -> int:
        """Bytes of one input's statistics."""
        sizes = {
            "gram": 4 * channels**2,
            "weighted_gram": 4 * channels**2,
            "blended_gram": 4 * channels**2,
            "sketch": sketch_nbytes(self.sketch_rows, channels),
            "weighted_sketch": sketch_nbytes(self.sketch_rows, channels),
            "histogram": channels * HISTOGRAM_BYTES_PER_CHANNEL,
            "sample_keys": 8 * SAMPLE_TOKENS,
            "sample_tokens": 4 * SAMPLE_TOKENS * channels,
        }
        return channels * _VECTOR_BYTES_PER_CHANNEL + sum(sizes[name] for name in self.fields(channels))

    def operations(self, channels: int, *, dense: bool) -> int:
        """Floating-point operations of one token's statistics.

        Args:
            channels: of the input.
            dense: whether sketches are products with a dense matrix of signs, as on a card, or with a sparse one.
        """
        gram = channels * (channels + 1)
        # Rows, and beside them total and squares.
        sketch = 2 * channels * ((self.sketch_rows if dense else 1) + 2)
        costs = {"gram": gram, "weighted_gram": gram, "blended_gram": gram, "sketch": sketch, "weighted_sketch": sketch}
        costs["histogram"] = _COUNT_OPERATIONS * channels
        vectors = 6 * channels  # minimum, maximum, magnitudes and squares, and both their sums
        return vectors + sum(costs.get(name, 0) for name in self.fields(channels))

    def fields(self, channels: int) -> frozenset[str]:
        """Fields of `InputStatistics` that these settings fill, of an input with so many channels."""
        sketched = self.sketches(channels)
        filled = {
            "sketch" if sketched else "gram": self.gram,
            "weighted_sketch" if sketched else "weighted_gram": self.weighted_gram,
            "histogram": self.histogram,
            "blended_gram": self.blended_gram,
            "sample_keys": self.sample,
            "sample_tokens": self.sample,
        }
        return frozenset(name for name, taken in filled.items() if taken)


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """What was seen of one activation x with `channels` channels over all tokens (padding left out).

    Attributes:
        num_tokens: tokens seen (SUM).
        num_borrowed: of these, tokens that were not given to the expert that reads x, but came closest (SUM).
        minimum, maximum: per channel, float32 (MIN, MAX).
        sum_abs, sum_squares: per channel, float64 (SUM).
        gram: sum of x xT, (channels, channels) float32 (SUM), or None.
        weighted_gram: sum of x xT / (x . x), tokens of no energy left out, likewise.
        histogram: counts (channels, 2, HISTOGRAM_BINS) int32 (SUM); index 0 of axis 1 counts negative
            values by magnitude, index 1 the others. Or None.
        sample_keys, sample_tokens: keys (k,) uint64, ascending, and rows (k, channels) float32 of some tokens,
            SAMPLE_TOKENS at most (their union, less those of the larger keys). Or None.
        sketch, weighted_sketch: what stands for `gram` and `weighted_gram` where they were not taken (SUM), or None.
        blended_gram: sum of w x xT, (channels, channels) float32 (SUM), w as `blended_weights` gives it; or None.
    """

    num_tokens: int
    minimum: Array
    maximum: Array
    sum_abs: Array
    sum_squares: Array
    gram: Array | None = None
    weighted_gram: Array | None = None
    histogram: Array | None = None
    sample_keys: Array | None = None
    sample_tokens: Array | None = None
    num_borrowed: int = 0
    sketch: Sketch | None = None
    weighted_sketch: Sketch | None = None
    blended_gram: Array | None = None

    @property
    def channels(self) -> int:
        """Length of the activation's last axis."""
        return int(self.minimum.shape[0])

    @property
    def max_abs(self) -> Array:
        """Largest magnitude of each channel, float32."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    @property
    def mean_abs(self) -> Array:
        """Mean magnitude of each channel, float64 (AWQ's x_mean)."""
        return np.asarray(self.sum_abs / max(self.num_tokens, 1))

    @property
    def weighted_squares(self) -> Array | None:
        """Sum over tokens of x^2 / (x . x) of each channel, None where weighted moments were not taken."""
        if self.weighted_gram is not None:
            return np.diagonal(self.weighted_gram)
        return None if self.weighted_sketch is None else self.weighted_sketch.squares

    def merge(self, other: InputStatistics, *, in_place: bool = False) -> InputStatistics:
        """Statistics of both sets of tokens; with `in_place` the arrays of `self` are reused.

        Raises:
            ValueError: different channels, or one side lacks a statistic that the other has.
        """
        if self.channels != other.channels:
            raise ValueError(f"statistics of {self.channels} and {other.channels} channels do not merge")
        merged: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        for name, operation in _MERGES.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"one of two statistics lacks {name}: they come from different settings")
            if mine is None:
                merged[name] = None
                continue
            if isinstance(mine, Sketch):
                merged[name] = mine.merge(theirs, in_place=in_place)
            else:
                merged[name] = operation(mine, theirs, out=mine) if in_place else operation(mine, theirs)
        return InputStatistics(**(merged | self._merged_sample(other)))

    def _merged_sample(self, other: InputStatistics) -> dict[str, Array]:
        if (self.sample_tokens is None) != (other.sample_tokens is None):
            raise ValueError("one of two statistics lacks sample_tokens: they come from different settings")
        if self.sample_tokens is None or self.sample_keys is None:
            return {}
        assert other.sample_keys is not None
        assert other.sample_tokens is not None
        keys, tokens = merge_samples(self.sample_keys, self.sample_tokens, other.sample_keys, other.sample_tokens)
        return {"sample_keys": keys, "sample_tokens": tokens}

    def scaled(self, scale: Array) -> InputStatistics:
        """Statistics of x / scale (`scale` > 0 per channel); the histogram and sketches are left out.

        The weighted Gram matrix keeps the token weights of the unscaled activation.
        """
        inverse = 1.0 / np.asarray(scale, dtype=np.float64)
        single = inverse.astype(np.float32)

        def both_sides(gram: Array | None) -> Array | None:
            return None if gram is None else (gram * single[:, None]) * single[None, :]

        return replace(
            self,
            minimum=self.minimum * single,
            maximum=self.maximum * single,
            sum_abs=self.sum_abs * inverse,
            sum_squares=self.sum_squares * inverse**2,
            gram=both_sides(self.gram),
            weighted_gram=both_sides(self.weighted_gram),
            histogram=None,
            sample_tokens=None if self.sample_tokens is None else self.sample_tokens * single,
            sketch=None,
            weighted_sketch=None,
            blended_gram=both_sides(self.blended_gram),
        )

    def only(self, taken: StatisticsSettings) -> InputStatistics:
        """What a job that takes `taken` would have seen: the rest of the costly statistics is left out.

        Solvers take the most exact of what is there, and what they solve must not depend on what else was kept.
        """
        kept = taken.fields(self.channels)
        fewer: dict[str, Any] = {name: getattr(self, name) if name in kept else None for name in _COSTLY}
        return replace(self, **fewer)

    def lacking(self, taken: StatisticsSettings) -> tuple[str, ...]:
        """Names of what a job that takes `taken` would have seen and is not here, or in sketches of other sizes."""
        sketches = [s for s in (self.sketch, self.weighted_sketch) if s is not None]
        if taken.sketches(self.channels) and any(len(sketch.rows) != taken.sketch_rows for sketch in sketches):
            return (f"sketch_rows: {taken.sketch_rows}",)
        return tuple(sorted(name for name in taken.fields(self.channels) if getattr(self, name) is None))

    def to_arrays(self) -> dict[str, Array]:
        """Field name to array, for storage; absent statistics are left out, a sketch's arrays have its name first."""
        counts = {"num_tokens": self.num_tokens, **({"num_borrowed": self.num_borrowed} if self.num_borrowed else {})}
        arrays: dict[str, Array] = {name: np.array([count], dtype=np.int64) for name, count in counts.items()}
        for name in (*_MERGES, "sample_keys", "sample_tokens"):
            value = getattr(self, name)
            if isinstance(value, Sketch):
                arrays |= {f"{name}.{part}": array for part, array in value.to_arrays().items()}
            elif value is not None:
                arrays[name] = value
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> InputStatistics:
        """Inverse of `to_arrays`."""
        values: dict[str, Any] = {n: a for n, a in arrays.items() if n not in _COUNTS and "." not in n}
        parts: dict[str, dict[str, Array]] = {}
        for name, array in arrays.items():
            of, _, part = name.partition(".")
            if part:
                parts.setdefault(of, {})[part] = array
        values |= {name: Sketch.from_arrays(of) for name, of in parts.items()}
        values |= {name: int(arrays[name][0]) for name in _COUNTS if name in arrays}
        return cls(**values)


_COUNTS = ("num_tokens", "num_borrowed")
_MERGES: dict[str, np.ufunc] = {
    "minimum": _MIN,
    "maximum": _MAX,
    "sum_abs": _SUM,
    "sum_squares": _SUM,
    "gram": _SUM,
    "weighted_gram": _SUM,
    "histogram": _SUM,
    "sketch": _SUM,
    "weighted_sketch": _SUM,
    "blended_gram": _SUM,
}

_COSTLY = (
    *("gram", "weighted_gram", "histogram", "sketch", "weighted_sketch", "blended_gram"),
    *("sample_keys", "sample_tokens"),
)

# Share of the plain second moments in the blended ones. Alone they are owned by a few tokens of enormous energy, and
# weighted by 1 / x.x those tokens count too little: what they need shows in perplexity. Flat from 0.03 to 0.15.
PLAIN_SHARE = 0.07


def blended_weights(energy: Array, samples: Array) -> Array:
    """Weight of each token in the blended second moments: mostly 1 / x.x, and `PLAIN_SHARE` alike within its sample.

    The plain part of a sample is divided by the mean energy of its tokens, which is known when the sample is: the
    whole job's is not, and waiting for it would take a matrix for each part.

    Args:
        energy: (tokens,) x.x, float64.
        samples: (tokens,) number of each token's sample; tokens of a sample come together.

    Returns:
        (tokens,) float64; 0 for a token of no energy.
    """
    _, of, count = np.unique(samples, return_inverse=True, return_counts=True)
    mean = np.bincount(of, weights=energy, minlength=len(count)) / count
    plain = np.divide(PLAIN_SHARE, mean, out=np.zeros_like(mean), where=mean > 0)[of]
    token = np.divide(1.0 - PLAIN_SHARE, energy, out=np.zeros_like(energy), where=energy > 0)
    return np.asarray(np.where(energy > 0, plain + token, 0.0))


LayerStatistics = dict[str, InputStatistics]
"""Statistics of one decoder layer: name of the input (`architecture.LayerInput.name`, `key`, `value`) to statistics."""


def merge_layers(left: LayerStatistics, right: LayerStatistics, *, in_place: bool = False) -> LayerStatistics:
    """Merges two layers' statistics input by input; both must name the same inputs."""
    if left.keys() != right.keys():
        raise ValueError(f"statistics of inputs {sorted(left)} and {sorted(right)} do not merge")
    return {name: statistics.merge(right[name], in_place=in_place) for name, statistics in left.items()}


def block_bounds(num_micro_batches: int, num_blocks: int) -> list[tuple[int, int]]:
    """First and past-the-last micro-batch of each reduction block; depends on the data alone.

    `num_blocks` is a power of two. With fewer micro-batches than blocks some blocks are empty.
    """
    if num_blocks < 1 or num_blocks & (num_blocks - 1):
        raise ValueError(f"the number of reduction blocks is {num_blocks}: it must be a power of two")
    edges = [block * num_micro_batches // num_blocks for block in range(num_blocks + 1)]
    return list(itertools.pairwise(edges))


@dataclass(frozen=True, kw_only=True)
class TreeNode:
    """A partial sum: the statistics of blocks [index * 2^level, (index + 1) * 2^level)."""

    level: int
    index: int
    statistics: LayerStatistics


class TreeAccumulator:
    """Merges finished blocks as early as the tree allows; holds one partial sum a level at most."""

    def __init__(self) -> None:
        self._nodes: list[TreeNode] = []

    def push(self, block: int, statistics: LayerStatistics) -> None:
        """Adds a finished block; blocks must come in ascending order. Takes over the arrays."""
        node = TreeNode(level=0, index=block, statistics=statistics)
        while self._nodes:
            left = self._nodes[-1]
            if left.level != node.level or left.index % 2 or left.index + 1 != node.index:
                break
            self._nodes.pop()
            merged = merge_layers(left.statistics, node.statistics, in_place=True)
            node = TreeNode(level=node.level + 1, index=node.index // 2, statistics=merged)
        self._nodes.append(node)

    def nodes(self) -> list[TreeNode]:
        """The partial sums held, in order of their blocks."""
        return list(self._nodes)


def merge_nodes(nodes: Iterable[TreeNode], num_blocks: int) -> LayerStatistics:
    """Merges partial sums of all workers along the one tree; empty blocks count as nothing.

    The result does not depend on how blocks were dealt, to the last bit. The arrays of the nodes may be
    read-only and are not changed.

    Raises:
        ValueError: no node at all, or two that cover the same block.
    """
    pending = sorted(nodes, key=lambda node: (node.level, node.index))
    if not pending:
        raise ValueError("no statistics to merge: no calibration sample reached this layer")
    spans = sorted((node.index << node.level, (node.index + 1) << node.level) for node in pending)
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise ValueError(f"partial sums cover a block twice: {spans}")
    level = 0
    owned: set[int] = set()  # ids of statistics made here, whose arrays may be reused
    current = [node for node in pending if node.level == 0]
    while (1 << level) < num_blocks:
        parents: dict[int, TreeNode] = {}
        for node in sorted(current, key=lambda n: n.index):
            sibling = parents.get(node.index // 2)
            if sibling is None:
                parents[node.index // 2] = TreeNode(level=level + 1, index=node.index // 2, statistics=node.statistics)
                continue
            merged = merge_layers(sibling.statistics, node.statistics, in_place=id(sibling.statistics) in owned)
            owned.add(id(merged))
            parents[node.index // 2] = TreeNode(level=level + 1, index=node.index // 2, statistics=merged)
        level += 1
        current = [*parents.values(), *(node for node in pending if node.level == level)]
    if len(current) != 1:
        raise ValueError(f"partial sums do not form one tree of {num_blocks} blocks")
    return current[0].statistics
