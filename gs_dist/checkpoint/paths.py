"""Names in a checkpoint directory, followed without leaving it."""

from __future__ import annotations

from pathlib import Path

from gs_dist.errors import CheckpointError

__all__ = ["contained_path"]


def contained_path(directory: Path, name: str) -> Path:
    """The file `name` of a checkpoint directory, links followed.

    A link may lead to another file of the directory, or from a snapshot of the Hugging Face cache to the
    blobs beside it (`models--x/snapshots/<revision>/file -> models--x/blobs/<hash>`).

    Raises:
        CheckpointError: the name is absolute, climbs with `..`, or leads outside.
    """
    root = directory.resolve()
    relative = Path(name)
    outside = CheckpointError(
        f"{name!r:.200} points outside of the checkpoint directory; put the file itself into the directory"
    )
    if not name or "\0" in name or "\\" in name or relative.is_absolute() or ".." in relative.parts:
        raise outside
    try:
        target = (root / relative).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(f"{name!r:.200}: cannot be followed ({error!s:.200})") from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise outside
    return target
