"""What a job learns of the cluster that it joins."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.runtime.cluster import cluster

GIB = 1 << 30


def node(*, alive: bool = True, **resources: float) -> dict[str, Any]:
    """As `ray.nodes()` tells of it."""
    return {"Alive": alive, "Resources": {"object_store_memory": 1e9, "node:10.0.0.1": 1.0, **resources}}


HEAD = node(memory=32 * GIB)  # KubeRay's with `num-cpus: "0"`
ASCEND = node(CPU=160.0, NPU=8.0, memory=768.0 * GIB)
PLAIN = node(CPU=16.0, memory=64.0 * GIB)


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ([HEAD, ASCEND, ASCEND], ClusterFacts(num_cpus=320, num_npus=16, memory_bytes=1536 * GIB, num_nodes=2)),
        ([PLAIN, ASCEND], ClusterFacts(num_cpus=160, num_npus=8, memory_bytes=768 * GIB)),
        (
            [HEAD, PLAIN, PLAIN, node(alive=False, CPU=16.0, memory=64.0 * GIB)],
            ClusterFacts(num_cpus=32, num_npus=0, memory_bytes=128 * GIB, num_nodes=2),
        ),
        ([HEAD], ClusterFacts(num_cpus=1, num_npus=0, memory_bytes=0)),
    ],
)
def test_only_nodes_that_hold_workers_are_counted(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]], found: ClusterFacts
) -> None:
    """Memory of a head without cores, of nodes without cards beside some with, and of dead ones carries no worker."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with cluster("10.0.0.1:6379", None) as facts:
        assert facts == found
