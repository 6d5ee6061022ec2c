"""Rotary embeddings as data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RopeScaling", "Rotary"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """`rope_scaling` of type llama3 (transformers `_compute_llama3_parameters`) or linear."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """The rotary embedding of an attention: base, channels of a head that it turns, and how it is stretched."""

    theta: float
    channels: int
    scaling: RopeScaling | None = None
