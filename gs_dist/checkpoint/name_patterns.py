"""Names and patterns in a foreign config.json, matched in time that is linear in the name.

Nobody here can mend a pattern of theirs, so that one which RE2 does not take is refused as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gs_dist.errors import CheckpointError
from gs_dist.recipe.pattern import compiled

__all__ = ["NamePatterns", "matches"]

_PREFIX = "re:"  # by which compressed-tensors tells a pattern from a name (utils/match.py)
_MOST = 1000  # patterns of one list; each is tried on every name
_LONGEST = 1000  # characters of a pattern


class NamePatterns:
    """A list of names and of patterns that match from a name's start.

    Raises:
        CheckpointError: a pattern that RE2 does not take, or more of them than any model needs.
    """

    def __init__(self, targets: Iterable[str]) -> None:
        targets = list(targets)
        self._names = frozenset(target for target in targets if not target.startswith(_PREFIX))
        patterns = [target for target in targets if target.startswith(_PREFIX)]
        if len(patterns) > _MOST:
            raise CheckpointError(f"{len(patterns)} patterns, where {_MOST} are the most that are tried")
        self._patterns = [_compiled(pattern) for pattern in patterns]

    def match(self, name: str) -> bool:
        """Whether the name is listed, or one of the patterns matches it."""
        return name in self._names or any(pattern.match(name) for pattern in self._patterns)


def matches(name: str, target: str) -> bool:
    """The same of one name or pattern."""
    return bool(_compiled(target).match(name)) if target.startswith(_PREFIX) else target == name


def _compiled(target: str) -> Any:
    if len(target) > _LONGEST:
        raise CheckpointError(f"{target!r:.60}...: a pattern of {len(target)} characters; {_LONGEST} are the most")
    try:
        return compiled(target.removeprefix(_PREFIX))
    except ValueError as error:
        raise CheckpointError(
            f"{target!r:.100} is no pattern that is tried ({error}): patterns of others are matched by RE2, "
            "which has no look-around and no references to groups"
        ) from error
