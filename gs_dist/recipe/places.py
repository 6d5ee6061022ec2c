"""Where a model lies and where an output may be: directories, one outside of the other."""

from __future__ import annotations

import os

from gs_dist.wording import is_uri

__all__ = ["fault_of_directory", "fault_of_output"]


def fault_of_directory(path: str) -> str | None:
    """What `path` should be instead; None where it may be a directory, there or not."""
    return "a directory that is mounted here and on every node, and no URI" if is_uri(path) else None


def fault_of_output(output: str, model: str | None) -> str | None:
    """What the output should be instead; None where it may be as it is.

    Args:
        output: a path, `~` included.
        model: of the model's directory, if that is known.
    """
    if is_uri(output) or model is None:
        return fault_of_directory(output)
    # By their real places: a link leads to the same directory.
    ours, theirs = (os.path.join(os.path.realpath(os.path.expanduser(p)), "") for p in (output, model))
    if ours.startswith(theirs):
        return "a directory of its own, outside the model's"
    return "a directory of its own, one that does not hold the model" if theirs.startswith(ours) else None
