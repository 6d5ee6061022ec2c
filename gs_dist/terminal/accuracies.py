"""Accuracies on tasks, a row a task and model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gs_dist.results.accuracy import TaskResult

__all__ = ["accuracies_json", "print_accuracies"]


def print_accuracies(console: Console, results: Sequence[TaskResult]) -> None:
    """Shares of right answers in percent with their standard errors."""
    table = Table("task", "model", "questions", "acc", "acc_norm")
    for result in results:
        found = result.accuracy
        figures = (f"{share:.2%} ± {found.standard_error(share):.2%}" for share in (found.acc, found.acc_norm))
        table.add_row(Text(result.task), Text(result.model), str(found.num_questions), *figures)
    console.print(table)


def accuracies_json(results: Sequence[TaskResult]) -> str:
    """The same for programs."""
    entries = []
    for result in results:
        found = result.accuracy
        errors = {f"{name}_stderr": found.standard_error(getattr(found, name)) for name in ("acc", "acc_norm")}
        entries.append({"task": result.task, "model": result.model, **dataclasses.asdict(found), **errors})
    return json.dumps(entries, indent=2) + "\n"
