"""Where the model directories of a job lie: out of the way until they are judged, then under their dialects' names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gs_dist.checkpoint.dialects import published_dialect
from gs_dist.checkpoint.job_end import told_end
from gs_dist.checkpoint.manifest import MANIFESTS
from gs_dist.checkpoint.output_lock import REFUSED
from gs_dist.checkpoint.part_manifest import finished_parts
from gs_dist.checkpoint.run_record import RECORD
from gs_dist.checkpoint.weight_files import INDEX_FILE
from gs_dist.errors import CheckpointError, OutputError
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.storage import sync_directory

__all__ = ["UNJUDGED", "find_models", "is_run", "move", "run_of_model", "take_entrance", "unjudged"]

UNJUDGED = ".gs-dist-unjudged"


def unjudged(output: Path, dialect: str) -> Path:
    """Where a job's model lies between merge and verdict."""
    return output / UNJUDGED / dialect


def run_of_model(directory: Path) -> Path | None:
    """The output of a job that a model directory lies in, judged or not; None where it lies in none."""
    parent = directory.resolve().parent
    run = parent.parent if parent.name == UNJUDGED else parent
    return run if is_run(run) else None


def is_run(directory: Path) -> bool:
    """Whether a job began in a directory."""
    record, refused = directory / MANIFESTS / RECORD, directory / REFUSED
    return record.is_file() or refused.is_file() or bool(finished_parts(directory))


def take_entrance(directory: Path) -> None:
    """Removes the two files without which no loader takes a directory for a model; config.json first."""
    for name in ("config.json", INDEX_FILE):
        (directory / name).unlink(missing_ok=True)


def move(before: Path, after: Path) -> None:
    """Renames a directory, for good.

    Raises:
        OutputError: it cannot be moved.
    """
    try:
        before.rename(after)
        sync_directory(before.parent)
        sync_directory(after.parent)
    except OSError as error:
        raise OutputError(
            f"{before.name}: cannot be moved to {after.parent.name}/{after.name} ({error.strerror}); move it by hand, "
            "and submit the same recipe again"
        ) from error


def find_models(directory: Path, dialects: Sequence[str] = ()) -> dict[str, Path]:
    """Dialect to model directory, given a job's output or a model directory itself.

    Args:
        directory: where to look.
        dialects: those that are wanted; all that are there where none is named.

    Raises:
        CheckpointError: there is no finished model, or none in a dialect that is wanted.
    """
    found = {name: directory / name for name in DIALECTS if (directory / name / INDEX_FILE).is_file()}
    itself = published_dialect(directory) if not found and (directory / INDEX_FILE).is_file() else None
    if itself is not None:
        found = {itself: directory}
    missing = [name for name in dialects if name not in found]
    if found and missing:
        raise CheckpointError(
            f"{str(directory)!r} holds no finished model as {' or '.join(missing)}: choose from {', '.join(found)}"
        )
    if found:
        return {name: path for name, path in found.items() if not dialects or name in dialects}
    end = told_end(directory) if (directory / MANIFESTS).is_dir() else None
    if end is not None:
        raise CheckpointError(f"the job in {str(directory)!r} {end}; it holds no finished model")
    raise CheckpointError(
        f"{str(directory)!r} holds no finished model: give the output of a job that is done, or a model directory in it"
    )
