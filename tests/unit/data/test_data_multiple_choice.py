"""Multiple-choice questions from rows, and the requests that are asked for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import save_tokenizer

from gs_dist.data.multiple_choice import Question, Task, questions_of, read_tasks, requests_of
from gs_dist.data.tokens import TextTokenizer
from gs_dist.errors import DatasetError, UserError

ROWS = [
    {"ctx": "It is a truth ", "endings": ["universally", "hardly"], "label": 0, "letter": "A"},
    {"ctx": "A single man", "endings": ["in possession", "out"], "label": 1, "letter": "B"},
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "quiz.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return str(path)


def task(data: str, **keys: Any) -> Task:
    given = {"doc_to_text": "ctx", "doc_to_choice": "endings", "doc_to_target": "label"}
    return Task.model_validate({"task": "quiz", "data": data, **given, **keys})


def test_columns_and_templates_give_the_same_questions(data: str) -> None:
    """A key names a column or is a Jinja template; a target is a number or the choice itself."""
    wanted = questions_of(task(data))
    assert [(q.text, q.choices, q.target) for q in wanted] == [
        ("It is a truth ", ("universally", "hardly"), 0),
        ("A single man", ("in possession", "out"), 1),
    ]
    templates = {"doc_to_text": "{{ctx}}", "doc_to_choice": "{{endings}}", "doc_to_target": "{{label}}"}
    assert questions_of(task(data, **templates)) == wanted
    lettered = questions_of(task(data, doc_to_choice=["A", "B"], doc_to_target="letter", description="Choose. "))
    assert [(q.text, q.choices, q.target) for q in lettered] == [
        ("Choose. It is a truth ", ("A", "B"), 0),
        ("Choose. A single man", ("A", "B"), 1),
    ]
    assert len(questions_of(task(data, limit=1))) == 1


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"doc_to_target": "{{label + 5}}"}, "row 0 is no question .*doc_to_target gives 5, and there are 2 choices"),
        ({"doc_to_text": "{{question}}"}, "'question' is undefined.*columns are ctx, endings"),
        ({"limit": 0}, "holds no row"),
    ],
)
def test_a_row_that_is_no_question_is_named(data: str, keys: dict[str, Any], says: str) -> None:
    """Task, file, row and columns."""
    with pytest.raises(DatasetError, match=says):
        questions_of(task(data, **keys))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: [", "is not YAML"),
        ("3", "write a task, with the keys task, data"),
        ("task: a\ndata: b\n", "a: doc_to_text: Field required"),
        ("task: a\nnum_fewshot: 5\n", "a: num_fewshot is 5, and only 0 is measured here"),
        ("task: a\noutput_type: generate_until\n", "only 'multiple_choice'"),
        ("task: a\ndata: b\ndoc_to_text: c\ndoc_to_choice: d\ndoc_to_target: e\nmetric: f\n", "metric: Extra inputs"),
    ],
)
def test_a_file_of_tasks_is_checked_as_a_whole(text: str, says: str, tmp_path: Path) -> None:
    """What is wrong with it is named with file, task and key."""
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        read_tasks(tmp_path / "tasks.yaml")


def test_choices_are_those_tokens_by_which_the_whole_is_longer(tmp_path: Path) -> None:
    """Spaces at the end of a text go to the choice; an empty text has the first token before it."""
    save_tokenizer(tmp_path, 128)
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
    ids, text = tokenizer.encode(["It is a truth hardly", "It is a truth"], add_special_tokens=False)
    questions = [Question(text="It is a truth ", choices=("hardly",), target=0, delimiter="")]
    (request,) = requests_of(questions, tokenizer, first=None, longest=100)
    assert request.ids.tolist() == ids.tolist()
    assert request.num_choice == len(ids) - len(text)
    (cut,) = requests_of(questions, tokenizer, first=None, longest=3)
    assert cut.ids.tolist() == ids[-3:].tolist()
    empty = [Question(text="", choices=("hardly",), target=0, delimiter=" ")]
    (request,) = requests_of(empty, tokenizer, first=7, longest=100)
    assert request.ids[0] == 7
    assert request.num_choice == len(request.ids) - 1
    with pytest.raises(DatasetError, match="begins a text"):
        requests_of(empty, tokenizer, first=None, longest=100)
