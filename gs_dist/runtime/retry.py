"""Attempts at a piece of work until it is done: lost workers are started again while that leads on."""

from __future__ import annotations

from collections.abc import Callable, Sized

from gs_dist.errors import WorkerLostError

__all__ = ["retry"]


def retry(
    attempt: Callable[[], None],
    finished: Sized,
    total: int,
    *,
    max_restarts: int,
    giving_up: Callable[[int], str],
    going_on: Callable[[], str],
    tell: Callable[[str], None],
) -> None:
    """Calls `attempt` until `finished` holds `total` parts.

    A loss after progress does not count: progress shows that the work can be done, and without it a fault repeats.

    Args:
        attempt: adds parts to `finished`; may end before all are there, with one more at least.
        finished: the parts that are done.
        total: how many there are.
        max_restarts: losses in a row without a part finished in between that are put up with.
        giving_up: what to say, given the number of these losses, behind the last one.
        going_on: what to say behind a loss that is put up with.
        tell: told of these.

    Raises:
        WorkerLostError: workers were lost more often in a row than that.
    """
    failures = 0
    while len(finished) < total:
        before = len(finished)
        try:
            attempt()
        except WorkerLostError as error:
            failures = 0 if len(finished) > before else failures + 1
            if failures > max_restarts:
                raise WorkerLostError(f"{error}; {giving_up(failures)}") from error
            tell(f"{error}; {going_on()}")
        else:
            failures = 0
