"""Weight clipping (Lin et al. 2024): the range of each channel or group that leaves the least output error.

The kernel is `gs_dist.solvers.clip`.
"""

from __future__ import annotations

from gs_dist.methods.method import (
    ROUNDED,
    SEARCHED,
    Arguments,
    Method,
    Policy,
    Ratios,
    Work,
    Workspace,
    objective_bytes,
)
from gs_dist.model.statistics import StatisticsSettings

__all__ = ["RATIOS", "Clip", "ClipArguments"]

RATIOS = tuple(1 - i / 20 for i in range(10))  # of Golden Stick's AWQConfig

# Of what is searched against: the mixture of plain and weighted moments, its parts, and the same rescaled. A mixture of
# sketches has the rows of both.
_GRAM_COPIES, _SKETCH_COPIES = 2, 6


class ClipArguments(Arguments):
    """That of Golden Stick's AWQConfig."""

    weight_clip_ratio: Ratios = None
    """Shares of a weight's range that clipping, or GPTQ on groups, chooses among; null is a list of theirs."""


class Clip(Method[ClipArguments]):
    """Searches each range before rounding, unless the rounding method searches them itself."""

    field = "weight_clip"
    name = "true"
    label = "wclip"
    arguments = tuple(ClipArguments.model_fields)

    def statistics(self, policy: Policy[ClipArguments]) -> StatisticsSettings:
        """Blocks along the diagonal."""
        return SEARCHED

    def settled(self, policy: Policy[ClipArguments]) -> dict[str, object]:
        """The ratios."""
        return {"weight_clip_ratio": policy.clip_ratios}

    def workspace(self, policy: Policy[ClipArguments], work: Work) -> Workspace:
        """What is searched against; the tiles are what every thread holds anyway."""
        copies = _SKETCH_COPIES if work.taken.sketches(work.channels) else _GRAM_COPIES
        return Workspace(shared=copies * objective_bytes(work.channels, work.taken))

    def operations(self, policy: Policy[ClipArguments], work: Work) -> int:
        """Each ratio and the whole range, against the whole of each diagonal block, or a sketch."""
        if policy.searches_ranges_on_the_way:
            return 0
        size = policy.group_size or work.channels
        if work.taken.sketches(work.channels):
            size = min(size, 2 * (work.taken.sketch_rows + 1))  # rows of two sketches
        return (1 + len(policy.clip_ratios)) * work.rows * work.channels * (2 * size + ROUNDED)
