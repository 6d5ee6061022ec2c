"""What a bias can take out of a rounded weight's error: its mean over the calibration tokens.

With D = Q(W) - W, the output error D x has the mean D E[x], which a bias that is there anyway gives back
(Nagel et al. 2019, section 4.2; Outlier Suppression+ folds its shift into the same bias). Means are those
of usual tokens: a few enormous ones would drag the plain mean to where no token is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gs_dist.model.statistics import InputStatistics, histogram_magnitudes
from gs_dist.results.quantized import Float32
from gs_dist.solvers import activation_range
from gs_dist.solvers.affine import row_blocks

__all__ = ["ChannelMeans", "channel_means"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ChannelMeans:
    """Means of an input's channels, (in,) each.

    Attributes:
        plain: over all tokens alike.
        usual: each token counting by about 1 / x.x; the mean that a bias takes out.
        num_tokens: tokens seen.
        token_weight: sum over tokens of 1 / x.x.
    """

    plain: Float64
    usual: Float64
    num_tokens: int
    token_weight: float

    def corrected(self, change: Float32, inverse_scale: Float32 | None, *, by_token: bool) -> float:
        """Part of the squared error of `change` (out, in), summed over tokens, that the corrected bias takes out.

        Args:
            change: of the weight of x / s.
            inverse_scale: (in,) 1 / s, None where x is not rescaled.
            by_token: each token counts by 1 / x.x.
        """
        usual, plain = self._moved(change, inverse_scale, self.usual), self._moved(change, inverse_scale, self.plain)
        taken = float(usual @ usual)
        if by_token:
            return self.token_weight * taken
        return self.num_tokens * (2.0 * float(usual @ plain) - taken)

    def correction(self, change: Float32, inverse_scale: Float32 | None) -> Float64:
        """What to subtract from the bias (out,)."""
        return self._moved(change, inverse_scale, self.usual)

    @staticmethod
    def _moved(change: Float32, inverse_scale: Float32 | None, mean: Float64) -> Float64:
        wide = mean if inverse_scale is None else mean * inverse_scale
        vector = wide.astype(np.float32)
        rows = [change[block] @ vector for block in row_blocks(*change.shape)]
        return np.asarray(np.concatenate(rows), dtype=np.float64)


def channel_means(statistics: InputStatistics) -> ChannelMeans:
    """Means from magnitudes where a channel keeps one sign, else from the histogram, to a fraction of its bins' width.

    Without a histogram a channel of both signs counts as one of mean 0, for which nothing is corrected.
    """
    tokens = max(statistics.num_tokens, 1)
    sign = np.where(statistics.minimum >= 0, 1.0, np.where(statistics.maximum <= 0, -1.0, 0.0))
    plain = usual = sign * statistics.sum_abs / tokens
    if statistics.histogram is not None:
        signed = statistics.histogram[:, 1].astype(np.float64) - statistics.histogram[:, 0]
        middle = histogram_magnitudes()
        rough = signed @ middle / tokens
        weights = activation_range.token_weights(statistics)
        usual = (signed @ (middle * weights)) / np.maximum(statistics.histogram.sum(axis=1) @ weights, 1e-30)
        plain = np.where(sign != 0, plain, rough)
        usual = usual + plain - rough  # both means are off by the same bins
    return ChannelMeans(
        plain=np.asarray(plain),
        usual=np.asarray(usual),
        num_tokens=statistics.num_tokens,
        token_weight=_token_weight(statistics),
    )


def _token_weight(statistics: InputStatistics) -> float:
    """Sum over tokens of 1 / x.x, from how much weighting took off most channels' sums of squares."""
    squares = statistics.sum_squares / max(statistics.num_tokens, 1)
    weighted = statistics.weighted_squares
    if weighted is None or not squares.any():
        return statistics.num_tokens / max(activation_range.typical_energy(statistics), 1e-30)
    used = squares > 0
    return float(np.median(weighted[used] / squares[used]))
