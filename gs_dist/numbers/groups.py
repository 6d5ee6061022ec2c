"""Groups of input channels that share a scale."""

from __future__ import annotations

from collections.abc import Sequence

from gs_dist.errors import UserError

__all__ = ["num_groups"]


def num_groups(channels: int, group_size: int, others: Sequence[int] = (64, 128, 256)) -> int:
    """Groups along a weight's input axis; 1 for `group_size` 0 (per channel).

    Args:
        channels: of the input.
        group_size: channels of a group.
        others: sizes to advise where that one does not divide them.

    Raises:
        UserError: the channels do not divide into groups.
    """
    if group_size == 0:
        return 1
    if channels % group_size:
        fit = [str(size) for size in others if size and channels % size == 0]
        write = f"group_size: {' or '.join(fit)}, or " if fit else ""
        raise UserError(
            f"{channels} input channels do not divide into groups of {group_size}: set {write}"
            "weight_quant_granularity: per_channel"
        )
    return channels // group_size
