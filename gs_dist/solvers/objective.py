"""The quadratic form every weight solver minimises: tr(D G DT), the squared output error of a change D of a weight.

G is the sum of w x xT over the calibration tokens. Solvers do not care what is known of it: the matrix, a sketch
with few rows, or its diagonal alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from gs_dist.errors import UserError
from gs_dist.model.statistics import PLAIN_SHARE, InputStatistics
from gs_dist.results.quantized import Float32

__all__ = [
    "DiagonalObjective",
    "GramObjective",
    "Objective",
    "SketchObjective",
    "blend",
    "corrected_objective",
    "plain_objective",
    "searched_objective",
    "told_by",
    "token_objective",
]

Float64 = npt.NDArray[np.float64]
Source = Literal["gram", "sketch", "diagonal"]

# Rows and columns of the products below: large enough for BLAS, small enough that half of G is skipped.
_ROWS, _COLUMNS = 1024, 512


class Objective(ABC):
    """Second moments G of an input with `channels` channels, as far as they are known.

    `source` is what a summary says errors come from.
    """

    source: ClassVar[Source]

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of the input."""

    @property
    @abstractmethod
    def trace(self) -> float:
        """tr(G): summed energy of the tokens."""

    @abstractmethod
    def row_errors(self, delta: Float32) -> Float64:
        """Errors d G dT of every row d of `delta` (rows, in): (rows,) float64."""

    @abstractmethod
    def group_errors(self, change: Float32, size: int) -> Float64:
        """Errors d G_gg dT within each group of channels, as if groups were not correlated.

        Args:
            change: (groups, rows, size) float32.
            size: channels of a group.

        Returns:
            (groups, rows) float64.
        """

    @abstractmethod
    def scaled(self, inverse: Float32) -> Objective:
        """That of x * inverse, `inverse` (in,)."""

    @abstractmethod
    def times(self, factor: float) -> Objective:
        """G times a number."""

    def error(self, delta: npt.NDArray[np.floating[Any]]) -> float:
        """tr(D G DT) of a change (out, in): the squared error of the output, summed over tokens."""
        total = 0.0
        for top in range(0, len(delta), _ROWS):
            rows = np.ascontiguousarray(delta[top : top + _ROWS], dtype=np.float32)
            total += float(self.row_errors(rows).sum())
        return total


@dataclass(frozen=True)
class GramObjective(Objective):
    """The matrix G itself, (in, in) float32, symmetric: only its upper blocks are multiplied."""

    matrix: Float32
    source = "gram"

    @property
    def channels(self) -> int:
        """Of the input."""
        return len(self.matrix)

    @property
    def trace(self) -> float:
        """tr(G)."""
        return float(np.trace(self.matrix, dtype=np.float64))

    def row_errors(self, delta: Float32) -> Float64:
        """Exact but for float32 products."""
        errors = np.zeros(len(delta))
        for left in range(0, delta.shape[1], _COLUMNS):
            right = min(left + _COLUMNS, delta.shape[1])
            block = delta[:, left:right]
            product = block @ self.matrix[left:right, left:right]
            if left:
                product += 2.0 * (delta[:, :left] @ self.matrix[:left, left:right])
            errors += np.einsum("ij,ij->i", product, block)
        return errors

    def group_errors(self, change: Float32, size: int) -> Float64:
        """Exact but for float32 products."""
        blocks = (self.matrix[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(len(change)))
        return _block_errors(change, blocks)

    def scaled(self, inverse: Float32) -> GramObjective:
        """A new matrix."""
        rescaled = self.matrix * inverse[:, None]
        rescaled *= inverse[None, :]
        return GramObjective(np.asarray(rescaled))

    def times(self, factor: float) -> GramObjective:
        """A new matrix."""
        return GramObjective(self.matrix * np.float32(factor))


@dataclass(frozen=True)
class SketchObjective(Objective):
    """A factor F (rows, in) float32 with FT F about G (`gs_dist.model.sketch.Sketch.factor`)."""

    factor: Float32
    source = "sketch"

    @property
    def channels(self) -> int:
        """Of the input."""
        return int(self.factor.shape[1])

    @property
    def trace(self) -> float:
        """tr(FT F)."""
        return float(np.einsum("ij,ij->", self.factor, self.factor, dtype=np.float64))

    def row_errors(self, delta: Float32) -> Float64:
        """|F d|^2."""
        product = delta @ self.factor.T
        return np.asarray(np.einsum("ij,ij->i", product, product), dtype=np.float64)

    def group_errors(self, change: Float32, size: int) -> Float64:
        """By the products of F with itself where a group has fewer channels than F has rows."""
        parts = [self.factor[:, g * size : (g + 1) * size] for g in range(len(change))]
        if size <= len(self.factor):
            return _block_errors(change, (part.T @ part for part in parts))
        errors = np.empty(change.shape[:2])
        for group, part in enumerate(parts):
            product = change[group] @ part.T
            errors[group] = np.einsum("ij,ij->i", product, product)
        return errors

    def scaled(self, inverse: Float32) -> SketchObjective:
        """A new factor."""
        return SketchObjective(self.factor * inverse[None, :])

    def times(self, factor: float) -> SketchObjective:
        """A new factor."""
        return SketchObjective(self.factor * np.float32(np.sqrt(factor)))


@dataclass(frozen=True)
class DiagonalObjective(Objective):
    """The diagonal of G (in,) float64, as if channels were uncorrelated."""

    diagonal: Float64
    source = "diagonal"

    @property
    def channels(self) -> int:
        """Of the input."""
        return len(self.diagonal)

    @property
    def trace(self) -> float:
        """tr(G)."""
        return float(self.diagonal.sum())

    def row_errors(self, delta: Float32) -> Float64:
        """Sum of d_j^2 G_jj."""
        return np.asarray((delta.astype(np.float64) ** 2) @ self.diagonal)

    def group_errors(self, change: Float32, size: int) -> Float64:
        """Likewise, within each group."""
        parts = self.diagonal.reshape(len(change), 1, size)
        return np.asarray((change.astype(np.float64) ** 2 * parts).sum(axis=2))

    def scaled(self, inverse: Float32) -> DiagonalObjective:
        """A new diagonal."""
        return DiagonalObjective(self.diagonal * inverse.astype(np.float64) ** 2)

    def times(self, factor: float) -> DiagonalObjective:
        """A new diagonal."""
        return DiagonalObjective(self.diagonal * factor)


def _block_errors(change: Float32, blocks: Any) -> Float64:
    errors = np.empty(change.shape[:2])
    for group, block in enumerate(blocks):
        product = change[group] @ np.ascontiguousarray(block)
        errors[group] = np.einsum("ij,ij->i", product, change[group])
    return errors


def blend(plain: Objective, weighted: Objective | None, *, share: float = PLAIN_SHARE) -> Objective:
    """Mixture of plain and token-weighted second moments, each divided by its trace, times their channels.

    Args:
        plain: of all tokens alike.
        weighted: of tokens weighted by 1 / x.x, of the same kind; or None: then `plain` counts alone.
        share: of the plain ones, 0 to 1.

    Returns:
        A new objective; one of the arguments itself where the other has no say.
    """
    if weighted is None or share >= 1.0:
        return plain
    if share <= 0.0:
        return weighted
    if not (plain.trace > 0 and weighted.trace > 0):
        return plain
    channels = plain.channels
    first, second = share * channels / plain.trace, (1.0 - share) * channels / weighted.trace
    if isinstance(plain, GramObjective) and isinstance(weighted, GramObjective):
        mixed = plain.matrix * np.float32(first)
        mixed += weighted.matrix * np.float32(second)
        return GramObjective(np.asarray(mixed))
    assert isinstance(plain, SketchObjective), plain
    assert isinstance(weighted, SketchObjective), weighted
    return SketchObjective(np.concatenate([plain.times(first).factor, weighted.times(second).factor]))


def plain_objective(statistics: InputStatistics) -> Objective:
    """All tokens alike: what errors are reported by. The diagonal stands in where nothing else was taken."""
    if statistics.gram is not None:
        return GramObjective(statistics.gram)
    if statistics.sketch is not None:
        return SketchObjective(statistics.sketch.factor)
    return DiagonalObjective(statistics.sum_squares)


def token_objective(statistics: InputStatistics) -> Objective | None:
    """Tokens weighted by 1 / x.x, None where that was not taken."""
    if statistics.weighted_gram is not None:
        return GramObjective(statistics.weighted_gram)
    return None if statistics.weighted_sketch is None else SketchObjective(statistics.weighted_sketch.factor)


def told_by(statistics: InputStatistics, *, by_token: bool) -> Objective:
    """What errors are told by: all tokens alike, or with `by_token` each by 1 / x.x where that was taken."""
    weighted = token_objective(statistics) if by_token else None
    return plain_objective(statistics) if weighted is None else weighted


def searched_objective(statistics: InputStatistics) -> Objective:
    """What AWQ's scales are searched against: tokens weighted by 1 / x.x where that was taken, else all alike.

    With plain weights a few tokens of enormous energy decide, and what the other tokens need is lost.

    Raises:
        UserError: neither was taken.
    """
    found = token_objective(statistics) or plain_objective(statistics)
    if isinstance(found, DiagonalObjective):
        raise UserError("GPTQ, AWQ, clipping and outlier searches need second moments of their input: set gram: on")
    return found


def corrected_objective(statistics: InputStatistics) -> Objective:
    """What clipping and GPTQ minimise: mostly tokens weighted alike, and a little of all as they are.

    Raises:
        UserError: nothing of that was taken.
    """
    if statistics.blended_gram is not None:
        return GramObjective(statistics.blended_gram)
    weighted = token_objective(statistics)
    if weighted is None:
        return searched_objective(statistics)
    plain = plain_objective(statistics)
    return weighted if isinstance(plain, DiagonalObjective) else blend(plain, weighted)
