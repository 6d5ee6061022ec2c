"""Rotary embeddings as data: their frequencies, and the ways in which these are stretched to longer texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

__all__ = ["LinearScaling", "Llama3Scaling", "RopeScaling", "Rotary", "YarnScaling"]

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies divided by `factor` (transformers `_compute_linear_scaling_rope_parameters`)."""

    rope_type: ClassVar[str] = "linear"
    attention_factor: ClassVar[float] = 1.0
    score_factor: ClassVar[float] = 1.0

    factor: float

    def stretched(self, inverse: Float32, theta: float) -> Float32:
        """The frequencies in force, (channels / 2,), of the plain ones."""
        return inverse / np.float32(self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones left, a ramp between.

    Source: transformers `_compute_llama3_parameters`.
    """

    rope_type: ClassVar[str] = "llama3"
    attention_factor: ClassVar[float] = 1.0
    score_factor: ClassVar[float] = 1.0

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def stretched(self, inverse: Float32, theta: float) -> Float32:
        """The frequencies in force, (channels / 2,), of the plain ones."""
        wavelength = np.float32(2 * np.pi) / inverse
        context, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
        smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
        slowed = inverse / np.float32(self.factor)
        mixed = (1 - smooth) * slowed + smooth * inverse
        slow, fast = wavelength > context / low, wavelength < context / high
        return np.where(slow, slowed, np.where(fast, inverse, mixed)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al., 2023, section 3): a ramp over channels, and scores sharpened by the length.

    Source: transformers `_compute_yarn_parameters`, and `yarn_apply_mscale` of DeepSeek's attention.
    """

    rope_type: ClassVar[str] = "yarn"

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    stated_attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.stated_attention_factor is not None:
            return self.stated_attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._sharpness(self.mscale) / self._sharpness(self.mscale_all_dim)
        return self._sharpness(1.0)

    @property
    def score_factor(self) -> float:
        """What an attention that heeds `mscale_all_dim` multiplies scores by."""
        return self._sharpness(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _sharpness(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def stretched(self, inverse: Float32, theta: float) -> Float32:
        """The frequencies in force, (channels / 2,), of the plain ones."""
        channels = 2 * len(inverse)

        def channel_of(rotations: float) -> float:
            turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return channels * math.log(turns) / (2 * math.log(theta))

        low, high = channel_of(self.beta_fast), channel_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, channels - 1)
        if low == high:
            high += 0.001
        place = np.arange(len(inverse), dtype=np.float32)
        ramp = np.clip((place - np.float32(low)) / np.float32(high - low), 0, 1)
        slowed = inverse / np.float32(self.factor)
        return np.asarray(slowed * ramp + inverse * (1 - ramp), dtype=np.float32)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """The rotary embedding of an attention: base, channels of a head that it turns, and how it is stretched.

    `interleaved` pairs channels 0 and 1, 2 and 3 ...; else the first half with the second. Queries are multiplied by
    1 + `growth` * log(1 + floor(position / `growth_length`)) (transformers `get_llama_4_attn_scale`).
    """

    theta: float
    channels: int
    scaling: RopeScaling | None = None
    interleaved: bool = False
    growth: float = 0.0
    growth_length: int = 1

    def frequencies(self) -> Float32:
        """Of each pair of channels, (channels / 2,)."""
        exponent = np.arange(0, self.channels, 2, dtype=np.float32) / np.float32(self.channels)
        inverse: Float32 = np.float32(1.0) / np.power(np.float32(self.theta), exponent)
        return inverse if self.scaling is None else self.scaling.stretched(inverse, self.theta)

    def query_factor(self, tokens: int) -> npt.NDArray[Any]:
        """What the query at each position is multiplied by, (tokens,) float64."""
        turns = np.arange(tokens, dtype=np.float64) // self.growth_length
        return np.asarray(1 + self.growth * np.log1p(turns))

    def waves(self, tokens: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Cosine and sine of each position and pair, (tokens, channels / 2) float64."""
        angle = np.arange(tokens, dtype=np.float32)[:, None] * self.frequencies()[None, :]
        factor = 1.0 if self.scaling is None else self.scaling.attention_factor
        wide = angle.astype(np.float64)
        return np.cos(wide) * factor, np.sin(wide) * factor
