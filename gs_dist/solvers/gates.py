"""What the summary says of an activation that no number of the layer's own shows."""

from __future__ import annotations

import numpy as np

from gs_dist.model.statistics import InputStatistics
from gs_dist.results.quantized import QuantizedLinear
from gs_dist.solvers.rescaling import Rescaling

__all__ = ["dead_input_notes", "is_dead", "lost_channels_notes", "overflow_notes"]

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_NOTED_SHARE = 0.5  # of the channels


def overflow_notes(statistics: InputStatistics, dtype: str) -> tuple[str, ...]:
    """A note where a checkpoint of dtype "float16" has an activation that float16 cannot hold.

    Calibration computes in more than float16, so that it sees what a server would turn into infinity.
    """
    largest = float(statistics.max_abs.max(initial=0.0))
    if dtype != "float16" or largest <= _FLOAT16_MAX:
        return ()
    return (f"the input reaches {largest:.3g}, beyond float16's {_FLOAT16_MAX:.0f}: serve the model in bfloat16",)


def is_dead(statistics: InputStatistics) -> bool:
    """Whether an input was zero in every token: nothing that is relative to its output can be told."""
    return statistics.num_tokens > 0 and not statistics.max_abs.any()


def dead_input_notes(statistics: InputStatistics, solved: QuantizedLinear) -> tuple[str, ...]:
    """A note where the input was zero in every token, and what that means for a static step."""
    if not is_dead(statistics):
        return ()
    told = "the input was zero in every calibration token, so no error can be told"
    if solved.input_scale is None:
        return (told,)
    return (
        f"{told} and no range was seen: the step {solved.input_scale:.3g} is a makeshift, and whatever else a server "
        "sees is cut off. If the layer is not dead by intent, calibrate with other samples, or set "
        "act_quant_granularity: per_token",
    )


def lost_channels_notes(statistics: InputStatistics, rescaling: Rescaling, solved: QuantizedLinear) -> tuple[str, ...]:
    """A note where a static step is so wide that most channels are rounded to zero nearly always.

    One enormous value does that. The relative output error can stay small all the same, because it is
    relative to an energy that the same value makes up.
    """
    if solved.input_scale is None or not statistics.num_tokens or is_dead(statistics):
        return ()
    seen = rescaling.ranges_of(statistics)
    typical = np.sqrt(seen.sum_squares / seen.num_tokens)
    share = float(np.mean(typical < solved.input_scale / 2))
    if share < _NOTED_SHARE:
        return ()
    return (
        f"{share:.0%} of the input's channels are mostly rounded to 0: one step is {solved.input_scale:.3g}, because "
        f"a value of {float(seen.max_abs.max()):.3g} was seen (channel {int(np.argmax(seen.max_abs))}); leave out "
        "that sample, or set outliers_suppression or act_quant_granularity: per_token",
    )
