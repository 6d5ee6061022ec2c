"""What rounding a linear costs at its output, from statistics alone.

For a weight error D = Q(W) - W, the summed squared output error over all tokens is tr(D G DT) with G the
sum of x xT, without a second pass of the data (`gs_dist.solvers.objective`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.model.statistics import InputStatistics
from gs_dist.results.quantized import Float32
from gs_dist.solvers.affine import row_blocks
from gs_dist.solvers.objective import Objective
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = ["activation_term", "column_energy", "output_energy", "per_token_step_squared", "static_rounding"]

Array = npt.NDArray[Any]


def output_energy(
    matrix: Float32,
    objective: Objective,
    inverse_scale: Array | None = None,
    *,
    threads: Threads = ONE_THREAD,
) -> float:
    """tr(M G MT) of a matrix (out, in): sum over tokens of |M x|^2.

    Args:
        matrix: (out, in) float32.
        objective: what is known of G.
        inverse_scale: (in,) 1/s, where the matrix belongs to x / s and the statistics to x. Rescaling the
            rows worked on spares a second Gram matrix, which of a wide layer takes gigabytes.
        threads: take some 16 MiB of rows at a time; the work is matrix multiplication.
    """

    def energy(block: slice) -> float:
        rows = matrix[block] if inverse_scale is None else matrix[block] * inverse_scale.astype(np.float32)
        return objective.error(rows)

    total = 0.0
    for part in threads.map(energy, row_blocks(*matrix.shape)):
        total += part
    return max(total, 0.0)


def column_energy(weight: Float32) -> npt.NDArray[np.float64]:
    """|W_:j|^2 of each column (in,) float64: what an error in channel j costs at the output."""
    total = np.zeros(weight.shape[1])
    for block in row_blocks(*weight.shape):
        total += np.einsum("ij,ij->j", weight[block], weight[block], dtype=np.float64)
    return total


def static_rounding(statistics: InputStatistics, step_squared: float) -> npt.NDArray[np.float64]:
    """Expected sum over tokens of (q(x_j) - x_j)^2 for a step d, without clipping: (in,).

    Rounding to a grid of step d costs d^2/12 a value where values spread over many steps, and never more
    than the value itself, which rounds to 0 at worst: the lesser of the two.
    """
    return np.minimum(statistics.num_tokens * step_squared / 12.0, statistics.sum_squares)


def per_token_step_squared(statistics: InputStatistics) -> float:
    """Estimate of the mean squared step of dynamic per-token int8, E[(max_j |x_j|)^2] / 127.5^2.

    The statistics hold no token by itself. Of independent normal channels the k loudest, none below
    variance v_k, reach a squared maximum of about v_k (1 + 2 ln k); the largest of these over k is taken,
    and it is bounded by a token's mean energy and by the largest value seen.
    """
    mean_squares = np.sort(statistics.sum_squares)[::-1] / max(statistics.num_tokens, 1)
    ranks = np.arange(1, mean_squares.size + 1)
    peak = float(np.max(mean_squares * (1.0 + 2.0 * np.log(ranks))))
    bound = min(float(mean_squares.sum()), float(statistics.max_abs.max()) ** 2)
    return min(peak, bound) / 127.5**2


def activation_term(columns: Array, rounding: Array) -> float:
    """Output error that rounded activations add: sum_j |Q(W)_:j|^2 sum_t (q(x_j) - x_j)^2.

    Rounding errors of different channels are taken as uncorrelated with each other and with the weights'.
    """
    return float(columns @ rounding)
