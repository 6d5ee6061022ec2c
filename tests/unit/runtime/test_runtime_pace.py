"""Time left: from what passes and solves took so far, for everything that is ahead."""

from __future__ import annotations

import pytest

from gs_dist.progress import StageLeft, WorkLeft
from gs_dist.runtime.pace import Pace


def left(*stages: tuple[float, float], tokens: int = 0) -> WorkLeft:
    """Passes and solves of each stage."""
    return WorkLeft(
        stages=tuple(StageLeft(stage=n, passes=passes, solves=solves) for n, (passes, solves) in enumerate(stages)),
        tokens=tokens,
    )


def test_nothing_is_told_before_anything_was_measured() -> None:
    """No rate is taken from elsewhere."""
    pace = Pace()
    assert pace.seconds_left(0.0) is None
    pace.update(left((10, 4)), 0.0)
    assert pace.seconds_left(5.0) is None


def test_steps_of_forty_seconds_tell_the_time_left_from_the_first_one_on() -> None:
    """However long a step takes, it is not forgotten before the next."""
    pace = Pace(prior=2.0)
    pace.update(left((10, 4)), 0.0)
    pace.update(left((9, 4)), 40.0)
    assert pace.seconds_left(40.0) == pytest.approx(9 * 40 + 4 * 80)


def test_the_first_step_counts_only_until_there_is_another() -> None:
    """It compiles kernels and reads weights."""
    pace = Pace()
    pace.update(left((10, 0)), 0.0)
    pace.update(left((9, 0)), 100.0)
    pace.update(left((8, 0)), 101.0)
    pace.update(left((7, 0)), 102.0)
    assert pace.seconds_left(102.0) == pytest.approx(7.0)


def test_solves_go_by_their_own_measured_rate() -> None:
    """The prior is forgotten once one was solved."""
    pace = Pace(prior=50.0)
    pace.update(left((1, 4)), 0.0)
    pace.update(left((0, 4)), 10.0)
    assert pace.seconds_left(10.0) == pytest.approx(4 * 500.0)
    pace.update(left((0, 3)), 15.0)
    pace.update(left((0, 2)), 18.0)
    assert pace.seconds_left(18.0) == pytest.approx(2 * 3.0)


def test_what_the_solve_under_way_took_is_taken_off_but_no_more_than_a_solve() -> None:
    """Time left goes down between two events, and never below what is ahead after this one."""
    pace = Pace()
    pace.update(left((0, 4)), 0.0)
    pace.update(left((0, 3)), 30.0)
    assert pace.seconds_left(40.0) == pytest.approx(80.0)
    assert pace.seconds_left(200.0) == pytest.approx(60.0)


def test_the_slowest_stage_decides() -> None:
    """Stages work at the same time."""
    pace = Pace()
    pace.update(left((4, 0), (4, 0)), 0.0)
    pace.update(left((3, 0), (2, 0)), 10.0)
    assert pace.seconds_left(10.0) == pytest.approx(30.0)


def test_cards_and_hosts_have_no_common_rate() -> None:
    """Before a first solve on the host, passes on a card tell nothing of it."""
    pace = Pace(prior=None)
    pace.update(left((4, 2)), 0.0)
    pace.update(left((3, 2)), 10.0)
    assert pace.seconds_left(10.0) is None
    pace.update(left((0, 2)), 40.0)
    pace.update(left((0, 1)), 47.0)
    assert pace.seconds_left(47.0) == pytest.approx(7.0)


def test_workers_that_start_anew_have_more_ahead_and_keep_their_rates() -> None:
    """What was lost is done again at the same pace."""
    pace = Pace()
    pace.update(left((4, 0), tokens=400), 0.0)
    pace.update(left((3, 0), tokens=300), 10.0)
    pace.update(left((4, 0), tokens=400), 60.0)
    assert pace.seconds_left(60.0) == pytest.approx(40.0)
    assert pace.tokens_done == 100


def test_tokens_a_second_are_those_of_the_passes() -> None:
    """Solves between them do not count, and there is no rate when all passed."""
    pace = Pace()
    pace.update(left((3, 1), tokens=300), 0.0)
    pace.update(left((2, 1), tokens=200), 5.0)
    assert pace.tokens_per_second == pytest.approx(20.0)
    pace.update(left((1, 1), tokens=100), 7.0)
    assert pace.tokens_per_second == pytest.approx(50.0)
    pace.update(left((0, 1), tokens=0), 9.0)
    assert pace.tokens_per_second is None
    assert pace.tokens_done == 300


def test_the_probe_after_the_last_solve_takes_its_passes() -> None:
    """With the start of its workers, as long as the first start took; it goes down while the probe runs."""
    pace = Pace(probe=6.0, began=-5.0)
    pace.update(left((4, 0)), 0.0)
    pace.update(left((3, 0)), 2.0)
    assert pace.seconds_left(2.0) == pytest.approx((3 + 6) * 2.0 + 5.0)
    pace.update(left((0, 0)), 8.0)
    assert pace.seconds_left(18.0) == pytest.approx(6 * 2.0 + 5.0 - 10.0)
    assert pace.seconds_left(99.0) == 0.0
