"""Activations rounded to int8 and back, written apart from the product: what its integers are held against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


def fake_quantize_static(x: Float32, scale: float, zero_point: int | None = None) -> Float32:
    """Activations rounded to int8 with one scale and back, float32, shape kept."""
    zero = np.float32(zero_point or 0)
    codes = np.clip(np.rint(x / np.float32(scale) + zero), -128, 127)
    return np.asarray((codes - zero) * np.float32(scale), dtype=np.float32)


def fake_quantize_per_token(x: Float32) -> Float32:
    """Activations (..., channels) rounded to int8 with the scale absmax/127.5 of each token, and back."""
    wide = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    scale = np.where(wide > 0, wide / 127.5, 1.0).astype(np.float32)
    return np.asarray(np.clip(np.rint(x / scale), -128, 127) * scale, dtype=np.float32)
