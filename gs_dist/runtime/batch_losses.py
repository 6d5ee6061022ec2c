"""What the last stage of a model under evaluation tells of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["BatchLosses", "Divergences"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Divergences:
    """Of each predicted token, sample by sample.

    Attributes:
        kl: KL(float model || published one) of the next token's distribution in nats, float32.
        equal: whether both models have the same most likely token, bool.
    """

    kl: npt.NDArray[np.float32]
    equal: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class BatchLosses:
    """Of each sample.

    Attributes:
        losses: negative log likelihood in nats, summed over the sample's predicted tokens.
        tokens: how many those are.
        divergences: from the float model; None for itself, and where it was not run before.
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    divergences: Divergences | None = None
