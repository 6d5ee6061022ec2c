"""How the job in an output ended, for whoever finds its files: `done`, `refused`, or nothing that says so.

A refused job leaves the reason in a file `refused` where `done` would be, and in the README.md of each directory that
would be a model.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from gs_dist import __version__
from gs_dist.checkpoint.job_log import read_status, utc_now
from gs_dist.checkpoint.markdown import prose
from gs_dist.checkpoint.output_lock import DONE, REFUSED
from gs_dist.checkpoint.sealed_json import read_sealed_json, write_sealed_json
from gs_dist.checkpoint.writer import write_bytes
from gs_dist.errors import OutputError
from gs_dist.wording import one_line

__all__ = ["WAS_REFUSED", "forget_refusal", "note_refusal", "told_end"]

WAS_REFUSED = "was refused"

_CARD = "README.md"
_TITLE = "# Not a model: the job was refused"


def note_refusal(output: Path, dialects: tuple[str, ...], reason: str) -> None:
    """Writes down that what a job made was refused: in its output, and where a model would be.

    Args:
        output: of the job.
        dialects: whose directories hold weights, if they are there.
        reason: in words.
    """
    write_sealed_json(output / REFUSED, {"reason": reason, "when": utc_now(), "gs-dist": __version__})
    text = (
        f"{_TITLE}\n\n{prose(one_line(reason))}\n\nThe weights here are those of layers that are finished, without the "
        "config.json and the index that would make a model of them.\n"
    )
    for name in dialects:
        if (output / name).is_dir():
            write_bytes(output / name / _CARD, text.encode())


def forget_refusal(output: Path, dialects: tuple[str, ...]) -> None:
    """Takes back what `note_refusal` wrote: the job is under way again."""
    (output / REFUSED).unlink(missing_ok=True)
    for name in dialects:
        card = output / name / _CARD
        with suppress(OSError):
            if card.read_bytes().startswith(_TITLE.encode()):
                card.unlink()


def told_end(run: Path) -> str | None:
    """`was refused: ...` or `is unfinished...`, for a sentence on the job in an output; None where it is done."""
    if (run / DONE).is_file():
        return None
    with suppress(OutputError, FileNotFoundError):
        return f"{WAS_REFUSED}: {read_sealed_json(run / REFUSED, REFUSED).get('reason')!s}"
    status = read_status(run)
    if status is None or status.state == "done":
        return "is unfinished"
    if status.state == "running":
        return f"is unfinished (it runs, or was killed after {status.updated!s:.20})"
    if status.state == "refused":
        return f"{WAS_REFUSED}: {status.phase!s:.500}"
    return f"is unfinished (it {'failed' if status.state == 'failed' else 'was stopped'}: {status.phase!s:.500})"
