"""Which Ascend card a worker's process sees: each its own, whatever Ray leaves undone."""

from __future__ import annotations

import os

import pytest
import ray
from ray.cluster_utils import Cluster

from gs_dist.calibration.device import VISIBLE_CARDS
from gs_dist.errors import ClusterError
from gs_dist.runtime.cards import CardsSeen, check_cards, see_only
from gs_dist.runtime.worker_group import RayWorkerGroup
from gs_dist.runtime.workers import WorkerKey

NOSET = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"


@pytest.mark.ray
@pytest.mark.parametrize("of_node", ["", "4,5,7"])
def test_each_worker_sees_a_card_of_its_own_where_ray_sets_none(of_node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real cluster of three cards that do not exist, also where the node itself sees some of its cards alone."""

    class SeesCards:  # in here, so that it travels to workers, which do not have this file
        """Stands for a worker whose device is opened when it is made."""

        def __init__(self, stage: int, replica: int) -> None:
            self._cards = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "")

        def cards(self) -> str:
            """What the driver would have been told."""
            return self._cards

    monkeypatch.setenv(NOSET, "1")
    if of_node:
        monkeypatch.setenv(VISIBLE_CARDS, of_node)
    ray.init(address="local", num_cpus=3, resources={"NPU": 3}, include_dashboard=False, log_to_driver=False)
    try:
        group = RayWorkerGroup(
            SeesCards, num_stages=3, num_replicas=1, min_replicas=1, num_threads=1, npus=1, timeout=60.0
        )
        try:
            seen = [group.get(group.call(WorkerKey(stage, 0), SeesCards.cards)) for stage in range(3)]
        finally:
            group.close()
    finally:
        ray.shutdown()
    assert sorted(seen) == (of_node or "0,1,2").split(",")


@pytest.mark.ray
def test_workers_of_any_kind_that_would_share_a_card_are_refused_before_they_open_it() -> None:
    """Two nodes of a real cluster on one machine, each of which deals out its card 0; as two containers do."""

    class OpensTheCard:
        """Stands for a stage's worker and an evaluation's."""

        def __init__(self, stage: int, replica: int) -> None:
            raise AssertionError("a card was opened")

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1, resources={"NPU": 1})
        ray.init(address=nodes.address, log_to_driver=False)
        with pytest.raises(ClusterError, match=r"would both run on card 0 of node .*another container of the"):
            RayWorkerGroup(
                OpensTheCard, num_stages=2, num_replicas=1, min_replicas=1, num_threads=1, npus=1, timeout=60.0
            )
    finally:
        ray.shutdown()
        nodes.shutdown()


def sight(node: str, cards: str) -> CardsSeen:
    return CardsSeen(node=node, cards=cards)


def test_two_workers_of_a_node_do_not_share_a_card() -> None:
    """Both are named, with card and node; the same number on another node is another card."""
    check_cards({"stage 0": sight("a", "0"), "stage 1": sight("a", "1"), "stage 2": sight("b", "0")})
    with pytest.raises(ClusterError, match="stage 0 and stage 2 would both run on card 1 of node a"):
        check_cards({"stage 0": sight("a", "1"), "stage 1": sight("a", "0"), "stage 2": sight("a", "1,2")})
    with pytest.raises(ClusterError, match=r"stage 1 \(node b\) was given no Ascend card"):
        check_cards({"stage 0": sight("a", "1"), "stage 1": sight("b", "")})


def test_a_worker_without_cards_leaves_its_environment() -> None:
    """On a CPU nothing is set."""
    environment: dict[str, str] = {}
    see_only([], environment)
    assert environment == {}
    see_only(["3", "2"], environment)
    assert environment == {VISIBLE_CARDS: "2,3"}
