"""What models said, side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from gs_dist.runtime.generate import Continuation

__all__ = ["continuations_json", "print_continuations"]


def print_continuations(console: Console, prompts: Sequence[str], found: Sequence[Continuation]) -> None:
    """A column a model under each prompt, and how far each agrees with the first."""
    for number, prompt in enumerate(prompts):
        said = [entry for entry in found if entry.prompt == number]
        table = Table(title=Text(prompt), title_justify="left", show_lines=True)
        for entry in said:
            table.add_column(Text(entry.model), ratio=1, overflow="fold")
        table.add_row(*(Text(entry.text if entry.ended else f"{entry.text} ...") for entry in said))
        console.print(table)
        for entry in said[1:]:
            console.print(f"{entry.model}: {_agreement(said[0], entry)}", markup=False, highlight=False)


def _agreement(first: Continuation, other: Continuation) -> str:
    pairs = zip(first.tokens, other.tokens, strict=False)
    same = next((place for place, (one, two) in enumerate(pairs) if one != two), None)
    if same is None and len(first.tokens) == len(other.tokens):
        return f"the same as {first.model}, all {len(first.tokens)} tokens"
    if same is None:
        same = min(len(first.tokens), len(other.tokens))
    return f"the first {same} of {len(first.tokens)} tokens are those of {first.model}"


def continuations_json(prompts: Sequence[str], found: Sequence[Continuation]) -> str:
    """The same for programs."""
    entries = [{**dataclasses.asdict(entry), "prompt": prompts[entry.prompt]} for entry in found]
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
