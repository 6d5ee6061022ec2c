"""What a job leaves in its output while it runs: `progress.json`, published anew, and `job.log`, a line an event.

Any node that sees the storage can follow a job by them, and they stay when it is over.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timezone
from pathlib import Path

from gs_dist.checkpoint.writer import write_json
from gs_dist.errors import OutputError
from gs_dist.progress import JobStatus, StageStatus
from gs_dist.wording import printable

__all__ = ["LOG", "STATUS", "JobLog", "read_status", "utc_now"]

LOG = "job.log"
STATUS = "progress.json"
_VERSION = 1


def utc_now() -> str:
    """`2026-01-31T12:00:05Z`."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class JobLog:
    """Of the job in one output.

    Args:
        output: its directory, which is there.
    """

    def __init__(self, output: Path) -> None:
        self._output = output

    def say(self, text: str) -> None:
        """Adds lines with the time before them; a log that cannot be written ends no job."""
        stamp = utc_now()
        lines = "".join(f"{stamp} {line}\n" for line in printable(text).splitlines())
        try:
            with (self._output / LOG).open("a", encoding="utf-8") as stream:
                stream.write(lines)
        except OSError:
            return

    def publish(self, status: JobStatus) -> None:
        """Puts the status in the place of the one before; likewise."""
        try:
            write_json(self._output / STATUS, {"version": _VERSION, **dataclasses.asdict(status)})
        except OutputError:
            return


def read_status(output: Path) -> JobStatus | None:
    """What a job published last; None where there is nothing that can be read, as of jobs of earlier versions."""
    try:
        content = json.loads((output / STATUS).read_text(encoding="utf-8"))
        if content.pop("version") != _VERSION:
            return None
        stages = tuple(StageStatus(**stage) for stage in content.pop("stages"))
        return JobStatus(stages=stages, **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
