"""Names and patterns in a foreign config.json, matched in time that is linear in the name.

Python's `re` backtracks, and a short pattern can keep it busy for ever; RE2 does not, and refuses what would need it
(look-around, references back to groups).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import re2

from gs_dist.errors import CheckpointError

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


@lru_cache(maxsize=2 * _MOST)
def _compiled(target: str) -> Any:
    if len(target) > _LONGEST:
        raise CheckpointError(f"{target!r:.60}...: a pattern of {len(target)} characters; {_LONGEST} are the most")
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(target.removeprefix(_PREFIX), options)
    except (re2.error, UnicodeError) as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
        raise CheckpointError(
            f"{target!r:.100} is no pattern that is tried ({reason!s:.100}): patterns of others are matched by RE2, "
            "which has no look-around and no references to groups"
        ) from error
