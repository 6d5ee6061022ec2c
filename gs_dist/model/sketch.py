"""A sketch of an activation's second moments: a few hundred rows in the place of an n x n Gram matrix.

S = sum over tokens of sqrt(w) s e_h xT has `num_rows` rows whatever the number of channels n is: each token x of
weight w is added to one row h with one sign s. This is the count sketch of Charikar, Chen and Farach-Colton (2002,
section 3) as a sparse embedding of matrices (Clarkson and Woodruff 2013, section 2): for a D fixed beforehand, |D ST|^2
has the expected value tr(D G DT), G being the sum of w x xT. Dense random signs have the same variance, 2 / num_rows
times the squared products of different tokens, and cost `num_rows` times as much. A token's own energy is exact in
both, so heavy tokens add no noise.

Sums that are at hand anyway take most of the noise away (`Sketch.factor`): the mean token, which is what tokens have in
common, is taken out and enters exactly, and each channel's energy is set to what was seen. Row and sign come from a
counter-based hash of the token's place in the data, so that a sketch does not depend on who computes it, and
sketches merge by sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gs_dist.model.token_sample import token_keys

__all__ = ["DEFAULT_ROWS", "Sketch", "rows_and_signs", "sketch_nbytes"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

DEFAULT_ROWS = 256

# Rows are stored and merged in bfloat16. Each merge rounds, at the same place of the tree whoever computes it; what
# that adds, 1e-5 of the energy, is far below the sketch's own noise, and half of what moves and is kept is spared.
_STORED = np.dtype(ml_dtypes.bfloat16)


def sketch_nbytes(num_rows: int, channels: int) -> int:
    """Bytes of a sketch as it is merged and kept."""
    return num_rows * (channels * _STORED.itemsize + 8) + 2 * 8 * channels + 8


def rows_and_signs(places: npt.NDArray[np.int64], num_rows: int) -> tuple[npt.NDArray[np.intp], Float32]:
    """Row (below `num_rows`) and sign (1 or -1) of each token; places as `token_sample.token_ids` gives them."""
    bits = token_keys(places)
    rows = ((bits >> np.uint64(32)) % np.uint64(num_rows)).astype(np.intp)
    signs = np.where(bits & np.uint64(1), np.float32(1.0), np.float32(-1.0))
    return rows, signs


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """Sums over tokens x of weight w. All fields merge by sum.

    Attributes:
        rows: S, (num_rows, channels) bfloat16.
        ones: (num_rows,) float64, what a channel that is 1 at every token would have in S.
        total: (channels,) float64, sum of w x.
        squares: (channels,) float64, sum of w x^2.
        weight: (1,) float64, sum of w.
    """

    rows: Array
    ones: Array
    total: Array
    squares: Array
    weight: Array

    @classmethod
    def of_sums(cls, rows: Float32, ones: Array, total: Array, squares: Array, weight: float) -> Sketch:
        """The sketch of sums that were made in float32 or float64."""
        return cls(
            rows=rows.astype(_STORED),
            ones=np.asarray(ones, dtype=np.float64),
            total=np.asarray(total, dtype=np.float64),
            squares=np.asarray(squares, dtype=np.float64),
            weight=np.array([weight], dtype=np.float64),
        )

    @property
    def channels(self) -> int:
        """Of the activation."""
        return int(self.rows.shape[1])

    def merge(self, other: Sketch, *, in_place: bool = False) -> Sketch:
        """The sketch of both sets of tokens; with `in_place` the arrays of `self` are reused.

        Raises:
            ValueError: sketches of different shapes.
        """
        if self.rows.shape != other.rows.shape:
            raise ValueError(f"sketches of shapes {self.rows.shape} and {other.rows.shape} do not merge")
        merged = {}
        for name, mine in self.to_arrays().items():
            theirs = getattr(other, name)
            merged[name] = np.add(mine, theirs, out=mine) if in_place else np.add(mine, theirs)
        return Sketch(**merged)

    @cached_property
    def factor(self) -> Float32:
        """F, (num_rows + 1, channels) float32: |D FT|^2 is about tr(D G DT), and exact for a D that is zero but for one
        channel, or that sees only the mean token.

        The mean token m = total / weight is taken out of every row of S, which leaves a sketch of the tokens' distances
        from it, and is a row of its own. Channels are then scaled to the energies that were summed exactly.
        """
        weight = max(float(self.weight[0]), 0.0)
        mean = self.total / weight if weight > 0 else np.zeros_like(self.total)
        factor = np.empty((len(self.rows) + 1, self.channels), dtype=np.float32)
        factor[:-1] = self.rows
        factor[:-1] -= self.ones.astype(np.float32)[:, None] * mean.astype(np.float32)
        seen = np.einsum("ij,ij->j", factor[:-1], factor[:-1], dtype=np.float64)
        left = np.maximum(self.squares - weight * mean**2, 0.0)
        ratio = np.sqrt(np.divide(left, seen, out=np.zeros_like(left), where=seen > 0))
        factor[:-1] *= ratio.astype(np.float32)
        factor[-1] = mean * np.sqrt(weight)
        return factor

    def to_arrays(self) -> dict[str, Array]:
        """Field name to array."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Sketch:
        """Inverse of `to_arrays`."""
        return cls(**arrays)
