"""Static ranges of activations by least error. The kernel is `gs_dist.solvers.activation_range`."""

from __future__ import annotations

__all__ = ["RATIOS"]

# Ranges tried: the largest value seen times 2^(-i/16), down to 2^-12 of it.
RATIOS = tuple(2.0 ** (-i / 16) for i in range(12 * 16 + 1))
