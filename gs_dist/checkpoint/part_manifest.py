"""A finished part of a conversion: `manifests/part-00017.json`, written after the files that it vouches for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.manifest import MANIFESTS
from gs_dist.checkpoint.writer import ShardRecord, StoredTensor, make_directory, write_json
from gs_dist.errors import OutputError

__all__ = ["PartManifest", "finished_parts", "part_faults", "read_part", "write_part"]

_VERSION = 1
_CHUNK = 4 << 20


@dataclass(frozen=True, kw_only=True)
class PartManifest:
    """What a part's files are, by format, and what they were made from and with."""

    number: int
    shards: Mapping[str, ShardRecord]
    fingerprints: Mapping[str, str]
    made_with: Mapping[str, str]

    def is_of(self, fingerprints: Mapping[str, str], formats: Sequence[str]) -> bool:
        """Whether it is of this job, in every format."""
        return dict(self.fingerprints) == dict(fingerprints) and set(self.shards) >= set(formats)


def _label(number: int) -> str:
    return f"{MANIFESTS}/part-{number:05d}.json"


def write_part(output: Path, manifest: PartManifest) -> None:
    """Publishes a manifest; its files are in place already."""
    make_directory(output / MANIFESTS)
    write_json(output / _label(manifest.number), {"version": _VERSION, **dataclasses.asdict(manifest)})


def read_part(output: Path, number: int) -> PartManifest | None:
    """The manifest of a part, None where it is not finished.

    Raises:
        OutputError: the file is damaged or of another version.
    """
    label = _label(number)
    try:
        content = json.loads((output / label).read_bytes())
        if content["version"] != _VERSION or content["number"] != number:
            raise ValueError(f"version {content['version']!r} of part {content['number']!r}")
        return PartManifest(
            number=number,
            shards={name: _record(record) for name, record in content["shards"].items()},
            fingerprints=dict(content["fingerprints"]),
            made_with=dict(content["made_with"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise OutputError(
            f"{label}: is not a manifest of this version ({reason:.200}); delete it to have the part done again"
        ) from error


def finished_parts(output: Path) -> list[int]:
    """Numbers of the parts that have a manifest, sorted; empty where the output is of no conversion."""
    stems = (path.stem.removeprefix("part-") for path in (output / MANIFESTS).glob("part-*.json"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def part_faults(output: Path, manifest: PartManifest) -> list[str]:
    """Reads a part's files in full and says which are missing or changed; empty where all is well."""
    faults = []
    for name, record in manifest.shards.items():
        path = output / name / record.file
        try:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            faults.append(f"{name}/{record.file}: cannot be read ({error.strerror})")
            continue
        if digest.hexdigest() != record.sha256:
            faults.append(f"{name}/{record.file}: its content changed since it was written")
    return faults


def _record(content: Mapping[str, Any]) -> ShardRecord:
    if Path(content["file"]).name != content["file"]:
        raise ValueError(f"shard {content['file']!r} lies elsewhere")
    tensors = {
        name: StoredTensor(dtype=stored["dtype"], shape=tuple(stored["shape"]))
        for name, stored in content["tensors"].items()
    }
    return ShardRecord(file=content["file"], sha256=content["sha256"], nbytes=content["nbytes"], tensors=tensors)
