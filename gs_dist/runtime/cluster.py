"""The Ray cluster that a job runs on: joined or started, and what it holds."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from gs_dist.errors import ClusterError
from gs_dist.planning.cluster_facts import ClusterFacts

__all__ = ["cluster"]

_PATIENCE = 10.0  # seconds for a cluster's head to take a connection


def _refuse_silence(address: str) -> None:
    """Ray tries for minutes to reach a head; whether anything listens is known in a moment."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d{1,5})", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_PATIENCE).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ClusterError(
            f"no Ray cluster answers at {address!r} ({reason}): start one with `ray start --head`, check --address, "
            "or leave it out to run on this machine"
        ) from error


def _held() -> ClusterFacts:
    """What the nodes hold that workers may be placed on: those with cards where there are any, else those with cores.

    A head that is kept free of workers (KubeRay's, with `num-cpus: "0"`) has memory that no worker can use.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    nodes = [node for node in nodes if node.get("NPU", 0) >= 1] or nodes
    return ClusterFacts(
        num_cpus=int(sum(node["CPU"] for node in nodes)) or 1,
        num_npus=int(sum(node.get("NPU", 0) for node in nodes)),
        memory_bytes=int(sum(node.get("memory", 0) for node in nodes)),
        num_nodes=len(nodes) or 1,
    )


@contextmanager
def cluster(address: str | None, num_cpus: int | None) -> Iterator[ClusterFacts]:
    """Joins the Ray cluster at `address`, or starts one here; gives what it holds.

    Args:
        address: None to start one.
        num_cpus: CPUs of a cluster started here; may be more than the machine has, then workers share them.

    Raises:
        ClusterError: nothing answers at `address`.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    already = ray.is_initialized()
    if not already:
        if address is None:
            # A cluster for one job on one machine: nothing listens that anyone could reach.
            options |= {"address": "local", "include_dashboard": False}
            options |= {"num_cpus": max(num_cpus or 1, len(os.sched_getaffinity(0)))}
        else:
            options |= {"address": address}
            _refuse_silence(address)
        try:
            ray.init(**options)
        except Exception as error:
            raise ClusterError(
                f"no Ray cluster answers at {address!r}: {str(error).strip().splitlines()[0]}; start one with "
                "`ray start --head`, check --address, or leave it out to run on this machine"
            ) from error
    try:
        facts = _held()
        if address is None:
            facts = dataclasses.replace(facts, memory_bytes=ClusterFacts.of_this_machine().memory_bytes)
        yield facts
    finally:
        if not already:
            ray.shutdown()
