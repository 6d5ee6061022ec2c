"""Workers by stage and replica, and calls to them that return at once: what the coordinator knows of them.

Ray holds the workers of a job (`worker_group`); tests hold them in their own process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, cast

from gs_dist.errors import WorkerLostError

__all__ = ["NodesChanged", "Reference", "WorkerGroup", "WorkerKey", "as_they_come", "value_of"]

W_co = TypeVar("W_co", covariant=True)
P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Label = TypeVar("Label")


class NodesChanged(Exception):
    """Workers for which there was no room are no longer waited for: the cluster holds other nodes than it did."""


class WorkerKey(NamedTuple):
    """Which worker: a stage of a replica."""

    stage: int
    replica: int

    def __str__(self) -> str:
        return f"stage {self.stage} of replica {self.replica}"


class Reference(Generic[T_co]):
    """Stands for what a call will give. What it is, the group that gave it knows."""


def value_of(reference: Reference[T]) -> T:
    """The reference itself, to be passed to another call of its group in place of its value."""
    return cast(T, reference)


class WorkerGroup(Protocol[W_co]):
    """Holds one worker, a `W_co`, a key."""

    @property
    def num_replicas(self) -> int:
        """Replicas held; may be fewer than asked for."""

    def room_for(self, limit: int) -> int:
        """How many more replicas, `limit` at most, there would be room for now beside those held."""

    def call(
        self, key: WorkerKey, method: Callable[Concatenate[W_co, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Reference[T]:
        """Starts a method on a worker, after everything called on it before.

        Args:
            key: the worker.
            method: of its class or of one that it is derived from, such as `StageWorker.step`.
            *args: `value_of` a reference may stand for a value.
            **kwargs: likewise.
        """

    def wait(self, references: Sequence[Reference[Any]], timeout: float) -> list[Reference[Any]]:
        """References that are ready, at least one unless `timeout` seconds pass first."""

    def get(self, reference: Reference[T]) -> T:
        """Value of a ready reference.

        Raises:
            WorkerLostError: the worker died.
            ClusterError: its node does not hold what a worker is made of.
            Exception: whatever the method raised.
        """

    def close(self) -> None:
        """Ends the workers."""


def as_they_come(
    group: WorkerGroup[Any],
    calls: Mapping[Reference[T], Label],
    timeout: float,
    silence: Callable[[Sequence[Label]], str],
) -> Iterator[tuple[Label, T]]:
    """Labels of calls with what the calls gave, in the order in which that is there.

    Args:
        group: the workers.
        calls: what each call is known by.
        timeout: seconds without any answer after which the workers count as lost.
        silence: what to say then, of the calls not answered.

    Raises:
        WorkerLostError: a worker died, or nothing was answered for `timeout` seconds.
    """
    waiting = dict(calls)
    while waiting:
        ready = group.wait(list(waiting), timeout)
        if not ready:
            raise WorkerLostError(silence(list(waiting.values())))
        for reference in ready:
            yield waiting.pop(reference), group.get(reference)
