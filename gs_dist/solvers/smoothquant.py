"""SmoothQuant: moves outliers of an activation's channels into the weights that read it.

Xiao et al. 2022, equation 4, with golden-stick's handling of channels that are silent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.results.quantized import Float32

__all__ = ["LARGEST_SCALE", "SMALLEST_SCALE", "smoothing_scale"]

SMALLEST_SCALE = 1e-5
LARGEST_SCALE = 1e15  # only columns that are all but zero ask for more, and float32 has to hold what is scaled


def smoothing_scale(activation_max: npt.NDArray[Any], weight_max: npt.NDArray[Any], alpha: float) -> Float32:
    """Scale s of each input channel: x is divided by it, the weight's column multiplied.

    s_j = max(max|x_j|^alpha / max|W_:j|^(1 - alpha), 1e-5), and 1 where either power is 0; at most 1e15.

    Args:
        activation_max: (in,) largest magnitude of each channel over all tokens.
        weight_max: (in,) largest magnitude of each column over all weights that read the input.
        alpha: migration strength, 0 (all difficulty stays in the activation) to 1.
    """
    upper = np.asarray(activation_max, dtype=np.float64) ** alpha
    lower = np.asarray(weight_max, dtype=np.float64) ** (1.0 - alpha)
    silent = (upper == 0) | (lower == 0)
    with np.errstate(over="ignore"):
        scale = np.clip(upper / np.where(silent, 1.0, lower), SMALLEST_SCALE, LARGEST_SCALE)
    return np.where(silent, 1.0, scale).astype(np.float32)
