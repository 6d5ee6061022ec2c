"""JSON files that a run keeps for itself, sealed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.writer import write_json
from gs_dist.errors import DamagedError
from gs_dist.seal import sealed, unsealed

__all__ = ["read_sealed_json", "write_sealed_json"]


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Publishes a JSON object with its checksum."""
    write_json(path, sealed(content))


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
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{label}: cannot be read ({error!s:.200})") from error
    return unsealed(content, label)
