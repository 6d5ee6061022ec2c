"""What is done to each layer of a job once its statistics are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from gs_dist.checkpoint.manifest import LayerManifest
from gs_dist.results.costs import LayerCosts
from gs_dist.runtime.partial_sums import PartialSums
from gs_dist.runtime.stage_worker import StageWorker
from gs_dist.runtime.workers import Reference, WorkerGroup, WorkerKey, value_of

__all__ = ["JUDGE", "SOLVE", "Task"]

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Task(Generic[Outcome]):
    """One of them.

    Attributes:
        start: has it done to a layer by its owner, given the partial sums of other replicas.
        done: a layer to which it was done is ...
        solved_later: whether every layer is still to be solved when it is done to all.
    """

    start: Callable[[WorkerGroup[StageWorker], WorkerKey, int, list[Reference[PartialSums | None]]], Reference[Outcome]]
    done: str
    solved_later: bool = False


def _solve(
    group: WorkerGroup[StageWorker], owner: WorkerKey, layer: int, others: list[Reference[PartialSums | None]]
) -> Reference[LayerManifest]:
    return group.call(owner, StageWorker.solve, layer, *map(value_of, others))


def _judge(
    group: WorkerGroup[StageWorker], owner: WorkerKey, layer: int, others: list[Reference[PartialSums | None]]
) -> Reference[LayerCosts]:
    return group.call(owner, StageWorker.judge, layer, *map(value_of, others))


SOLVE = Task(_solve, "published")
JUDGE = Task(_judge, "judged", solved_later=True)
