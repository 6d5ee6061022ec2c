"""Progress for people: a bar a stage on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichBars
from rich.segment import Segment
from rich.text import Text

from gs_dist.progress import JobStatus, Progress, SilentProgress, WorkLeft, duration, rate
from gs_dist.wording import printable

__all__ = ["BarProgress", "LineProgress", "PrintableConsole", "say", "show_progress", "showing"]

SECONDS_BETWEEN_LINES = 10.0
_A_DAY = 86400.0


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Prints a text as it is, but for what would steer the terminal; on stderr with `err`."""
    typer.echo(printable(text), err=err, nl=nl)


class PrintableConsole(Console):
    """Spells out what would steer the terminal in whatever is printed; rich removes a few such characters only.

    A reader that has enough is left to the command line, instead of ending with exit code 1.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """The segments of text; rich's own control sequences are segments of another kind."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        raise BrokenPipeError


@dataclass(kw_only=True)
class _Pass:
    """Where a stage's pass stands; a new pass starts when its name changes or it begins again."""

    what: str
    done: int
    started: float
    first: int  # finished when we first heard of it
    shown: float


_LINES = 20  # told of a conversion, however many files it has


class LineProgress:
    """One line a stage every few seconds, with rate and time left; always the last one of a pass."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._passes: dict[int, _Pass] = {}
        self._told = float("-inf")  # when the last line on the whole job was printed
        self._whole_job = False

    def stage_progress(self, stage: int, done: int, total: int, what: str) -> None:
        """Prints `stage 1: observing layers 4-7, 12 of 64, 3.1/s, 17 s left`."""
        now = self._clock()
        current = self._passes.get(stage)
        if current is None or current.what != what or done < current.done:
            current = self._passes[stage] = _Pass(what=what, done=done, started=now, first=done, shown=-1e18)
        current.done = done
        if self._whole_job:
            return  # its lines tell of stages, too
        if done < total and now - current.shown < SECONDS_BETWEEN_LINES:
            return
        current.shown = now
        line = f"stage {stage}: {what}, {done} of {total}"
        elapsed, finished = now - current.started, done - current.first
        if elapsed > 0 and finished > 0:
            rate = finished / elapsed
            line += f", {rate:.3g}/s" + (f", {(total - done) / rate:.0f} s left" if done < total else "")
        self.message(line)

    def layer_finished(self, layer: int, done: int, total: int) -> None:
        """Prints `layer 12 is published, 13 of 80`."""
        self.message(f"layer {layer} is published, {done} of {total}")

    def part_finished(self, part: int, done: int, total: int) -> None:
        """Prints `file 12 is published, 13 of 80`, a few times in all."""
        if done == total or done % max(1, total // _LINES) == 0:
            self.message(f"file {part} is published, {done} of {total}")

    def message(self, text: str) -> None:
        """Prints the text as a line."""
        print(printable(text), file=self._stream, flush=True)

    def phase(self, what: str) -> None:
        """Prints what the job goes on to."""
        self._whole_job = False
        self.message(what)

    def work_left(self, left: WorkLeft) -> None:
        """Ignored: the status tells of it."""

    def job_status(self, status: JobStatus) -> None:
        """Prints where the whole job stands, not too often; stages have no lines of their own then."""
        self._whole_job = bool(status.stages)
        now = self._clock()
        if self._whole_job and now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            self.message(status.line())


class _RateColumn(TextColumn):
    """Steps a second of a task, or the rate that it was given."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """`3.1/s`, or nothing before the first step."""
        if "rate" in task.fields:
            return Text(task.fields["rate"], style="progress.data.speed")
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s", style="progress.data.speed")


class _LeftColumn(TextColumn):
    """Time left of a task by its own rate, or what it was given."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """`14 min left`, or nothing while there is no rate."""
        if "left" in task.fields:
            return Text(task.fields["left"], style="progress.remaining")
        left = None if task.finished else task.time_remaining
        return Text("" if left is None else f"{duration(left)} left", style="progress.remaining")


class BarProgress:
    """A bar a stage, one for published layers, and a line for the whole job; messages scroll above."""

    def __init__(self, bars: RichBars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._doing: dict[str, tuple[str, int]] = {}

    def _show(self, name: str, done: int, total: int, what: str) -> None:
        text = f"{name}  {what}".rstrip()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(text, total=total, completed=done)
        last_what, last_done = self._doing.get(name, (what, 0))
        if last_what != what or done < last_done:
            self._bars.reset(self._tasks[name], total=total, completed=done, description=text)
        self._doing[name] = (what, done)
        self._bars.update(self._tasks[name], completed=done, total=total, description=text)

    def stage_progress(self, stage: int, done: int, total: int, what: str) -> None:
        """Moves the stage's bar; it starts anew with each pass."""
        self._show(f"stage {stage}", done, total, what)

    def layer_finished(self, layer: int, done: int, total: int) -> None:
        """Moves the bar of published layers."""
        self._show("layers published", done, total, "")

    def part_finished(self, part: int, done: int, total: int) -> None:
        """Moves the bar of published files."""
        self._show("files published", done, total, "")

    def message(self, text: str) -> None:
        """Prints the text above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)

    def phase(self, what: str) -> None:
        """Prints it above the bars."""
        self.message(what)

    def work_left(self, left: WorkLeft) -> None:
        """Ignored: the status tells of it."""

    def job_status(self, status: JobStatus) -> None:
        """Shows the time left for everything beside the published layers."""
        self._show("layers published", status.layers_done, status.num_layers, "")
        left = "" if status.seconds_left is None else f"{duration(status.seconds_left)} left"
        tokens = "" if status.tokens_per_second is None else rate(status.tokens_per_second)
        self._bars.update(self._tasks["layers published"], rate=tokens, left=left)


@contextmanager
def showing(stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Shows a line below all others in the place of the one before; elsewhere than on a terminal, lines that differ."""
    console = PrintableConsole(file=sys.stderr if stream is None else stream)
    if console.is_terminal:
        with console.status("") as shown:
            yield lambda text: shown.update(Text(text))
        return
    last = ""

    def show(text: str) -> None:
        nonlocal last
        if text != last:
            print(printable(text), file=console.file, flush=True)
        last = text

    yield show


@contextmanager
def show_progress(stream: TextIO | None = None, *, quiet: bool = False) -> Iterator[Progress]:
    """Bars where `stream` (stderr) is a terminal, else plain lines; nothing with `quiet`."""
    if quiet:
        yield SilentProgress()
        return
    target = sys.stderr if stream is None else stream
    console = PrintableConsole(file=target)
    if not console.is_terminal:
        yield LineProgress(target)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        _LeftColumn(),
    )
    # Steps of half a minute and more are usual: none may be forgotten before the next one.
    with RichBars(*columns, console=console, transient=True, speed_estimate_period=_A_DAY) as bars:
        yield BarProgress(bars)
