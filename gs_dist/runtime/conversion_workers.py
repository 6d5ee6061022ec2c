"""A conversion spread over the nodes of a Ray cluster: a task a file, dealt as cores become free.

On one machine plain processes (`gs_dist.conversion.pool`) do; Ray is for several. Every node must
see the model and the output at the same paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from gs_dist.checkpoint.part_manifest import PartManifest
from gs_dist.conversion.parts import Part
from gs_dist.conversion.worker import ConversionTask, convert_part
from gs_dist.errors import JobFailure
from gs_dist.runtime.cluster import cluster

__all__ = ["ClusterPool"]

_ATTEMPTS = 4  # at a part, where its worker or node is lost


@dataclass(frozen=True, kw_only=True)
class ClusterPool:
    """Converts parts on a cluster.

    Attributes:
        address: of the cluster; None to start one on this machine.
        workers: parts at a time; None for as many as the cluster has cores.
        memory_per_worker: bytes that a worker stays within, which Ray counts against a node's.
    """

    address: str | None
    workers: int | None
    memory_per_worker: int

    def __call__(self, task: ConversionTask, parts: Iterable[Part], num_workers: int) -> Iterator[PartManifest]:
        """Yields manifests as parts are finished; `num_workers` is of this machine and counts only without address.

        Raises:
            JobFailure: a part's worker was lost again and again; what is finished is kept.
            ClusterError: nothing answers at the address.
        """
        with cluster(self.address, num_workers) as facts:
            room = self.workers or (num_workers if self.address is None else facts.num_cpus)
            remote = ray.remote(num_cpus=1, memory=self.memory_per_worker, max_retries=0)(convert_part)
            waiting = sorted(parts, key=lambda part: (part.nbytes, -part.number))  # taken from the end
            attempts: dict[int, int] = {}
            running: dict[Any, Part] = {}
            shared = ray.put(task)
            while waiting or running:
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
