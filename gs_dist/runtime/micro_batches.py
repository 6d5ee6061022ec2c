"""Micro-batches on their way through a chain of workers: in order, and a bounded number at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from gs_dist.runtime.workers import Reference, WorkerGroup

__all__ = ["MicroBatchQueue"]

T = TypeVar("T")


class MicroBatchQueue(Generic[T]):
    """Those of one replica: still to be sent, under way, and done.

    Args:
        micro_batches: what each is known by, in order.
        send: starts one and gives the reference of what comes out at the chain's end.
        max_in_flight: how many may be under way.
    """

    def __init__(self, micro_batches: Iterable[int], send: Callable[[int], Reference[T]], max_in_flight: int) -> None:
        self._waiting = deque(micro_batches)
        self._send = send
        self._max_in_flight = max_in_flight
        self._in_flight: dict[Reference[Any], int] = {}
        self.total = len(self._waiting)
        self.results: dict[int, T] = {}

    @property
    def finished(self) -> bool:
        """Whether all are done."""
        return len(self.results) == self.total

    def fill(self) -> list[Reference[T]]:
        """Sends as many as may be under way; references of all that are."""
        while self._waiting and len(self._in_flight) < self._max_in_flight:
            micro_batch = self._waiting.popleft()
            self._in_flight[self._send(micro_batch)] = micro_batch
        return list(self._in_flight)

    def take(self, group: WorkerGroup[Any], reference: Reference[Any]) -> bool:
        """Takes in what is ready; False for a reference of something else.

        Raises:
            Exception: as of `WorkerGroup.get`.
        """
        if reference not in self._in_flight:
            return False
        value = group.get(reference)
        self.results[self._in_flight.pop(reference)] = value
        return True
