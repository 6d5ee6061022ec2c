"""Multiple-choice questions, as lm-evaluation-harness asks them.

Source: lm-evaluation-harness 0.4 (`lm_eval/api/task.py`, `ConfigurableTask` with `output_type: multiple_choice`, and
`TemplateLM._encode_pair`). A question is asked once a choice: the log likelihood of the choice's tokens behind the
text. `acc` takes the largest, `acc_norm` the largest per character of the choice.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from gs_dist.data.files import open_file
from gs_dist.data.locations import find_files
from gs_dist.data.rows import WantedRows
from gs_dist.data.tokens import TextTokenizer
from gs_dist.errors import DatasetError, UserError

__all__ = ["Question", "Request", "Task", "questions_of", "read_tasks", "requests_of"]

_OF_OTHERS = {  # what lm-evaluation-harness knows and is the same here, or tells it nothing
    "output_type": "multiple_choice",
    "num_fewshot": 0,
}


class Task(BaseModel):
    """One task of a file; keys are those of lm-evaluation-harness, but for `data`.

    Attributes:
        task: its name.
        data: files, directories, patterns or URIs with a row a question.
        doc_to_text: the question: a column, or a Jinja template of the row.
        doc_to_choice: the choices: a column of lists, a template that gives a list, or the choices themselves.
        doc_to_target: the right one: a column or a template that gives its number from 0, or the choice itself.
        target_delimiter: what stands between question and choice.
        description: stands before every question.
        limit: rows at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    data: tuple[str, ...]
    doc_to_text: str
    doc_to_choice: str | tuple[str, ...]
    doc_to_target: str | int
    target_delimiter: str = " "
    description: str = ""
    limit: int | None = None

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row: text with what stands before it, choices, and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    target: int
    delimiter: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """One choice of a question: the ids of text and choice (t,) int32, and how many of them are the choice's."""

    ids: npt.NDArray[np.int32]
    num_choice: int


def read_tasks(path: Path) -> tuple[Task, ...]:
    """The tasks of a YAML file: one, or a list of them. Data are looked for from where the command runs.

    Raises:
        UserError: it cannot be read, or an entry is no task; the message names file, task and key.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--tasks {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--tasks {path}: is not YAML: {' '.join(str(error).split())}") from None
    entries = found if isinstance(found, list) else [found]
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        keys = ", ".join(Task.model_fields)
        raise UserError(f"--tasks {path}: write a task, with the keys {keys}, or a list of them")
    return tuple(_task(path, entry) for entry in entries)


def _task(path: Path, entry: Mapping[str, Any]) -> Task:
    name = entry.get("task", "a task without name")
    for key, only in _OF_OTHERS.items():
        if entry.get(key, only) != only:
            raise UserError(f"--tasks {path}: {name}: {key} is {entry[key]!r}, and only {only!r} is measured here")
    try:
        return Task.model_validate({key: value for key, value in entry.items() if key not in _OF_OTHERS})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
        raise UserError(
            f"--tasks {path}: {name}: {'; '.join(problems)} (keys are {', '.join(Task.model_fields)})"
        ) from None


def questions_of(task: Task) -> tuple[Question, ...]:
    """All questions of a task, in order.

    Raises:
        DatasetError: no data, or a row that is no question; the message names task, file and row.
    """
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    found: list[Question] = []
    for place, row in _rows(task):
        if len(found) == task.limit:
            break
        try:
            found.append(_question(task, row, environment))
        except Exception as error:  # a template's own arithmetic and look-ups raise anything
            raise DatasetError(
                f"task {task.task}: {place} is no question ({type(error).__name__}: {error}); columns are "
                f"{', '.join(row)}"
            ) from None
    if not found:
        raise DatasetError(f"task {task.task}: {', '.join(task.data)} holds no row")
    return tuple(found)


def _rows(task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
    for location in find_files(task.data).locations:
        file = open_file(location, sample_by="line")
        names = file.schema.names
        for numbers, arrays in file.read([(name,) for name in names], WantedRows()):
            columns = [array.to_pylist() for array in arrays]
            for number, values in zip(numbers, zip(*columns, strict=True), strict=True):
                yield f"{file}, row {number}", dict(zip(names, values, strict=True))


def _question(task: Task, row: Mapping[str, Any], environment: ImmutableSandboxedEnvironment) -> Question:
    def value(wanted: str) -> Any:
        return row[wanted] if wanted in row else environment.from_string(wanted).render(**row)

    text = value(task.doc_to_text)
    if isinstance(task.doc_to_choice, str):
        listed = value(task.doc_to_choice)
        choices = tuple(map(str, ast.literal_eval(listed) if isinstance(listed, str) else listed))
    else:
        choices = task.doc_to_choice
    target = value(task.doc_to_target) if isinstance(task.doc_to_target, str) else task.doc_to_target
    if isinstance(target, str):
        target = choices.index(target) if target in choices else int(target)
    if not 0 <= int(target) < len(choices):
        raise ValueError(f"doc_to_target gives {target}, and there are {len(choices)} choices")
    return Question(
        text=f"{task.description}{text}", choices=choices, target=int(target), delimiter=task.target_delimiter
    )


def requests_of(
    questions: Sequence[Question], tokenizer: TextTokenizer, *, first: int | None, longest: int
) -> list[Request]:
    """A request a choice, question by question.

    Spaces at the end of a text belong to the choice, and the choice's tokens are those by which the whole is longer
    than the text alone. No special token is added; `first` stands before an empty text. Of a request longer than
    `longest`, the beginning is cut off.

    Raises:
        DatasetError: a text is empty and the model has no token that begins one.
    """
    pairs = [(question.text, question.delimiter + choice) for question in questions for choice in question.choices]
    moved = [(text.rstrip(), text[len(text.rstrip()) :] + choice) for text, choice in pairs]
    whole = tokenizer.encode([text + choice for text, choice in moved], add_special_tokens=False)
    alone = tokenizer.encode([text for text, _ in moved], add_special_tokens=False)
    requests = []
    for ids, text in zip(whole, alone, strict=True):
        before = len(text)
        if not before:
            if first is None:
                raise DatasetError("a question has no text, and the model names no token that begins a text")
            ids, before = np.concatenate([[first], ids]), 1
        num_choice = len(ids) - before
        ids = ids[-min(longest, len(ids)) :]
        requests.append(Request(ids=ids.astype(np.int32), num_choice=num_choice))
    return requests
