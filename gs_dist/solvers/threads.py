"""Independent parts of a solve on several threads, with the bytes that one thread gives.

NumPy and BLAS release the interpreter's lock, so threads are enough. Each part is computed by the code that one
thread would run, with BLAS held to one thread by whoever starts the solve (`blas.one_thread`), and results come back
in the order of the parts: whoever sums them sums in that order, never in that of completion.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["ONE_THREAD", "Threads"]

Part = TypeVar("Part")
Result = TypeVar("Result")


class Threads:
    """At most `count` threads at work at a time, the caller's own among them.

    A part may itself call `map`: its thread works through the inner parts and those that have nothing to do join
    in, so that no thread ever waits for one that waits for it. The caller waits for the parts that others took, so
    put the largest part first: that one is always the caller's, and the others come to help.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = max(count, 1)
        self._pool = ThreadPoolExecutor(self.count - 1, thread_name_prefix="solve") if self.count > 1 else None

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
        """`function` of every part, in the order of the parts; a plain loop on one thread.

        Where parts fail, the error is that of the first of them, as in a loop; parts after it may have run.
        """
        if self._pool is None:
            return [function(part) for part in parts]
        work = _Work(function, tuple(parts))
        helpers = [self._pool.submit(work.run) for _ in range(min(self.count, len(work.parts)) - 1)]
        work.run(first=0)
        for helper in helpers:
            if not helper.cancel():  # not begun: nothing is left for it
                helper.result()
        return work.outcome()


class _Work(Generic[Part, Result]):
    """Parts that several threads take one after another, in order."""

    def __init__(self, function: Callable[[Part], Result], parts: Sequence[Part]) -> None:
        self.parts = parts
        self._function = function
        self._next = itertools.count(1)  # drawn from by one thread at a time, under the interpreter's lock
        self._results: dict[int, Result] = {}
        self._errors: dict[int, BaseException] = {}

    def run(self, first: int | None = None) -> None:
        """Takes parts, from `first` on if given, until none is left or one has failed."""
        index = next(self._next) if first is None else first
        while index < len(self.parts) and not self._errors:
            try:
                self._results[index] = self._function(self.parts[index])
            except BaseException as error:  # handed to whoever asked for the results
                self._errors[index] = error
            index = next(self._next)

    def outcome(self) -> list[Result]:
        """Results in order; raises the error of the first part that failed."""
        # Parts are taken in order: whatever comes before a failed one has been run to its end.
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._results[index] for index in range(len(self.parts))]


ONE_THREAD = Threads()
