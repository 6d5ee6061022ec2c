from __future__ import annotations

import threading

import pytest

from gs_dist.solvers.threads import ONE_THREAD, Threads


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_results_come_in_the_order_of_the_parts(count):
    """However long each part takes, its result stands where the part stood."""
    later_first = threading.Event()

    def square(part):
        if part == 0 and count > 1:
            assert later_first.wait(10)  # the first part ends after the second
        if part == 1:
            later_first.set()
        return part * part

    with Threads(count) as threads:
        assert threads.map(square, range(50)) == [part * part for part in range(50)]
        assert threads.map(square, []) == []


def test_no_more_threads_are_at_work_than_were_asked_for():
    """Parts that map parts of their own share the same threads: three of three, however deep."""
    lock, now, most = threading.Lock(), 0, 0
    all_three = threading.Barrier(3)

    def inner(part):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if part < 3:
            all_three.wait(10)  # none of the three could pass without the two others at work
        with lock:
            now -= 1
        return part

    with Threads(3) as threads:
        nested = threads.map(lambda first: threads.map(inner, range(first, first + 4)), [0, 100, 200, 300, 400])
    assert nested == [list(range(first, first + 4)) for first in [0, 100, 200, 300, 400]]
    assert most == 3


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_error_is_that_of_the_first_part_that_fails(count):
    """As in a loop, whichever part failed first by the clock; the threads serve on."""
    second_failed = threading.Event()

    def fail(part):
        if part == 1 and count > 1:
            second_failed.wait(10)
        if part == 2:
            second_failed.set()
        if part:
            raise ValueError(f"part {part}")
        return part

    with Threads(count) as threads:
        with pytest.raises(ValueError, match="part 1"):
            threads.map(fail, range(9))
        assert threads.map(str, range(3)) == ["0", "1", "2"]


def test_one_thread_is_the_callers():
    """Without a second thread nothing leaves the thread that asked."""
    assert set(ONE_THREAD.map(lambda _: threading.get_ident(), range(4))) == {threading.get_ident()}
