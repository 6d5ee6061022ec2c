"""Words that messages share."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["counted", "is_uri", "one_line", "printable", "without_secrets"]

# Categories of characters that steer a terminal or hide in a text: control, format (directions of writing among them),
# halves of pairs, private, unassigned, line and paragraph separators.
_STEERING = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


# One slash, too: a path object takes the second one away.
_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+:/+)(?P<rest>.*)", re.DOTALL)
_URI_IN_TEXT = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]+:/+[^\s'\"]*[@?][^\s'\"]*")


def is_uri(entry: str) -> bool:
    """Whether an entry of a recipe is a URI, and no path on a disk."""
    return _URI.fullmatch(entry) is not None


def without_secrets(entry: str) -> str:
    """A path or URI as it may be shown: no user, no password, no query.

    A password may hold any character but `@`; where a query holds one, nobody can tell which of both it is, and nothing
    is shown.
    """
    uri = _URI.fullmatch(entry)
    if uri is None:
        return entry
    head, mark, query = uri["rest"].partition("?")
    if "@" in query:
        return f"{uri['scheme']}***"
    _, user, place = head.rpartition("@")
    return f"{uri['scheme']}{'***@' if user else ''}{place}{'?***' if mark else ''}"


def printable(text: str) -> str:
    """A text with what would steer the terminal spelt out as JSON does; line ends and tabulators stay.

    For whatever is printed: names of tensors and files, and values of other people's JSON, can hold any character. URIs
    in it are shown as `without_secrets` shows them; whoever makes a message of one does so before, since here it is no
    longer known where one ends.
    """
    text = _URI_IN_TEXT.sub(lambda found: without_secrets(found[0]), text) if ":/" in text else text
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
