"""Seals: files that a job writes for itself hold a checksum of what they hold, and are not believed without it.

The checksum is that of `lineage.checksum_of`. A file is opened again minutes or months later, by another process on
another node, and what is in it shapes every layer that is still to come.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.lineage import joined
from gs_dist.checkpoint.writer import write_json
from gs_dist.errors import DamagedError, OutputError

__all__ = ["SEAL", "read_sealed_json", "write_sealed_json"]

SEAL = "checksum"
_MISSING = object()


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Publishes a JSON object with its checksum under the key `checksum`."""
    write_json(path, {**content, SEAL: _checksum(content)})


def read_sealed_json(path: Path, label: str) -> dict[str, Any]:
    """What `write_sealed_json` published, without the checksum.

    Args:
        path: the file.
        label: what to call it.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it cannot be read, or holds something else than was written.
        OutputError: it has no checksum.
    """
    try:
        content = json.loads(path.read_bytes())
        found = content.pop(SEAL, _MISSING)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise DamagedError(f"{label}: cannot be read ({error!s:.200})") from error
    if found is _MISSING:
        raise OutputError(
            f"{label}: has no checksum, so it is of another version of gs_dist or damaged: set output to another "
            "directory, or delete it"
        )
    if found != _checksum(content):
        raise DamagedError(f"{label}: does not hold what was written to it, by its checksum")
    return dict(content)


def _checksum(content: Mapping[str, Any]) -> str:
    return joined(json.dumps(content, sort_keys=True, ensure_ascii=True))
