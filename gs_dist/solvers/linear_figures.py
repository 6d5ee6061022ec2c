"""What a rounded linear costs: everything that is told of it, a block of its rows at a time.

A block is dequantised once and read by all figures while it is in cache; the weight as it was rounded never exists
as a whole in float32, which of a wide linear takes a gigabyte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gs_dist.model.statistics import InputStatistics
from gs_dist.results.integers import row_blocks
from gs_dist.results.quantized import Float32, QuantizedLinear
from gs_dist.solvers import affine
from gs_dist.solvers.activation_range import ActivationRange
from gs_dist.solvers.objective import plain_objective
from gs_dist.solvers.output_error import column_energy
from gs_dist.solvers.rescaling import Rescaling
from gs_dist.solvers.threads import Threads
from gs_dist.solvers.token_error import TokenErrors, rounded_input, token_errors

__all__ = ["LinearFigures", "linear_figures"]


@dataclass(frozen=True, kw_only=True)
class LinearFigures:
    """Sums over a linear's outputs.

    Attributes:
        energy: over all tokens, |W x|^2.
        error: likewise of the weight's change, before what a corrected bias takes out.
        columns: (in,) float64, |W_:j|^2 of the rounded weight.
        tokens: of the sample of tokens; None where none was taken.
    """

    energy: float
    error: float
    columns: npt.NDArray[np.float64]
    tokens: TokenErrors | None

    def plus(self, other: LinearFigures) -> LinearFigures:
        """Of these outputs and those."""
        both = self.tokens is not None and other.tokens is not None
        return LinearFigures(
            energy=self.energy + other.energy,
            error=self.error + other.error,
            columns=self.columns + other.columns,
            tokens=self.tokens.plus(other.tokens) if both and self.tokens and other.tokens else None,
        )


def linear_figures(
    weight: Float32,
    bias: Float32 | None,
    solved: QuantizedLinear,
    statistics: InputStatistics,
    rescaling: Rescaling,
    input_range: ActivationRange | None,
    *,
    threads: Threads,
) -> LinearFigures:
    """Of a linear as it was solved.

    Args:
        weight: (out, in) of the rescaled input, before rounding.
        bias: (out,) likewise, or None.
        solved: with the bias that is published.
        statistics: of the input before it was rescaled.
        rescaling: of the input.
        input_range: the static range of the rescaled input, or None.
        threads: share the blocks; sums run in their order.
    """
    objective, inverse = plain_objective(statistics), rescaling.inverse
    sample = _sample(solved, statistics, rescaling, input_range)
    moved = None
    if solved.bias is not None:
        moved = solved.bias if bias is None else solved.bias - bias

    def of_outputs(matrix: Float32) -> float:
        return objective.error(matrix if inverse is None else matrix * inverse)

    def of_block(rows: slice) -> LinearFigures:
        block, zero = weight[rows], None if solved.zero_point is None else solved.zero_point[rows]
        restored = affine.dequantize(solved.codes[rows], solved.scale[rows], zero, solved.group_index)
        tokens = None
        if sample is not None:
            tokens = token_errors(block, restored, *sample, None if moved is None else moved[rows])
        columns = column_energy(restored)
        restored -= block
        return LinearFigures(energy=of_outputs(block), error=of_outputs(restored), columns=columns, tokens=tokens)

    first, *others = threads.map(of_block, row_blocks(*weight.shape))
    for other in others:
        first = first.plus(other)
    # Products of a Gram matrix in float32 may sum to less than nothing where next to nothing is lost.
    return replace(first, energy=max(first.energy, 0.0), error=max(first.error, 0.0))


def _sample(
    solved: QuantizedLinear, statistics: InputStatistics, rescaling: Rescaling, input_range: ActivationRange | None
) -> tuple[Float32, Float32] | None:
    """Inputs (k, in) of the sample of tokens as the float linear reads them, and as the rounded one does."""
    tokens = statistics.sample_tokens
    if tokens is None or not len(tokens):
        return None
    inverse = np.float32(1.0) if rescaling.inverse is None else rescaling.inverse
    shifted = tokens if rescaling.shift is None else tokens - rescaling.shift
    rounded = rounded_input(np.asarray(shifted * inverse), solved.policy, input_range)
    return np.asarray(tokens * inverse), rounded
