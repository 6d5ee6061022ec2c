"""What a check of a model directory found: problems by rule, notes and facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gs_dist.wording import one_line

__all__ = ["CheckReport", "Note", "Problem"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One broken rule: where it was broken (`tensor` is "" for a file as a whole), what was found and expected."""

    file: str
    tensor: str
    rule: str
    found: str
    expected: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.tensor}" if self.tensor else self.file
        return one_line(f"{where}: [{self.rule}] found {self.found}; expected {self.expected}")


@dataclass(frozen=True, kw_only=True)
class Note:
    """What one must know to have an engine load the directory; nothing is wrong with it."""

    rule: str
    text: str

    def __str__(self) -> str:
        return one_line(f"note: [{self.rule}] {self.text}")


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Result of `check`: the dialect, every problem in order of file and tensor, and what the directory holds.

    `dialect` is "" where no dialect could be told. `engine` is the engine whose loader's rules were applied too;
    `notes` are about it. `verified` says whether something vouches for what was published.
    """

    dialect: str
    engine: str | None
    problems: tuple[Problem, ...]
    facts: Mapping[str, str]
    notes: tuple[Note, ...] = ()
    verified: bool = True

    @property
    def clean(self) -> bool:
        """Whether no rule is broken."""
        return not self.problems

    @property
    def exit_code(self) -> int:
        """0 for a clean directory, notes or not; 2 for a broken one."""
        return 0 if self.clean else 2

    def render(self, limit: int = 50) -> str:
        """Plain text: facts, then at most `limit` problems a line each, notes, and a verdict."""
        width = max((len(name) for name in self.facts), default=0)
        lines = [f"{name:<{width}}  {one_line(value)}" for name, value in self.facts.items()]
        lines += [str(problem) for problem in self.problems[:limit]]
        if len(self.problems) > limit:
            lines.append(f"... and {len(self.problems) - limit} more")
        lines += [str(note) for note in self.notes]
        subject = f"{self.dialect or 'unknown'} checkpoint" + (f" for {self.engine}" if self.engine else "")
        count = len(self.problems)
        sound = "no problem found" if self.verified else "no rule broken, but not verified: see above"
        verdict = sound if self.clean else f"{count} problem{'s' if count > 1 else ''} found"
        return "\n".join([*lines, f"{subject}: {verdict}"])
