"""How many threads solve a layer: as many as a worker has, or as memory has room for."""

from __future__ import annotations

import bisect

from gs_dist.planning.memory import MemoryPlan
from gs_dist.planning.spread import Spread
from gs_dist.planning.workload import Workload

__all__ = ["choose_solver_threads"]


def choose_solver_threads(workload: Workload, spread: Spread, most: int) -> tuple[int, tuple[MemoryPlan, ...]]:
    """Threads of a solve, and each stage's memory with their workspace.

    Stages and waves are chosen for solves on one thread, so that threads neither add a pass over the data nor
    refuse a job: they take what room is left. The largest number counts that keeps every stage within what a
    worker may use. Solves take host memory, on a card's worker too; where its nodes are not known, nothing limits
    them but `most`, and the memory that they need is told like everything else.

    Args:
        workload: of the job.
        spread: its stages, planned for solves on one thread.
        most: threads of a worker.
    """
    alone = workload.solver_bytes(1)

    def memory(num_threads: int) -> tuple[MemoryPlan, ...]:
        more = [shared - one for shared, one in zip(workload.solver_bytes(num_threads), alone, strict=True)]
        return tuple(
            choice.memory.with_solver_bytes(max(more[layer] for wave in choice.waves for layer in wave))
            for choice in spread.choices
        )

    def exceeds(num_threads: int) -> bool:
        return any(
            plan.peak > spread.memory_per_worker
            or (spread.host_memory is not None and plan.host_peak > spread.host_memory)
            for plan in memory(num_threads)
        )

    # Memory grows with the number of threads: those of 2 to `most` that fit come first.
    chosen = 1 + bisect.bisect_left(range(2, most + 1), True, key=exceeds)
    return chosen, memory(chosen)
