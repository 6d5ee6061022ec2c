"""A conversion spread over the nodes of a Ray cluster: a task a file, dealt as cores become free.

On one machine plain processes (`gs_dist.conversion.pool`) do; Ray is for several. Every node must
see the model and the output at the same paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from gs_dist.checkpoint.part_manifest import PartManifest
from gs_dist.conversion.parts import Part
from gs_dist.conversion.worker import ConversionTask, convert_part
from gs_dist.errors import ClusterError, JobFailure
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.recipe.sizes import format_bytes
from gs_dist.runtime.cluster import cluster, nodes_now

__all__ = ["ClusterPool"]

_PATIENCE = 600.0  # seconds for the first node to come
_ATTEMPTS = 4  # at a part, where its worker or node is lost


@dataclass(frozen=True, kw_only=True)
class ClusterPool:
    """Converts parts on a cluster.

    Attributes:
        address: of the cluster; None to start one on this machine.
        workers: parts at a time; None for as many as the cluster has cores.
        memory_per_worker: bytes that a worker stays within, which Ray counts against a node's.
        tell: told where nodes are waited for.
    """

    address: str | None
    workers: int | None
    memory_per_worker: int
    tell: Callable[[str], None] = lambda text: None

    def __call__(self, task: ConversionTask, parts: Iterable[Part], num_workers: int) -> Iterator[PartManifest]:
        """Yields manifests as parts are finished; `num_workers` is of this machine and counts only without address.

        Raises:
            JobFailure: a part's worker was lost again and again; what is finished is kept.
            ClusterError: nothing answers at the address, no node comes, or none has a worker's memory.
        """
        with cluster(self.address, num_workers, device=DeviceKind.CPU, patience=_PATIENCE, tell=self.tell) as facts:
            self._refuse_small_nodes()
            remote = ray.remote(num_cpus=1, memory=self.memory_per_worker, max_retries=0)(convert_part)
            waiting = sorted(parts, key=lambda part: (part.nbytes, -part.number))  # taken from the end
            attempts: dict[int, int] = {}
            running: dict[Any, Part] = {}
            shared = ray.put(task)
            while waiting or running:
                room = self.workers or (num_workers if self.address is None else _cores(facts))
                while waiting and len(running) < room:
                    part = waiting.pop()
                    attempts[part.number] = attempts.get(part.number, 0) + 1
                    running[remote.remote(shared, part)] = part
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                part = running.pop(done)
                manifest = _result(done, part, last=attempts[part.number] == _ATTEMPTS)
                if manifest is None:
                    waiting.append(part)
                else:
                    yield manifest

    def _refuse_small_nodes(self) -> None:
        """A task for which no node has the memory would wait for ever."""
        largest = int(max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]))
        if largest < self.memory_per_worker:
            raise ClusterError(
                f"a worker needs {format_bytes(self.memory_per_worker)}, and the largest node of the cluster has "
                f"{format_bytes(largest)} as Ray counts it: start larger nodes, or give Ray more with --memory"
            )


def _cores(facts: ClusterFacts) -> int:
    """Of the nodes that are there by now."""
    return (nodes_now(DeviceKind.CPU) or facts).num_cpus


def _result(reference: Any, part: Part, *, last: bool) -> PartManifest | None:
    """What a task gave; None where its worker was lost and the part is to be tried again."""
    try:
        manifest: PartManifest = ray.get(reference)
        return manifest
    except ray.exceptions.RayTaskError as error:
        raise error.cause or error from error
    except ray.exceptions.RayError as error:
        if last:
            raise JobFailure(
                f"file {part.number}: its worker was lost {_ATTEMPTS} times ({' '.join(str(error).split()):.200}): "
                "give its nodes more memory, or run the same command again to go on from the files that are finished"
            ) from error
        return None
