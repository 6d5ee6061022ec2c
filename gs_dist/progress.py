"""What a running job tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from gs_dist.wording import counted

__all__ = [
    "JobState",
    "JobStatus",
    "Progress",
    "SilentProgress",
    "StageLeft",
    "StageStatus",
    "WorkLeft",
    "duration",
    "rate",
]

JobState = Literal["running", "done", "refused", "failed", "stopped"]
"""`refused` is a job whose outcome is not good enough; `stopped` one that a person or a scheduler ended."""


@dataclass(frozen=True, kw_only=True)
class StageLeft:
    """What is ahead of a stage: of its busiest replica, since replicas work at the same time.

    Attributes:
        stage: the stage.
        passes: micro-batches that it has still to pass, each times the layers that it passes.
        solves: layers that it has still to solve.
    """

    stage: int
    passes: float
    solves: float


@dataclass(frozen=True, kw_only=True)
class WorkLeft:
    """What is ahead of a job's workers, by stage, and the tokens of all micro-batches still to be passed."""

    stages: tuple[StageLeft, ...]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """What a stage does: `done` of `total` steps of what `doing` names."""

    stage: int
    doing: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """Where a whole job stands.

    Attributes:
        state: whether it runs, and how it ended.
        phase: what it does, or why it ended.
        layers_done, num_layers: published layers, of all.
        tokens_done: tokens that passed through the model, in all passes of this attempt.
        tokens_per_second: of the pass under way; None while that is not known.
        seconds: since the job was started.
        seconds_left: for everything, by rates measured in this job; None while they are not known.
        started, updated: times in UTC, ISO 8601.
        stages: what each does.
    """

    state: JobState
    phase: str
    layers_done: int
    num_layers: int
    tokens_done: int
    tokens_per_second: float | None
    seconds: float
    seconds_left: float | None
    started: str
    updated: str
    stages: tuple[StageStatus, ...] = ()

    def line(self) -> str:
        """`solve layers 0-29, 5 of 30: 4 of 30 layers published; 812 tokens/s; 3 min left`."""
        parts = [f"{self.layers_done} of {counted(self.num_layers, 'layer')} published"]
        if self.state != "running":
            return f"{self.state}: {parts[0]}, {duration(self.seconds)}" + (f"; {self.phase}" if self.phase else "")
        if self.tokens_per_second is not None:
            parts.append(rate(self.tokens_per_second))
        parts.append("time left not known yet" if self.seconds_left is None else f"{duration(self.seconds_left)} left")
        return f"{self._doing()}: {'; '.join(parts)}"

    def _doing(self) -> str:
        if not self.stages:
            return self.phase
        first = self.stages[0]
        if len(self.stages) == 1:
            return f"{first.doing}, {first.done} of {first.total}"
        solving = sum(stage.doing == "solve" for stage in self.stages)
        passing = len(self.stages) - solving
        told = [f"{counted(count, 'stage')} in {what}" for what, count in (("passes", passing), ("solves", solving))]
        return " and ".join(text for text, count in zip(told, (passing, solving), strict=True) if count)


def rate(tokens_per_second: float) -> str:
    """`5120 tokens/s`, `2.5 tokens/s`."""
    return f"{tokens_per_second:.0f} tokens/s" if tokens_per_second >= 100 else f"{tokens_per_second:.3g} tokens/s"


def duration(seconds: float) -> str:
    """`42 s`, `14 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress(Protocol):
    """Told by the coordinator as work is done; `gs_dist.terminal.console` shows it to people."""

    def stage_progress(self, stage: int, done: int, total: int, what: str) -> None:
        """`done` of `total` micro-batches of the pass that `what` names have left a stage."""

    def layer_finished(self, layer: int, done: int, total: int) -> None:
        """A decoder layer is published; `done` of `total` are."""

    def part_finished(self, part: int, done: int, total: int) -> None:
        """A file of a conversion is published; `done` of `total` are."""

    def message(self, text: str) -> None:
        """Something happened that a person may want to know."""

    def phase(self, what: str) -> None:
        """The job goes on to something that is no pass and no solve."""

    def work_left(self, left: WorkLeft) -> None:
        """What is still ahead of the workers."""

    def job_status(self, status: JobStatus) -> None:
        """Where the whole job stands; told every few seconds."""


class SilentProgress:
    """Shows nothing."""

    def stage_progress(self, stage: int, done: int, total: int, what: str) -> None:
        """Ignored."""

    def layer_finished(self, layer: int, done: int, total: int) -> None:
        """Ignored."""

    def part_finished(self, part: int, done: int, total: int) -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""

    def phase(self, what: str) -> None:
        """Ignored."""

    def work_left(self, left: WorkLeft) -> None:
        """Ignored."""

    def job_status(self, status: JobStatus) -> None:
        """Ignored."""
