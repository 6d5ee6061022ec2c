"""Foreign text in Markdown: names of models and files, patterns and notes, shown as they are and never as markup."""

from __future__ import annotations

import json
import re

__all__ = ["code", "fenced", "prose", "quoted"]

# What begins HTML, emphasis, a link, a code span or a cell. Entities are text to every renderer, wherever they stand.
_MARKUP = re.compile(r"[&<>`*\[\]|\\]")
_FENCE = "~"
_LEAST = 4


def prose(text: str) -> str:
    """Text within a sentence or a heading, on one line."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", _one_line(text))


def code(text: str) -> str:
    """A code span that holds any text, backticks too (CommonMark, 6.1)."""
    line = _one_line(text)
    runs = [len(run) for run in re.findall("`+", line)]
    if not runs:
        return f"`{line}`"
    ticks = "`" * next(length for length in range(1, max(runs) + 2) if length not in runs)
    return f"{ticks} {line} {ticks}"


def quoted(text: str) -> str:
    """A string of YAML front matter, which some renderers show as prose: JSON with markup as escapes."""
    return _MARKUP.sub(lambda found: found[0] if found[0] == "\\" else f"\\u{ord(found[0]):04x}", json.dumps(text))


def fenced(text: str, language: str = "") -> str:
    """A block of code with a fence longer than any that stands in it (CommonMark, 4.5)."""
    runs = [len(run) for run in re.findall(f"{_FENCE}+", text)]
    fence = _FENCE * max(_LEAST, *(length + 1 for length in runs)) if runs else _FENCE * _LEAST
    return f"{fence}{language}\n{text}\n{fence}"


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
