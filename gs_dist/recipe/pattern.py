"""Patterns of names, matched in time that is linear in the name.

Python's `re` backtracks, and a short pattern can keep it busy for ever; RE2 does not, and has not what would need it:
look-around and references back to groups. All else is written as for `re`.
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from typing import Any

import re2

__all__ = ["compiled", "compiled_of_recipe"]

_KEPT = 2000  # compiled patterns


@lru_cache(maxsize=_KEPT)
def compiled(pattern: str) -> Any:
    """An object whose `match` matches from the start of a name, as that of `re.compile`.

    Raises:
        ValueError: RE2 does not take the pattern; the message is its reason.
    """
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeError) as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
        raise ValueError(f"{reason!s:.100}") from error


def compiled_of_recipe(pattern: str) -> Any:
    """The same of a pattern that a user wrote and may change.

    Raises:
        ValueError: it is no regular expression, or needs what RE2 has not; the message says which, and what to do.
    """
    try:
        return compiled(pattern)
    except ValueError as error:
        reason = _fault(pattern)
        if reason is not None:
            raise ValueError(f"it does not compile ({reason})") from error
        raise ValueError(
            f"it uses what is not taken here ({error}): patterns are matched by RE2, in linear time, which has no "
            "look-ahead, no look-behind and no references back to groups. To leave some names out, name the others, "
            "or list what is to stay in ptq.opname_blacklist"
        ) from error


def _fault(pattern: str) -> str | None:
    """What Python has against a pattern; None where it would take it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None
