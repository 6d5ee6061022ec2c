"""The quadratic form every weight solver minimises: tr(D G DT), the squared output error of a change D of a weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.results.quantized import Float32

__all__ = ["PLAIN_SHARE", "blend", "output_error", "row_errors"]

# Share of the plain Gram matrix in the objective. Alone it is owned by a few tokens of enormous energy, and
# weighted by 1 / x.x those tokens count too little: what they need shows in perplexity. Flat from 0.03 to 0.15.
PLAIN_SHARE = 0.07

# Rows and columns of the products below: large enough for BLAS, small enough that half of G is skipped.
_ROWS, _COLUMNS = 1024, 512


def output_error(delta: npt.NDArray[np.floating[Any]], gram: Float32) -> float:
    """tr(D G DT): the squared error of the output, summed over the tokens of the Gram matrix.

    G is symmetric, so only its upper blocks are multiplied.

    Args:
        delta: (out, in) float32.
        gram: (in, in) float32, symmetric.
    """
    total = 0.0
    for top in range(0, len(delta), _ROWS):
        rows = np.ascontiguousarray(delta[top : top + _ROWS], dtype=np.float32)
        total += float(row_errors(rows, gram).sum())
    return total


def row_errors(delta: Float32, gram: Float32) -> npt.NDArray[np.float64]:
    """Errors d G dT of every row d of `delta` (rows, in): (rows,) float64."""
    errors = np.zeros(len(delta))
    for left in range(0, delta.shape[1], _COLUMNS):
        right = min(left + _COLUMNS, delta.shape[1])
        block = delta[:, left:right]
        product = block @ gram[left:right, left:right]
        if left:
            product += 2.0 * (delta[:, :left] @ gram[:left, left:right])
        errors += np.einsum("ij,ij->i", product, block)
    return errors


def blend(gram: Float32, weighted_gram: Float32 | None, *, share: float = PLAIN_SHARE) -> Float32:
    """Mixture of the plain and the token-weighted Gram matrix, each divided by its trace, times their channels.

    Args:
        gram: (in, in) float32.
        weighted_gram: likewise, or None: then `gram` counts alone.
        share: of the plain matrix, 0 to 1.

    Returns:
        A new matrix; one of the arguments itself where the other has no say.
    """
    if weighted_gram is None or share >= 1.0:
        return gram
    if share <= 0.0:
        return weighted_gram
    plain, weighted = float(np.trace(gram, dtype=np.float64)), float(np.trace(weighted_gram, dtype=np.float64))
    if not (plain > 0 and weighted > 0):
        return gram
    channels = len(gram)
    mixed = gram * np.float32(share * channels / plain)
    mixed += weighted_gram * np.float32((1.0 - share) * channels / weighted)
    return np.asarray(mixed, dtype=np.float32)
