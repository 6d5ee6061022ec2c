"""Progress as people see it."""

from __future__ import annotations

import io

from rich.console import Console
from rich.progress import Progress as RichBars

from gs_dist.progress import Progress, SilentProgress
from gs_dist.terminal.console import BarProgress, LineProgress, show_progress


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_now_and_then_with_rate_and_time_left() -> None:
    """The first, one every ten seconds, and the last of a pass are printed."""
    stream, clock = io.StringIO(), Clock()
    progress = LineProgress(stream, clock)
    for done in range(1, 41):
        progress.stage_progress(1, done, 40, "observing layers 4-7")
        clock.now += 1.0
    assert stream.getvalue().splitlines() == [
        "stage 1: observing layers 4-7, 1 of 40",
        "stage 1: observing layers 4-7, 11 of 40, 1/s, 29 s left",
        "stage 1: observing layers 4-7, 21 of 40, 1/s, 19 s left",
        "stage 1: observing layers 4-7, 31 of 40, 1/s, 9 s left",
        "stage 1: observing layers 4-7, 40 of 40, 1/s",
    ]


def test_a_new_pass_of_a_stage_starts_its_own_rate() -> None:
    """Neither the other pass nor the other stages slow it down."""
    stream, clock = io.StringIO(), Clock()
    progress = LineProgress(stream, clock)
    progress.stage_progress(0, 1, 2, "observing layer 0")
    clock.now += 100
    progress.stage_progress(0, 2, 2, "observing layer 0")
    progress.stage_progress(0, 1, 2, "observing layer 1")
    clock.now += 2
    progress.stage_progress(0, 2, 2, "observing layer 1")
    assert stream.getvalue().splitlines()[-1] == "stage 0: observing layer 1, 2 of 2, 0.5/s"


def test_layers_and_messages_are_lines() -> None:
    """A log file tells what was published."""
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.layer_finished(12, 13, 80)
    progress.message("merging")
    assert stream.getvalue() == "layer 12 is published, 13 of 80\nmerging\n"


def test_what_is_no_terminal_gets_lines() -> None:
    """A pipe or a job's log holds no control characters."""
    stream = io.StringIO()
    with show_progress(stream) as progress:
        assert isinstance(progress, LineProgress)
        progress.message("starting [2] workers")
    assert stream.getvalue() == "starting [2] workers\n"


def test_a_terminal_gets_one_bar_a_stage() -> None:
    """Bars follow the passes of each stage and the published layers."""
    bars = RichBars(console=Console(file=io.StringIO(), force_terminal=True))
    progress = BarProgress(bars)
    progress.stage_progress(0, 3, 4, "observing layer 0")
    progress.stage_progress(1, 1, 4, "observing layer 1")
    progress.stage_progress(0, 1, 8, "observing layer 2")
    progress.layer_finished(0, 1, 3)
    progress.message("a [bracket] is no markup")
    assert [(task.description, task.completed, task.total) for task in bars.tasks] == [
        ("stage 0  observing layer 2", 1, 8),
        ("stage 1  observing layer 1", 1, 4),
        ("layers published", 1, 3),
    ]
    assert "a [bracket] is no markup" in bars.console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


def test_nothing_can_be_shown() -> None:
    """Libraries that call the job may stay silent."""
    progress: Progress = SilentProgress()
    progress.stage_progress(0, 1, 2, "")
    progress.layer_finished(0, 1, 2)
    progress.message("")
