"""What happened to an input of linears, and how its statistics follow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gs_dist.model.decoder import LayerInput
from gs_dist.model.statistics import InputStatistics, StatisticsSettings
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import Float32
from gs_dist.solvers import activation_range, output_error
from gs_dist.solvers.activation_range import ActivationRange
from gs_dist.solvers.bias_correction import ChannelMeans
from gs_dist.solvers.folding import source_channels
from gs_dist.solvers.objective import Objective, corrected_objective, told_by
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = ["Rescaling"]

_LEAST_LEFT = 0.002  # of an error remains at least: means are known to some percent of the values, errors are squares


@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """What was done to an input: its readers now see (x - shift) / scale.

    `explicit` tells that nothing before the input absorbs this, so that whoever runs the layer does it.
    `means` is set where the readers' biases take up the shift and the mean of the weights' error.
    """

    scale: Float32 | None = None
    shift: Float32 | None = None
    explicit: bool = False
    means: ChannelMeans | None = None
    notes: tuple[str, ...] = ()

    @property
    def inverse(self) -> Float32 | None:
        """1 / scale (in,), None where nothing was rescaled."""
        return None if self.scale is None else (1.0 / self.scale.astype(np.float64)).astype(np.float32)

    def ranges_of(self, statistics: InputStatistics) -> InputStatistics:
        """Statistics of (x - shift) / scale without second moments and histogram.

        The sum of squares of a shifted channel is exact where the channel keeps one sign; otherwise its
        mean is taken as 0, because the statistics hold no plain sum.
        """
        light = statistics.only(StatisticsSettings(gram=False))
        if self.shift is not None:
            low, high = light.minimum - self.shift, light.maximum - self.shift
            reach = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
            sign = np.where(light.minimum >= 0, 1.0, np.where(light.maximum <= 0, -1.0, 0.0))
            shift = self.shift.astype(np.float64)
            squares = light.sum_squares - 2.0 * shift * sign * light.sum_abs + light.num_tokens * shift**2
            squares = np.clip(squares, 0.0, light.num_tokens * reach**2)
            light = replace(light, minimum=low, maximum=high, sum_squares=squares)
        return light if self.scale is None else light.scaled(self.scale)

    def of_source(self, statistics: InputStatistics, layer_input: LayerInput) -> InputStatistics:
        """Statistics of the source linear's output after this was folded into it."""
        rows = Rescaling(
            scale=None if self.scale is None else source_channels(self.scale, layer_input),
            shift=None if self.shift is None else source_channels(self.shift, layer_input),
        )
        return rows.ranges_of(statistics)

    def weight_error(
        self,
        change: Float32,
        statistics: InputStatistics,
        *,
        by_token: bool = False,
        threads: Threads = ONE_THREAD,
    ) -> float:
        """Squared output error over all tokens of a change (out, in) of the rescaled weight.

        With `by_token` each token counts by 1 / x.x. A shift does not enter, because the bias gives back what the
        rounded weight makes of it. What a corrected bias takes out is left out; means are estimates, and so is that.
        """
        error = output_error.output_energy(
            change, told_by(statistics, by_token=by_token), self.inverse, threads=threads
        )
        return self.left_of(error, self.taken_out(change, by_token=by_token))

    def taken_out(self, change: Float32, *, by_token: bool = False) -> float:
        """Part of the squared output error of a change (out, in) that a corrected bias takes out; adds up over rows."""
        return 0.0 if self.means is None else self.means.corrected(change, self.inverse, by_token=by_token)

    def left_of(self, error: float, taken: float) -> float:
        """What a corrected bias leaves of a whole linear's squared output error; it may say so of too little."""
        return error if self.means is None else max(error - taken, _LEAST_LEFT * error)

    def bias_of(self, restored: Float32, weight: Float32, bias: Float32 | None) -> Float32 | None:
        """A reader's bias (out,) after the shift and the correction of its mean error.

        Args:
            restored: (out, in) the rounded weight of the rescaled input.
            weight: likewise, before rounding.
            bias: (out,) as folded, or None.
        """
        if self.means is None:
            return bias
        total = np.zeros(len(weight)) if bias is None else bias.astype(np.float64)
        total -= self.means.correction(restored - weight, self.inverse)
        if self.shift is not None:
            total += restored @ (self.shift if self.inverse is None else self.shift * self.inverse)
        return np.asarray(total, dtype=np.float32)

    def objective(self, statistics: InputStatistics) -> Objective:
        """What weight solvers minimise, of the rescaled input.

        Raises:
            UserError: no second moments were taken.
        """
        objective, inverse = corrected_objective(statistics), self.inverse
        return objective if inverse is None else objective.scaled(inverse)

    def rounding(
        self,
        policy: QuantPolicy,
        statistics: InputStatistics,
        static: ActivationRange | None,
        *,
        by_token: bool = False,
    ) -> npt.NDArray[np.float64] | None:
        """Expected sum over tokens of the squared rounding error of each channel; None if x stays float.

        With `by_token` each token counts by 1 / x.x, as in the weighted second moments.
        """
        if policy.act_quant_dtype is None:
            return None
        if static is not None and statistics.histogram is not None:
            return activation_range.channel_rounding(
                statistics, self.scale, static, by_token=by_token, shift=self.shift
            )
        seen = self.ranges_of(statistics)
        energy = activation_range.typical_energy(statistics) if by_token and static is not None else 1.0
        if by_token and statistics.weighted_squares is not None:
            inverse = 1.0 if self.scale is None else 1.0 / self.scale.astype(np.float64)
            seen = replace(seen, sum_squares=statistics.weighted_squares * inverse**2)
        step = static.scale**2 if static is not None else output_error.per_token_step_squared(seen)
        return output_error.static_rounding(seen, step / max(energy, 1e-30))
