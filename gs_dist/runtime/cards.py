"""Which Ascend card a worker's process sees.

Ray gives each worker card numbers and, as a rule, lets its process see these alone. Where
RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES is set it does not, and every process would take the first card of
its node (ray/_private/accelerators/npu.py).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from gs_dist.calibration.device import VISIBLE_CARDS
from gs_dist.errors import ClusterError
from gs_dist.runtime.stage_worker import Sight

__all__ = ["check_cards", "see_only"]


def see_only(cards: Sequence[str], environment: MutableMapping[str, str]) -> None:
    """Has this process see the cards that Ray gave it and no others, whether or not Ray did so itself.

    Args:
        cards: numbers that Ray gave; none for a worker that asked for none.
        environment: of this process, in which no card was used yet.
    """
    if cards:
        environment[VISIBLE_CARDS] = ",".join(sorted(cards))


def check_cards(workers: Mapping[Any, Sight]) -> None:
    """Refuses workers that would share a card.

    Args:
        workers: of a job on Ascend cards.

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
