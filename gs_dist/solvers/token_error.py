"""What single tokens lose, computed as an engine computes: the rounded input times the rounded weight.

An error summed over all tokens says nothing of ordinary ones where a few of enormous energy own the sum, as they do
in trained models: a step that rounds every other token to zero can look harmless, and a range that serves all others
ruinous. The median over a sample of tokens cannot be bought by a few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import Float32
from gs_dist.solvers.activation_range import ActivationRange

__all__ = ["TokenErrors", "median_token_error", "rounded_input", "token_errors"]

Float64 = npt.NDArray[np.float64]

_HALF_STEPS = 127.5  # of a dynamic step, in a token's largest magnitude
_MOST_TIMES = 1e6  # what a token's error counts for at most, relative to its output: one of no output has no ratio


def rounded_input(tokens: Float32, policy: QuantPolicy, static: ActivationRange | None) -> Float32:
    """Inputs (k, in) as the linear reads them: rounded with the static range, token by token, or as they are."""
    if policy.act_quant_dtype is None:
        return tokens
    if static is None:
        step = np.abs(tokens).max(axis=1, keepdims=True) / np.float32(_HALF_STEPS)
        step[step == 0] = 1.0
        return np.asarray(np.clip(np.rint(tokens / step), -128, 127) * step, dtype=np.float32)
    zero = static.zero_point or 0
    codes = np.clip(np.rint(tokens / np.float32(static.scale) + np.float32(zero)), -128, 127)
    return np.asarray((codes - zero) * np.float32(static.scale), dtype=np.float32)


@dataclass(frozen=True)
class TokenErrors:
    """What each of some tokens loses at some of a linear's outputs; sums over outputs are `plus`.

    Attributes:
        lost: (k,) float64, |z - y|^2.
        energy: (k,) float64, |y|^2.
    """

    lost: Float64
    energy: Float64

    def plus(self, other: TokenErrors) -> TokenErrors:
        """Of these outputs and those."""
        return TokenErrors(self.lost + other.lost, self.energy + other.energy)

    @property
    def median(self) -> float:
        """Median over tokens of |z - y|^2 / |y|^2."""
        ratios = np.where(self.lost > 0, self.lost / np.maximum(self.energy, self.lost / _MOST_TIMES), 0.0)
        return float(np.median(ratios))


def token_errors(
    weight: Float32,
    restored: Float32,
    read: Float32,
    rounded: Float32,
    bias_change: npt.NDArray[np.floating[Any]] | None = None,
) -> TokenErrors:
    """What tokens lose, y being the linear's output without bias and z that of its rounded form.

    Args:
        weight: (out, in) before rounding.
        restored: (out, in) after it.
        read: (k, in), what `weight` is multiplied with; k is at least 1.
        rounded: (k, in), what `restored` is multiplied with.
        bias_change: (out,) what the published bias adds to the source's, or None.
    """
    output = read @ weight.T
    change = rounded @ restored.T
    change -= output
    if bias_change is not None:
        change += bias_change
    return TokenErrors(
        lost=np.einsum("ij,ij->i", change, change, dtype=np.float64),
        energy=np.einsum("ij,ij->i", output, output, dtype=np.float64),
    )


def median_token_error(weight: Float32, restored: Float32, read: Float32, rounded: Float32) -> float:
    """`TokenErrors.median` of a whole linear without a bias of its own; arguments as `token_errors` takes them."""
    return token_errors(weight, restored, read, rounded).median
