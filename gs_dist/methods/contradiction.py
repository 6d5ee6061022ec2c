"""Settings that exclude each other, told once; recipes and `gs_dist.ptq` each spell them their own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

__all__ = ["Contradiction", "Settings"]

Settings = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """A setting that does not go with others.

    Attributes:
        field: the setting that is refused.
        found: settings with their values, the refused one first; or a rule in words.
        write: settings that would mend it, each entry by itself.
    """

    field: str
    found: Settings | str
    write: Sequence[Settings]

    def __str__(self) -> str:
        """As a recipe spells it."""
        found = self.found
        if not isinstance(found, str):
            found = " while ".join(f"{name} is {_written(value)}" for name, value in found.items())
        return f"{found}: set {_either([_together(settings) for settings in self.write])}"


def _together(settings: Settings) -> str:
    *most, last = [f"{name}: {_written(value)}" for name, value in settings.items()]
    return f"{', '.join(most)} and {last}" if most else last


def _either(ways: Sequence[str]) -> str:
    """`a`, `a, or b`; of ways that differ in one value, `a: 1, 2 or 3`."""
    names = {way.partition(": ")[0] for way in ways}
    if len(ways) > 2 and len(names) == 1:
        values = [way.partition(": ")[2] for way in ways]
        return f"{names.pop()}: {', '.join(values[:-1])} or {values[-1]}"
    return ", or ".join(ways)


def _written(value: object) -> str:
    """A value in YAML."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return str(value.value) if isinstance(value, Enum) else str(value)
