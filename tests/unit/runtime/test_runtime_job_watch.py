"""A job's status on storage: while it runs, however it ends, and in its log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs import run_inline, small_recipe

from gs_dist.checkpoint.job_log import LOG, JobLog, read_status
from gs_dist.checkpoint.run_directory import RunDirectory
from gs_dist.errors import JobFailure, OutputError
from gs_dist.progress import JobStatus, SilentProgress, StageLeft, WorkLeft
from gs_dist.runtime.job_watch import JobWatch, watched
from gs_dist.runtime.pace import Pace


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.statuses: list[JobStatus] = []

    def job_status(self, status: JobStatus) -> None:
        self.statuses.append(status)


def a_watch(output: Path, progress: Heard | None = None) -> JobWatch:
    return JobWatch(progress or Heard(), JobLog(output), Pace(), layers_done=0, num_layers=4)


def test_a_finished_job_says_done_and_its_log_tells_the_way_there(tmp_path: Path) -> None:
    """Each line has a time, each layer a line; the status has all layers and no time left."""
    config = small_recipe(tmp_path, "job")
    run_inline(config)
    status = read_status(Path(config.output))
    assert status is not None
    assert (status.state, status.layers_done, status.num_layers, status.seconds_left) == ("done", 6, 6, 0.0)
    assert status.tokens_done == config.calibration.num_samples * config.calibration.sequence_length
    lines = (Path(config.output) / LOG).read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in lines)
    assert sum("is published" in line for line in lines) == 6
    assert any(line.endswith("merging") for line in lines)
    assert "done: 6 of 6 layers published" in lines[-1]


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    """Whoever looks later finds the reason on storage."""
    with pytest.raises(JobFailure), watched(a_watch(tmp_path)):
        raise JobFailure("layer 3: something broke\nwith more")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.phase) == ("failed", "layer 3: something broke")
    assert "failed: 0 of 4 layers published" in (tmp_path / LOG).read_text()


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143)])
def test_a_job_that_is_stopped_says_how_to_go_on(tmp_path: Path, end: BaseException) -> None:
    """Neither Ctrl-C nor a signal is a failure."""
    with pytest.raises(type(end)), watched(a_watch(tmp_path)):
        raise end
    status = read_status(tmp_path)
    assert status is not None
    assert status.state == "stopped"
    assert "run the same command again" in status.phase


def test_the_status_tells_stages_rates_and_time_left(tmp_path: Path) -> None:
    """What people see is what is published."""
    heard, now = Heard(), [0.0]
    watch = JobWatch(heard, JobLog(tmp_path), Pace(), layers_done=1, num_layers=4, clock=lambda: now[0])
    watch.work_left(WorkLeft(stages=(StageLeft(stage=0, passes=10, solves=0),), tokens=1000))
    now[0] = 40.0
    watch.stage_progress(0, 1, 10, "observe layers 0-3")
    watch.work_left(WorkLeft(stages=(StageLeft(stage=0, passes=9, solves=0),), tokens=900))
    watch.publish()
    assert heard.statuses[-1].line() == "observe layers 0-3, 1 of 10: 1 of 4 layers published; 2.5 tokens/s; 6 min left"
    assert read_status(tmp_path) == heard.statuses[-1]


def test_storage_that_takes_no_status_ends_no_job(tmp_path: Path) -> None:
    """The model matters more than what is told of it."""
    with watched(a_watch(tmp_path / "gone")) as watch:
        watch.message("hello")
        watch.publish()


def test_a_status_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    """Of another version, damaged, or not there."""
    assert read_status(tmp_path) is None
    for text in ("", "[]", "{}", '{"version": 9}', '{"version": 1, "stages": [{"stage": 0}]}'):
        (tmp_path / "progress.json").write_text(text)
        assert read_status(tmp_path) is None


def test_outer_tensors_that_cannot_be_carried_over_are_told_of_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written beside the workers; the job fails for it behind its last layer, and says so long before."""

    def full(self: RunDirectory, reader: object) -> None:
        raise OutputError("no space left")

    monkeypatch.setattr(RunDirectory, "outer", full)
    config = small_recipe(tmp_path, "job", num_layers=2)
    with pytest.raises(OutputError, match="no space left"):
        run_inline(config)
    lines = (Path(config.output) / LOG).read_text().splitlines()
    told = next(number for number, line in enumerate(lines) if "the job will fail: no space left" in line)
    assert told < next(number for number, line in enumerate(lines) if "layer 1 is published" in line)
    assert not (Path(config.output) / "done").exists()
