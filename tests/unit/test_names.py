"""Names in code have one spelling."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A word of a name in small letters or in capitals, between underscores and humps.
ISE = re.compile(
    r"[A-Z]?[a-z]+is(?:e|es|ed|er|ing|able|ations?)(?![a-z])|[A-Z]+IS(?:E|ES|ED|ER|ING|ABLE|ATIONS?)(?![A-Z])"
)
# These are never spelt otherwise.
ALWAYS_ISE = {
    *("raise", "raises", "raised", "raising", "advise", "madvise", "promise", "promises", "promised", "disable"),
    *("noise", "precise", "premises", "rises", "likewise", "otherwise", "bitwise", "elementwise", "pairwise"),
}
COMMENT_OR_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""|"(?:\\.|[^"\\\n])*"' + r"|'(?:\\.|[^'\\\n])*'|#[^\n]*", re.DOTALL
)


def words(text: str) -> set[str]:
    """Words with -ise in the identifiers of a module; its comments and strings are prose, which has -ise."""
    return {word for word in ISE.findall(COMMENT_OR_STRING.sub(" ", text)) if word.lower() not in ALWAYS_ISE}


def test_a_name_in_ise_is_found_and_prose_is_none() -> None:
    """In whatever case, as a part or the whole; not in comments and strings, nor where there is no other spelling."""
    text = "def dequantised(x): raise Normalise(_QUANTISES, noise, x.is_initialised)  # quantised\n'summarise'\n"
    assert words(text) == {"dequantised", "Normalise", "QUANTISES", "initialised"}


def test_names_are_spelt_as_those_of_libraries_are() -> None:
    """`quantize`, never `quantise`: one spelling beside NumPy's, transformers' and MindSpore's own names."""
    modules = [path for folder in ("gs_dist", "tests", "jobs") for path in (ROOT / folder).rglob("*.py")]
    found = {path: wrong for path in modules if (wrong := words(path.read_text(encoding="utf-8")))}
    assert not found, f"spell these -ize: {found}"
