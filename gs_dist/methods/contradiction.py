"""Settings that exclude each other, told once; recipes and `gs_dist.ptq` each spell them their own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

__all__ = ["YAML", "Contradiction", "Settings", "Spelling"]

Settings = Mapping[str, object]


class Spelling(Protocol):
    """How a front writes settings."""

    def value(self, value: object) -> str:
        """A setting's value."""

    def setting(self, name: str, value: object) -> str:
        """What stands behind `set`."""


class _Yaml:
    """As recipes write them."""

    def value(self, value: object) -> str:
        if isinstance(value, bool) or value is None:
            return "null" if value is None else str(value).lower()
        return str(value.value) if isinstance(value, Enum) else str(value)

    def setting(self, name: str, value: object) -> str:
        return f"{name}: {self.value(value)}"


YAML: Spelling = _Yaml()


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

    def text(self, spelling: Spelling = YAML) -> str:
        """What was found and what to set."""
        found = self.found
        if not isinstance(found, str):
            found = " while ".join(f"{name} is {spelling.value(value)}" for name, value in found.items())
        return f"{found}: set {self._ways(spelling)}"

    def _ways(self, spelling: Spelling) -> str:
        """`a: 1 and b: 2, or c: 3`; of several values of one setting, `a: 1, 2 or 3`."""
        names = {name for settings in self.write for name in settings}
        if len(self.write) > 2 and len(names) == 1:
            (name,) = names
            first, *rest = [settings[name] for settings in self.write]
            *most, last = [spelling.value(value) for value in rest]
            return f"{', '.join([spelling.setting(name, first), *most])} or {last}"
        ways = ([spelling.setting(name, value) for name, value in settings.items()] for settings in self.write)
        return ", or ".join(map(_together, ways))


def _together(settings: Sequence[str]) -> str:
    *most, last = settings
    return f"{', '.join(most)} and {last}" if most else last
