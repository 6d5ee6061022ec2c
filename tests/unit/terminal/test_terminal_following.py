"""Following a job from elsewhere, by what it leaves on storage."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gs_dist.checkpoint.job_log import JobLog
from gs_dist.errors import OutputError
from gs_dist.progress import JobStatus, StageStatus
from gs_dist.terminal.cli import app
from gs_dist.terminal.following import follow, status_line

RUNNING = JobStatus(
    state="running",
    phase="",
    layers_done=12,
    num_layers=80,
    tokens_done=65536,
    tokens_per_second=5120.0,
    seconds=600.0,
    seconds_left=4000.0,
    started="2026-01-31T12:00:00Z",
    updated="2026-01-31T12:10:00Z",
    stages=(
        StageStatus(stage=0, doing="solve", done=12, total=40),
        StageStatus(stage=1, doing="forward", done=3, total=8),
    ),
)
DONE = replace(RUNNING, state="done", layers_done=80, seconds_left=0.0, stages=())


def at(minute: int, second: int = 0) -> datetime:
    return datetime(2026, 1, 31, 12, minute, second, tzinfo=timezone.utc)


def test_one_line_tells_layers_tokens_and_time_left_of_everything() -> None:
    """Several stages are told by what they do."""
    line = "1 stage in passes and 1 stage in solves: 12 of 80 layers published; 5120 tokens/s; 67 min left"
    assert status_line(RUNNING, at(10, 3)) == line


def test_a_job_that_no_longer_tells_is_said_to_be_silent() -> None:
    """A node that died publishes no end."""
    assert status_line(RUNNING, at(15)).startswith("nothing heard for 5 min")
    assert not status_line(DONE, at(59)).startswith("nothing")


def test_a_job_is_followed_to_its_end_and_no_line_is_said_twice(tmp_path: Path) -> None:
    """A line that is half written waits for its other half."""
    log, said, shown = JobLog(tmp_path), [], []
    log.publish(RUNNING)
    log.say("layer 11 is published")
    with (tmp_path / "job.log").open("a") as stream:
        stream.write("half a ")

    def sleep(seconds: float) -> None:
        with (tmp_path / "job.log").open("a") as stream:
            stream.write("line\n")
        log.publish(DONE)

    assert follow(tmp_path, said.append, shown.append, sleep=sleep) == DONE
    assert [line.split("Z ")[-1] for line in said] == ["layer 11 is published", "half a line"]
    assert len(shown) == 2


def test_an_output_without_a_job_is_refused(tmp_path: Path) -> None:
    """The message says what to name."""
    with pytest.raises(OutputError, match="holds no progress"):
        follow(tmp_path, print, print)
    assert CliRunner().invoke(app, ["status", str(tmp_path)]).exit_code == 2


@pytest.mark.parametrize(("state", "exit_code"), [("done", 0), ("failed", 1), ("stopped", 1)])
def test_watching_a_job_that_is_over_ends_as_it_did(tmp_path: Path, state: str, exit_code: int) -> None:
    """A script can wait for a job."""
    JobLog(tmp_path).publish(replace(DONE, state=state))  # type: ignore[arg-type]  # one of the states
    result = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert result.exit_code == exit_code
    assert f"{state}: 80 of 80 layers published" in result.output


def test_the_status_is_json_for_programs(tmp_path: Path) -> None:
    """With how long the job is silent."""
    JobLog(tmp_path).publish(DONE)
    document = json.loads(CliRunner().invoke(app, ["status", str(tmp_path), "--json"]).stdout)
    assert (document["layers_done"], document["seconds_silent"]) == (80, 0.0)
