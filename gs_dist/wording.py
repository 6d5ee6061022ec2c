"""Words that messages share."""

from __future__ import annotations

import unicodedata

__all__ = ["counted", "one_line", "printable"]

# Categories of characters that steer a terminal or hide in a text: control, format (directions of writing among them),
# halves of pairs, private, unassigned, line and paragraph separators.
_STEERING = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: str) -> str:
    """A text with what would steer the terminal spelt out as JSON does; line ends and tabulators stay.

    For whatever is printed: names of tensors and files, and values of other people's JSON, can hold any character.
    """
    if text.isascii() and text.replace("\n", " ").replace("\t", " ").isprintable():
        return text
    return "".join(char if char in "\n\t" else _spelt(char) for char in text)


def one_line(text: str) -> str:
    """The same of a name or a value, which must not look like lines of its own."""
    return text if text.isascii() and text.isprintable() else "".join(map(_spelt, text))


def _spelt(char: str) -> str:
    if unicodedata.category(char) not in _STEERING:
        return char
    units = char.encode("utf-16-be", "surrogatepass").hex()  # as JSON spells them, so that JSON stays JSON
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def counted(count: int, noun: str) -> str:
    """`1 worker`, `2 workers`, `2 micro-batches`."""
    plural = f"{noun}es" if noun.endswith(("ch", "ss")) else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"
