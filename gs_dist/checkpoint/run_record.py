"""What a run works on, written down when it starts: `manifests/run.json`.

An output that is found later, finished or not, is compared with it key by key, where fingerprints could only say that
something differs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.manifest import MANIFESTS, Fingerprints, MadeWith
from gs_dist.checkpoint.sealed_json import read_sealed_json, write_sealed_json
from gs_dist.checkpoint.writer import make_directory
from gs_dist.recipe.text import format_path

__all__ = ["RECORD", "RunRecord", "read_record", "recipe_differences", "version_differences", "write_record"]

RECORD = "run.json"
_VERSION = 2
_ABSENT = object()
_MOST = 6  # differences told


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run: how many layers it is to publish, in which dialects, and what decides their bytes.

    `recipe` is `CalibrationConfig.fingerprint_fields()`.
    """

    num_layers: int
    dialects: tuple[str, ...]
    recipe: Mapping[str, Any]
    fingerprints: Fingerprints
    made_with: MadeWith | None


def write_record(output: Path, record: RunRecord) -> None:
    """Publishes the record."""
    write_sealed_json(make_directory(output / MANIFESTS) / RECORD, {"version": _VERSION, **dataclasses.asdict(record)})


def read_record(output: Path) -> RunRecord | None:
    """What `write_record` wrote; None where there is none that can be read, since nothing depends on it alone."""
    try:
        content = read_sealed_json(output / MANIFESTS / RECORD, RECORD)
        if content.pop("version") != _VERSION:
            return None
        made_with = content["made_with"]
        return RunRecord(
            num_layers=int(content["num_layers"]),
            dialects=tuple(map(str, content["dialects"])),
            recipe=dict(content["recipe"]),
            fingerprints=Fingerprints(**content["fingerprints"]),
            made_with=None if made_with is None else MadeWith(**made_with),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def version_differences(before: MadeWith, now: MadeWith) -> list[str]:
    """`numpy was 1.26.3, is 1.26.4` for each package whose version differs."""
    names = sorted(before.versions.keys() | now.versions.keys())
    pairs = [(name, before.versions.get(name, "unknown"), now.versions.get(name, "absent")) for name in names]
    return [f"{name} was {was}, is {now_is}" for name, was, now_is in pairs if was != now_is]


def recipe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`ptq.group_size: was 64, is 128` for each key that differs, a few of them; keys as a recipe spells them.

    What differs in a layer policy just as it differs in `ptq` is told once: policies are laid over `ptq`.
    """
    found = []
    general: set[tuple[tuple[str, ...], str, str]] = set()
    for keys, was, now_is in _differences(before, now):
        told = (_told(was), _told(now_is))
        if keys[0] == "ptq":
            general.add((keys[1:], *told))
        elif keys[0] == "layer_policies" and (keys[2:], *told) in general:
            continue
        path = format_path(("ptq", *keys) if keys[0] == "opname_blacklist" else keys)
        found.append(f"{path}: was {told[0]}, is {told[1]}")
    if len(found) > _MOST:
        found[_MOST:] = [f"and {len(found) - _MOST} more"]
    return found


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    names = sorted(before.keys() | now.keys(), key=lambda name: (name == "layer_policies", name))  # after `ptq`
    for name in names:
        was, now_is = before.get(name, _ABSENT), now.get(name, _ABSENT)
        if isinstance(was, Mapping) and isinstance(now_is, Mapping):
            yield from _differences(was, now_is, (*path, name))
        elif was is _ABSENT or now_is is _ABSENT or _told(was) != _told(now_is):
            yield (*path, name), was, now_is


def _told(value: Any) -> str:
    """As a recipe spells it; tuples and lists are one."""
    if value is _ABSENT:
        return "not set"
    if isinstance(value, Mapping):
        return "set"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
