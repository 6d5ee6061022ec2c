"""How a symmetric int8 step is made of a token's largest magnitude, while the model runs."""

from __future__ import annotations

from enum import Enum

__all__ = ["TokenStep"]


class TokenStep(Enum):
    """What a token's largest magnitude is divided by, so that it becomes the largest code.

    `OVER_127_5`: half of all 255 steps of int8, compressed-tensors `quantization/utils/helpers.py`
    (calculate_qparams). `OVER_127`: the largest code itself, as kernels of engines have it.
    """

    OVER_127_5 = 127.5
    OVER_127 = 127.0
