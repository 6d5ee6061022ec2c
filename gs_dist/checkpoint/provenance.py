"""What a model directory was made from, told by a file that travels with it: `provenance.json`.

A run keeps manifests beside its model directories; whoever is handed such a directory alone still finds what
of the recipe decides the bytes, the software that made each layer, the fingerprints, every linear's row, and the hash
of each shard and of each other file but the model card, which `gs-dist evaluate` writes anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.manifest import LayerManifest
from gs_dist.checkpoint.part_manifest import PartManifest
from gs_dist.checkpoint.writer import ShardRecord, write_json
from gs_dist.errors import OutputError
from gs_dist.results.quantized import LinearSummary

__all__ = [
    "HASHING_THREADS",
    "PROVENANCE_FILE",
    "Provenance",
    "ScaleRange",
    "file_sha256",
    "read_provenance",
    "write_conversion_provenance",
    "write_provenance",
]

PROVENANCE_FILE = "provenance.json"
_VERSION = 1
HASHING_THREADS = min(8, os.cpu_count() or 1)  # checksums let go of the interpreter's lock
_CHUNK = 16 << 20  # bytes hashed at a time


@dataclass(frozen=True, kw_only=True)
class ScaleRange:
    """Smallest and largest weight scale of a linear as the solver gave them; both None where it stayed in float."""

    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """As much of the file as a directory can be compared with.

    Attributes:
        shards: weight file to its sha256.
        files: any other file that was published to its sha256.
        linears: full name of every linear of the decoder layers, of a converted model of every linear, to the range of
            its scales.
        schemes: of a converted model, linear to the name of its scheme, `FLOAT` for none.
        source: fingerprint of the checkpoint that it was made of; None where it is not told.
        sources: `layer-00017`, or the name of a tensor outside the layers, to the checksum (see `lineage`) of what it
            was made from; empty where nobody noted them.
    """

    shards: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    linears: Mapping[str, ScaleRange] = field(default_factory=dict)
    schemes: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


def write_provenance(
    directory: Path,
    parts: Iterable[LayerManifest],
    *,
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
    files: Iterable[str] = (),
) -> None:
    """Writes the file beside the shards.

    Args:
        directory: of the model; its name is that of its dialect.
        parts: manifests of all layers and of the outer part, all made from the same.
        recipe: what of it decides the bytes, so that the file is the same however the job was spread.
        versions: package to version, of the process that made a model of the parts.
        files: names of everything that was published beside the shards, which are left out where they are named too.
    """
    ordered = sorted(parts, key=lambda part: part.stem)
    _write(
        directory,
        [part.shards[directory.name] for part in ordered],
        [row for part in ordered for row in part.rows],
        files,
        recipe=recipe,
        versions=versions,
        made_with=_made_with(ordered),
        fingerprints=dataclasses.asdict(ordered[0].fingerprints),
        sources=_sources(ordered),
    )


def write_conversion_provenance(
    directory: Path,
    parts: Iterable[PartManifest],
    rows: Iterable[LinearSummary],
    *,
    recipe: Mapping[str, Any],
    schemes: Mapping[str, Iterable[str]],
    files: Iterable[str],
) -> None:
    """The same of a conversion.

    Args:
        directory: as above.
        parts: manifests of all parts, all made from the same and with the same.
        rows: of all linears, those too that stayed in floats.
        recipe: what of it decides the bytes.
        schemes: name of a scheme, `FLOAT` for none, to the linears that have it.
        files: names of everything that was published beside the shards.
    """
    ordered = sorted(parts, key=lambda part: part.number)
    made_with = dict(ordered[0].made_with)
    _write(
        directory,
        [part.shards[directory.name] for part in ordered],
        rows,
        files,
        recipe=recipe,
        versions=made_with,
        made_with=[made_with],
        fingerprints=dict(ordered[0].fingerprints),
        schemes={name: list(linears) for name, linears in schemes.items()},
    )


def _write(
    directory: Path,
    records: Iterable[ShardRecord],
    rows: Iterable[LinearSummary],
    files: Iterable[str],
    **told: Any,
) -> None:
    shards = {record.file: {"sha256": record.sha256, "nbytes": record.nbytes} for record in records}
    others = {name: directory / name for name in sorted(files) if name not in shards}
    content = {
        "version": _VERSION,
        **told,
        "shards": shards,
        "files": {n: {"sha256": file_sha256(path), "nbytes": path.stat().st_size} for n, path in others.items()},
        "linears": [dataclasses.asdict(row) for row in rows],
    }
    write_json(directory / PROVENANCE_FILE, content)


def _sources(parts: Iterable[LayerManifest]) -> dict[str, str]:
    """Name of a layer's part, or of a tensor outside the layers, to the checksum of what it was made from."""
    found: dict[str, str] = {}
    for part in parts:
        if part.lineage is not None:
            found |= {part.stem: part.lineage.own} if part.layer is not None else part.lineage.tensors
    return found


def _made_with(parts: Iterable[LayerManifest]) -> list[dict[str, Any]]:
    """The software that made the parts, each with those that it made."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        entry = dataclasses.asdict(part.made_with)
        found.setdefault(json.dumps(entry, sort_keys=True), {**entry, "parts": []})["parts"].append(part.stem)
    return list(found.values())


def file_sha256(path: Path) -> str:
    """Of a file's content, in hex; a few megabytes in memory at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_provenance(directory: Path) -> Provenance | None:
    """What `write_provenance` wrote; None where the directory has no such file.

    Raises:
        OutputError: the file cannot be read or is of another form.
    """
    try:
        content = json.loads((directory / PROVENANCE_FILE).read_bytes())
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}")
        return Provenance(
            shards=_hashes(content["shards"]),
            files=_hashes(content.get("files", {})),
            linears={str(row["name"]): _scale_range(row) for row in content["linears"]},
            source=content.get("fingerprints", {}).get("source"),
            sources={str(name): str(checksum) for name, checksum in content.get("sources", {}).items()},
            schemes={str(n): str(scheme) for scheme, names in content.get("schemes", {}).items() for n in names},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise OutputError(f"{PROVENANCE_FILE} cannot be read: {error!s:.200}") from error


def _hashes(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {str(file): str(record["sha256"]) for file, record in records.items()}


def _scale_range(row: Mapping[str, Any]) -> ScaleRange:
    low, high = row["scale_min"], row["scale_max"]
    if low is None and high is None:
        return ScaleRange(low=None, high=None)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"scales from {low!r:.40} to {high!r:.40} of {row['name']!r:.100}")
    return ScaleRange(low=float(low), high=float(high))
