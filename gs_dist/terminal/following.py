"""A job as seen from another terminal or node: by what it leaves on storage, while it runs and after."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from gs_dist.checkpoint.job_log import LOG, read_status
from gs_dist.errors import OutputError
from gs_dist.progress import JobStatus, duration

__all__ = ["follow", "silence", "status_json", "status_line", "status_of"]

_SILENT = 120.0  # seconds; a job tells every few
_LOOK = 2.0  # seconds between two looks


def status_of(output: Path) -> JobStatus:
    """What the job in an output published last.

    Raises:
        OutputError: there is none.
    """
    found = read_status(output)
    if found is None:
        raise OutputError(
            f"{output} holds no progress.json: name the output of a job that `gs-dist quantize` or `resolve` started, "
            "once it has begun to calibrate"
        )
    return found


def silence(status: JobStatus, now: datetime) -> float:
    """Seconds since a job that runs was heard of; 0 for one that ended."""
    if status.state != "running":
        return 0.0
    updated = datetime.strptime(status.updated, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    return max(0.0, (now - updated).total_seconds())


def status_line(status: JobStatus, now: datetime) -> str:
    """Where the job stands, and whether it still tells."""
    silent = silence(status, now)
    if silent < _SILENT:
        return status.line()
    return (
        f"nothing heard for {duration(silent)}, and a job tells every few seconds: it was ended, or this clock differs "
        f"from its own. Last heard: {status.line()}"
    )


def status_json(status: JobStatus, now: datetime) -> str:
    """As JSON, with `seconds_silent` beside what the job published."""
    return json.dumps({**dataclasses.asdict(status), "seconds_silent": silence(status, now)}, indent=1)


def follow(
    output: Path,
    say: Callable[[str], None],
    show: Callable[[str], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> JobStatus:
    """Says the lines of a job's log as they come and shows where it stands, until it has ended.

    Args:
        output: of the job.
        say: prints a line of the log.
        show: shows where the job stands, in the place of what it showed before.
        sleep: waits.

    Returns:
        How it ended.

    Raises:
        OutputError: no job began here.
    """
    position = 0
    while True:
        status = status_of(output)  # before the log: what is said of the end must be in it
        position = _say_new(output / LOG, position, say)
        show(status_line(status, datetime.now(timezone.utc)))
        if status.state != "running":
            return status
        sleep(_LOOK)


def _say_new(path: Path, position: int, say: Callable[[str], None]) -> int:
    """Says whole lines behind a position; the position behind them."""
    try:
        with path.open("rb") as stream:
            stream.seek(position)
            whole = stream.read().rpartition(b"\n")
    except OSError:
        return position
    text, end = whole[0] + whole[1], position + len(whole[0]) + len(whole[1])
    for line in text.decode(errors="replace").splitlines():
        say(line)
    return end
