"""Lost workers are started again for as long as that leads on."""

from __future__ import annotations

import pytest

from gs_dist.errors import WorkerLostError
from gs_dist.runtime.retry import retry


def run(script: list[tuple[int, bool]], total: int, max_restarts: int) -> tuple[list[int], list[str]]:
    """Attempts that each add so many parts and then lose a worker, or not; the parts, and what was told."""
    finished: list[int] = []
    told: list[str] = []
    attempts = iter(script)

    def attempt() -> None:
        parts, lost = next(attempts)
        finished.extend(range(parts))
        if lost:
            raise WorkerLostError("a worker died")

    retry(
        attempt,
        finished,
        total,
        max_restarts=max_restarts,
        giving_up=lambda failures: f"{failures} in a row, {len(finished)} done",
        going_on=lambda: f"{total - len(finished)} to go",
        tell=told.append,
    )
    return finished, told


def test_a_loss_after_progress_is_none_even_where_no_restart_is_allowed() -> None:
    """Of whatever the parts are: layers of a job, models of a probe."""
    finished, told = run([(1, True), (1, True), (1, False)], total=3, max_restarts=0)
    assert len(finished) == 3
    assert told == ["a worker died; 2 to go", "a worker died; 1 to go"]


def test_losses_without_progress_are_counted_in_a_row() -> None:
    """Progress in between begins a new row; the message says how many there were."""
    run([(0, True), (0, True), (1, True), (0, True), (0, True), (1, False)], total=2, max_restarts=2)
    with pytest.raises(WorkerLostError, match="a worker died; 3 in a row, 1 done"):
        run([(1, True), (0, True), (0, True), (0, True)], total=2, max_restarts=2)
    with pytest.raises(WorkerLostError, match="1 in a row, 0 done"):
        run([(0, True)], total=1, max_restarts=0)


def test_an_attempt_may_end_before_all_is_done() -> None:
    """The next one goes on, and what was lost before does not count any more."""
    finished, told = run([(0, True), (1, False), (0, True), (1, False)], total=2, max_restarts=1)
    assert len(finished) == len(told) == 2
