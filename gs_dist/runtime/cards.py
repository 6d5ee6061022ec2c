"""Which Ascend card a worker's process sees.

Ray gives each worker card numbers and, as a rule, lets its process see these alone. Where
RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES is set it does not, and every process would take the first card of
its node (ray/_private/accelerators/npu.py).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from gs_dist.calibration.device import VISIBLE_CARDS
from gs_dist.errors import ClusterError

__all__ = ["CardsSeen", "check_cards", "see_only"]


@dataclass(frozen=True, kw_only=True)
class CardsSeen:
    """The Ascend cards that a worker's process sees on its node, "" for none."""

    node: str
    cards: str

    @classmethod
    def here(cls) -> CardsSeen:
        """Of this process."""
        return cls(node=platform.node(), cards=os.environ.get(VISIBLE_CARDS, ""))


def see_only(cards: Sequence[str], environment: MutableMapping[str, str]) -> None:
    """Has this process see the cards that Ray gave it and no others, whether or not Ray did so itself.

    Args:
        cards: numbers that Ray gave; none for a worker that asked for none.
        environment: of this process, in which no card was used yet.
    """
    if cards:
        environment[VISIBLE_CARDS] = ",".join(sorted(cards))


def check_cards(workers: Mapping[Any, CardsSeen]) -> None:
    """Refuses workers that would share a card; it is asked before any of them opens its own.

    Args:
        workers: of a job, a probe or an evaluation on Ascend cards.

    Raises:
        ClusterError: two workers of a node see the same card first, or one was given none.
    """
    holders: dict[tuple[str, str], Any] = {}
    for worker, seen in workers.items():
        if not seen.cards:
            raise ClusterError(
                f"{worker} (node {seen.node}) was given no Ascend card: {VISIBLE_CARDS} is not set in its process. "
                "Start that node with its cards as Ray's resource NPU"
            )
        card = (seen.node, seen.cards.split(",")[0])
        other = holders.setdefault(card, worker)
        if other is not worker:
            raise ClusterError(
                f"{other} and {worker} would both run on card {card[1]} of node {seen.node}: another Ray cluster, or "
                f"another container of the same name, uses the node, or {VISIBLE_CARDS} is set in the runtime "
                "environment; leave it unset there"
            )
