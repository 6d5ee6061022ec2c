"""A finished part of a conversion: `manifests/part-00017.json`, written after the files that it vouches for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gs_dist.checkpoint.manifest import MANIFESTS
from gs_dist.checkpoint.sealed_json import read_sealed_json, write_sealed_json
from gs_dist.checkpoint.shard_records import record_from_json, rows_from_json
from gs_dist.checkpoint.writer import ShardRecord, make_directory
from gs_dist.errors import OutputError
from gs_dist.results.quantized import LinearSummary

__all__ = ["PartManifest", "finished_parts", "read_part", "write_part"]

_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class PartManifest:
    """What a part's files are, by format, what they were made from and with, and the rows of their linears."""

    number: int
    shards: Mapping[str, ShardRecord]
    fingerprints: Mapping[str, str]
    made_with: Mapping[str, str]
    rows: tuple[LinearSummary, ...] = ()

    def is_of(self, fingerprints: Mapping[str, str], formats: Sequence[str]) -> bool:
        """Whether it is of this job, in every format."""
        return dict(self.fingerprints) == dict(fingerprints) and set(self.shards) >= set(formats)


def _label(number: int) -> str:
    return f"{MANIFESTS}/part-{number:05d}.json"


def write_part(output: Path, manifest: PartManifest) -> None:
    """Publishes a manifest; its files are in place already."""
    make_directory(output / MANIFESTS)
    write_sealed_json(output / _label(manifest.number), {"version": _VERSION, **dataclasses.asdict(manifest)})


def read_part(output: Path, number: int) -> PartManifest | None:
    """The manifest of a part, None where it is not finished.

    Raises:
        DamagedError: the file does not hold what was written.
        OutputError: it is of another version.
    """
    label = _label(number)
    try:
        content = read_sealed_json(output / label, label)
    except FileNotFoundError:
        return None
    try:
        if content["version"] != _VERSION or content["number"] != number:
            raise ValueError(f"version {content['version']!r} of part {content['number']!r}")
        return PartManifest(
            number=number,
            shards={name: record_from_json(record) for name, record in content["shards"].items()},
            fingerprints=dict(content["fingerprints"]),
            made_with=dict(content["made_with"]),
            rows=rows_from_json(content["rows"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise OutputError(
            f"{label}: is not a manifest of this version ({reason:.200}); delete it to have the part done again"
        ) from error


def finished_parts(output: Path) -> list[int]:
    """Numbers of the parts that have a manifest, sorted; empty where the output is of no conversion."""
    stems = (path.stem.removeprefix("part-") for path in (output / MANIFESTS).glob("part-*.json"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())
