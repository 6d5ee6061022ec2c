"""Statistics of a linear's input, and how they merge.

Every field declares its merge: a maximum, a minimum or a sum. Floating sums depend on order, so the
order is fixed by the data: micro-batches form reduction blocks, a block is summed in sample order on one
worker, and blocks merge along one binary tree however many workers there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.model.token_sample import merge_samples

__all__ = [
    "HISTOGRAM_BINS",
    "HISTOGRAM_BYTES_PER_CHANNEL",
    "InputStatistics",
    "LayerStatistics",
    "StatisticsSettings",
    "TreeAccumulator",
    "TreeNode",
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

_SUM, _MIN, _MAX = np.add, np.minimum, np.maximum


def histogram_magnitudes() -> npt.NDArray[np.float64]:
    """Middle magnitude of each of the `HISTOGRAM_BINS` bins, ascending."""
    octave, quarter = np.divmod(np.arange(HISTOGRAM_BINS), HISTOGRAM_BINS_PER_OCTAVE)
    middle = 1.0 + (quarter + 0.5) / HISTOGRAM_BINS_PER_OCTAVE
    return np.asarray(np.exp2(HISTOGRAM_MIN_EXPONENT + octave) * middle, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class StatisticsSettings:
    """Which of the costly statistics to take of an input; the cheap ones are always taken."""

    gram: bool = True
    weighted_gram: bool = False
    histogram: bool = False
    sample: bool = False


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
        """Statistics of x / scale (`scale` > 0 per channel); the histogram is left out, see `histogram`.

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
        )

    def to_arrays(self) -> dict[str, Array]:
        """Field name to array, for storage; absent statistics are left out."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _COUNTS}
        present = {name: array for name, array in arrays.items() if array is not None}
        counts = {"num_tokens": self.num_tokens, **({"num_borrowed": self.num_borrowed} if self.num_borrowed else {})}
        return {**{name: np.array([count], dtype=np.int64) for name, count in counts.items()}, **present}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> InputStatistics:
        """Inverse of `to_arrays`."""
        rest = {name: array for name, array in arrays.items() if name not in _COUNTS}
        borrowed = int(arrays["num_borrowed"][0]) if "num_borrowed" in arrays else 0
        return cls(num_tokens=int(arrays["num_tokens"][0]), num_borrowed=borrowed, **rest)


_COUNTS = ("num_tokens", "num_borrowed")
_MERGES: dict[str, np.ufunc] = {
    "minimum": _MIN,
    "maximum": _MAX,
    "sum_abs": _SUM,
    "sum_squares": _SUM,
    "gram": _SUM,
    "weighted_gram": _SUM,
    "histogram": _SUM,
}

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
