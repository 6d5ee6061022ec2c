"""Workers in the test's own process, behind the protocol that the coordinator knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gs_dist.errors import WorkerLostError
from gs_dist.runtime.workers import WorkerKey


@dataclass(eq=False)
class _Reference:
    value: Any = None
    error: BaseException | None = None


class InlineWorkerGroup:
    """Runs each call at once.

    `loses_worker_at` may say of a call that its worker is lost, `room` how many more replicas there is room for.
    """

    def __init__(
        self,
        make: Callable[[int, int], Any],
        *,
        num_stages: int,
        num_replicas: int,
        loses_worker_at: Callable[[WorkerKey, str], bool] = lambda key, method: False,
        room: Callable[[], int] = lambda: 0,
    ) -> None:
        self._workers = {
            WorkerKey(stage, replica): make(stage, replica)
            for stage in range(num_stages)
            for replica in range(num_replicas)
        }
        self._loses_worker_at = loses_worker_at
        self._room = room
        self.num_replicas = num_replicas
        self.calls: list[tuple[WorkerKey, str]] = []

    def room_for(self, limit: int) -> int:
        return min(limit, self._room())

    def call(self, key: WorkerKey, function: Callable[..., Any], *args: Any) -> _Reference:
        method = function.__name__
        self.calls.append((key, method))
        if self._loses_worker_at(key, method):
            return _Reference(error=WorkerLostError(f"{key} died"))
        broken = next((arg.error for arg in args if isinstance(arg, _Reference) and arg.error), None)
        if broken is not None:
            return _Reference(error=broken)
        values = [arg.value if isinstance(arg, _Reference) else arg for arg in args]
        try:
            return _Reference(value=getattr(self._workers[key], method)(*values))
        except Exception as error:
            return _Reference(error=error)

    def wait(self, references: Sequence[_Reference], timeout: float) -> list[_Reference]:
        return list(references)

    def get(self, reference: _Reference) -> Any:
        if reference.error is not None:
            raise reference.error
        return reference.value

    def close(self) -> None:
        self._workers.clear()
