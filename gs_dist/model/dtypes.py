"""The floating-point types that weights, scales and biases have, by their names in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["BFLOAT16", "FLOATS"]

FLOATS: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""`torch_dtype` of config.json, which is NumPy's name too, to the NumPy dtype (bfloat16 by ml_dtypes)."""

BFLOAT16 = FLOATS["bfloat16"]
