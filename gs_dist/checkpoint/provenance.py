"""What a model directory was made from, told by a file that travels with it: `provenance.json`.

A run keeps manifests beside its model directories; whoever is handed such a directory alone still finds what
of the recipe decides the bytes, the software that made each layer, the fingerprints, every linear's row and the hash of
each shard.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.manifest import LayerManifest
from gs_dist.checkpoint.writer import write_json
from gs_dist.errors import OutputError

__all__ = ["PROVENANCE_FILE", "read_hashes", "write_provenance"]

PROVENANCE_FILE = "provenance.json"
_VERSION = 1


def write_provenance(
    directory: Path,
    parts: Iterable[LayerManifest],
    *,
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Writes the file beside the shards.

    Args:
        directory: of the model; its name is that of its format.
        parts: manifests of all layers and of the outer part, all made from the same.
        recipe: what of it decides the bytes, so that the file is the same however the job was spread.
        versions: package to version, of the process that made a model of the parts.
    """
    ordered = sorted(parts, key=lambda part: part.stem)
    records = [part.shards[directory.name] for part in ordered]
    content = {
        "version": _VERSION,
        "recipe": recipe,
        "versions": versions,
        "made_with": _made_with(ordered),
        "fingerprints": dataclasses.asdict(ordered[0].fingerprints),
        "shards": {record.file: {"sha256": record.sha256, "nbytes": record.nbytes} for record in records},
        "linears": [dataclasses.asdict(row) for part in ordered for row in part.rows],
    }
    write_json(directory / PROVENANCE_FILE, content)


def _made_with(parts: Iterable[LayerManifest]) -> list[dict[str, Any]]:
    """The software that made the parts, each with those that it made."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        entry = dataclasses.asdict(part.made_with)
        found.setdefault(json.dumps(entry, sort_keys=True), {**entry, "parts": []})["parts"].append(part.stem)
    return list(found.values())


def read_hashes(directory: Path) -> dict[str, str]:
    """File name to sha256 of each shard as it was written; empty where the directory has no such file.

    Raises:
        OutputError: the file cannot be read or is of another form.
    """
    try:
        content = json.loads((directory / PROVENANCE_FILE).read_bytes())
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}")
        return {str(file): str(record["sha256"]) for file, record in content["shards"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise OutputError(f"{PROVENANCE_FILE} cannot be read: {error!s:.200}") from error
