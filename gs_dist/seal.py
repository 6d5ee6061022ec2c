"""Seals: files that a job writes for itself hold a checksum of what they hold, and are not believed without it.

A file is opened again minutes or months later, by another process on another node, and what is in it shapes what is
still to come. Checksums are XXH3 of 128 bits (xxhash): they guard against accidents, not against malice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from gs_dist.errors import DamagedError, OutputError

__all__ = ["SEAL", "joined", "sealed", "sealed_text", "unsealed", "unsealed_text"]

SEAL = "checksum"
_LAST_LINE = f"# {SEAL} of all above: "
_MISSING = object()


def joined(*texts: str) -> str:
    """One checksum of several texts, in order."""
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(f"\0{len(text)} ".encode() + text.encode())
    return digest.hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum under the key `checksum`."""
    return {**content, SEAL: _checksum(content)}


def unsealed(content: Any, label: str) -> dict[str, Any]:
    """What was given to `sealed`.

    Args:
        content: a JSON document as it was read.
        label: what to call it.

    Raises:
        DamagedError: no JSON object, or another one than was written.
        OutputError: it has no checksum.
    """
    if not isinstance(content, dict):
        raise DamagedError(f"{label}: is no JSON object")
    held = {name: value for name, value in content.items() if name != SEAL}
    _compare(content.get(SEAL, _MISSING), _checksum(held), label)
    return held


def sealed_text(text: str) -> str:
    """A text of lines with its checksum in a last one, which is a comment in YAML."""
    return f"{text}{_LAST_LINE}{joined(text)}\n"


def unsealed_text(text: str, label: str) -> str:
    """What was given to `sealed_text`.

    Raises:
        DamagedError: another text than was written.
        OutputError: it has no checksum.
    """
    held, found, seal = text.rpartition(_LAST_LINE)
    _compare(seal.removesuffix("\n") if found else _MISSING, joined(held), label)
    return held


def _checksum(content: Mapping[str, Any]) -> str:
    return joined(json.dumps(content, sort_keys=True, ensure_ascii=True))


def _compare(found: object, expected: str, label: str) -> None:
    if found is _MISSING:
        raise OutputError(
            f"{label}: has no checksum, so it is of another version of gs_dist or damaged: set output to another "
            "directory, or delete it"
        )
    if found != expected:
        raise DamagedError(f"{label}: does not hold what was written to it, by its checksum")
