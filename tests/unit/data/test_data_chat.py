from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, processors

from gs_dist.data.chat import ChatTemplate, messages_of
from gs_dist.data.dataset import CalibrationDataset, open_dataset
from gs_dist.errors import DatasetError
from gs_dist.recipe.sections import CalibrationData

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "golden_chat.json").read_text(encoding="utf-8"))
MODELS = {model["name"]: model for model in GOLDEN["models"]}
CASES = [(model["name"], chat["name"]) for model in GOLDEN["models"] for chat in model["chats"]]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
PLAIN = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"


def model_directory(path: Path, model: dict[str, Any]) -> Path:
    """tokenizer.json and tokenizer_config.json as a model has them; the tokenizer puts BOS before text."""
    path.mkdir(exist_ok=True)
    tokenizer = Tokenizer.from_str(GOLDEN["tokenizer"])
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer.save(str(path / "tokenizer.json"))
    special = {key: value for key, value in model.items() if key.endswith("_token")}
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": model.get("template"), **special}))
    return path


def opened(data: Path, model: Path, **settings: Any) -> CalibrationDataset:
    settings = {"num_samples": 1, "sequence_length": 512, "packing": False} | settings
    return open_dataset(CalibrationData(data=(str(data),), **settings), 4096, model / "tokenizer.json", eos_token_id=7)


def first_row(dataset: CalibrationDataset) -> list[int]:
    batch = next(iter(dataset.batches()))
    return batch.input_ids[0][batch.mask[0]].tolist()  # type: ignore[no-any-return]  # NumPy says Any


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "chat_name"), CASES)
def test_chats_are_rendered_and_tokenized_as_transformers_does(tmp_path: Path, name: str, chat_name: str) -> None:
    """Text and token ids are those of transformers, and what its template refuses is refused in its words."""
    model = MODELS[name]
    chat = next(entry for entry in model["chats"] if entry["name"] == chat_name)
    directory = model_directory(tmp_path / "model", model)
    data = jsonl(tmp_path / "c.jsonl", {"messages": chat["messages"]})
    if "refusal" in chat:
        with pytest.raises(DatasetError) as caught:
            first_row(opened(data, directory))
        assert "row 0: messages: chat_template of tokenizer_config.json refuses the chat" in str(caught.value)
        assert chat["refusal"] in str(caught.value)
        return
    template = ChatTemplate.of_model(directory)
    assert template is not None
    assert template.render(chat["messages"]) == chat["text"]
    assert first_row(opened(data, directory)) == chat["input_ids"]


def test_every_form_of_a_chat_gives_the_same_samples(tmp_path: Path) -> None:
    """Role and content, from and value, JSON as text, a Parquet list of structs, a bare list a line: all the same."""
    model = model_directory(tmp_path / "model", {"template": PLAIN})
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    with_nulls = [{**message, "tool_calls": None, "name": None} for message in CHAT]
    forms = [
        jsonl(tmp_path / "a.jsonl", {"messages": CHAT}),
        jsonl(tmp_path / "b.jsonl", {"conversations": sharegpt}),
        jsonl(tmp_path / "c.jsonl", {"messages": json.dumps(CHAT)}),
        jsonl(tmp_path / "d.jsonl", CHAT),
        jsonl(
            tmp_path / "e.jsonl", {"messages": CHAT}, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}
        ),
        jsonl(tmp_path / "f.jsonl", {"prompt": "hi", "response": "ho"}),
    ]
    for name, values in (("messages", CHAT), ("conversations", sharegpt), ("messages", with_nulls)):
        pq.write_table(pa.table({name: [values] * 2}), tmp_path / f"{name}-{len(forms)}.parquet")
        forms.append(tmp_path / f"{name}-{len(forms)}.parquet")
    (tmp_path / "g.json").write_text(json.dumps([{"messages": CHAT}], indent=2))
    want = Tokenizer.from_str(GOLDEN["tokenizer"]).encode("user:hi;assistant:ho;", add_special_tokens=False).ids
    for form in [*forms, tmp_path / "g.json"]:
        assert first_row(opened(form, model)) == want, form


def test_chats_get_no_token_beside_those_of_their_template(tmp_path: Path) -> None:
    """Neither the tokenizer's BOS nor an end is put to a chat, packed or not."""
    model = model_directory(tmp_path / "model", {"template": PLAIN})
    data = jsonl(tmp_path / "c.jsonl", *[{"messages": CHAT}] * 3)
    row = first_row(opened(data, model))
    assert first_row(opened(data, model, packing=True, sequence_length=2 * len(row))) == row * 2


def test_places_of_a_template(tmp_path: Path) -> None:
    """chat_template.jinja counts before tokenizer_config.json, and of several templates the default."""
    model = model_directory(tmp_path / "model", {"template": "old"})
    config = json.loads((model / "tokenizer_config.json").read_text())

    def rendered() -> str:
        found = ChatTemplate.of_model(model)
        assert found is not None
        return found.render(CHAT)

    assert rendered() == "old"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": several}))
    assert rendered() == "usual"
    (model / "chat_template.jinja").write_text("file")
    assert rendered() == "file"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"messages": [{"role": "user", "content": 7}]},
            "row 1: messages: chat_template of .* refuses the chat: TypeError",
        ),
        (
            {"messages": [{"speaker": "x", "text": "y"}]},
            "a message of speaker, text, where role and content are expected",
        ),
        ({"messages": ["hi"]}, "no list of messages"),
        ({"messages": "hi"}, "text that is not JSON, where a list of messages is expected"),
        ({"messages": {"role": "user"}}, "no list of messages"),
    ],
)
def test_a_chat_that_is_none_is_named(tmp_path: Path, row: Any, says: str) -> None:
    """What is no chat is refused with its row and what was found."""
    model = model_directory(tmp_path / "model", {"template": PLAIN})
    data = jsonl(tmp_path / "c.jsonl", {"messages": CHAT}, row)
    with pytest.raises(DatasetError, match=says):
        opened(data, model, num_samples=2).fingerprint()


def test_an_empty_chat_holds_nothing(tmp_path: Path) -> None:
    """A chat without a message is passed over and counted, or refused where the recipe is strict."""
    model = model_directory(tmp_path / "model", {"template": PLAIN})
    data = jsonl(tmp_path / "c.jsonl", {"messages": []}, {"messages": CHAT}, {"other": 1}, {"messages": CHAT})
    dataset = opened(data, model, num_samples=2)
    dataset.fingerprint()
    assert any(note.startswith("2 rows in which messages is null or empty passed over") for note in dataset.notes)
    with pytest.raises(DatasetError, match="row 0: messages is null or empty"):
        opened(data, model, strict=True).fingerprint()


def test_a_template_is_needed_and_must_be_sound(tmp_path: Path) -> None:
    """Chats without a template say what is missing and where it goes; one that is no Jinja, or not safe, is refused."""
    data = jsonl(tmp_path / "c.jsonl", {"messages": CHAT})
    model = model_directory(tmp_path / "model", {})
    with pytest.raises(DatasetError, match=r"the model has no chat template .* put its chat_template\.jinja"):
        opened(data, model)
    (model / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DatasetError, match=r"chat_template\.jinja is not a Jinja template that can be used"):
        opened(data, model)
    (model / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DatasetError, match="SecurityError"):
        first_row(opened(data, model))
    (model / "chat_template.jinja").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DatasetError, match="is a Git LFS pointer"):
        opened(data, model)


def test_the_day_is_the_same_every_day(tmp_path: Path) -> None:
    """A template that asks for the day is told one fixed day, and the user is told so."""
    model = model_directory(tmp_path / "model", {"template": "{{ strftime_now('%d %b %Y') }}"})
    dataset = opened(jsonl(tmp_path / "c.jsonl", {"messages": CHAT}), model)
    assert "the chat template asks for the day: it is always 26 Jul 2024" in dataset.notes


def test_text_that_begins_with_bos_gets_it_once_where_the_recipe_says_so(tmp_path: Path) -> None:
    """Text that was rendered already begins with BOS: two of them are told, and add_special_tokens: false gives one."""
    model = model_directory(tmp_path / "model", {"template": PLAIN})
    bos = Tokenizer.from_str(GOLDEN["tokenizer"]).token_to_id("<s>")
    data = jsonl(tmp_path / "c.jsonl", {"text": "<s>abc"}, {"text": "abc"})
    twice = opened(data, model, num_samples=2)
    twice.fingerprint()
    assert first_row(twice)[:2] == [bos, bos]
    assert any(note.startswith("<s> stands before 1 text in column text already, and is put") for note in twice.notes)
    once = opened(data, model, num_samples=2, add_special_tokens=False)
    once.fingerprint()
    assert first_row(once).count(bos) == 1
    assert not any("once more" in note for note in once.notes)


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        (
            {"bos_token": "<s>", "add_bos_token": False},
            "add_bos_token: false, and tokenizer.json adds <s>: text is read with",
        ),
        ({"bos_token": "<s>", "add_bos_token": True}, None),
        (
            {"eos_token": "</s>", "add_eos_token": True},
            "add_eos_token: true, and tokenizer.json adds no </s>: text is read wi",
        ),
        ({"eos_token": {"content": "</s>"}, "add_eos_token": False}, None),
        ({}, None),
    ],
)
def test_two_files_that_differ_on_special_tokens_are_told(
    stated: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    """tokenizer.json is followed, as transformers 5 does; nothing is said where no special tokens are asked for."""
    model = model_directory(tmp_path / "model", {"template": PLAIN})
    path = model / "tokenizer_config.json"
    kept = {} if not path.exists() else json.loads(path.read_text())
    for name in ("bos_token", "eos_token", "add_bos_token", "add_eos_token"):
        kept.pop(name, None)
    path.write_text(json.dumps({**kept, **stated}))
    data = jsonl(tmp_path / "c.jsonl", {"text": "abc"})
    notes = [note for note in opened(data, model).notes if "tokenizer_config.json says" in note]
    assert len(notes) == (told is not None)
    assert told is None or told in notes[0]
    assert not any("tokenizer_config.json says" in n for n in opened(data, model, add_special_tokens=False).notes)


def test_messages_keep_what_they_hold() -> None:
    """Only the names of ShareGPT change, and fields without a value go; what else a message holds stays."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
    assert messages_of([call, {"from": "tool", "value": "x", "weight": 0}]) == [
        call,
        {"role": "tool", "content": "x", "weight": 0},
    ]


def test_json_rows_that_differ_are_named(tmp_path: Path) -> None:
    """A line that is no JSON, a value of another type and a line without end are told with their place."""
    model = model_directory(tmp_path / "model", {"template": PLAIN})
    data = tmp_path / "c.jsonl"
    for lines, says in (
        ('{"text": "a"}\n\n{"text": ', r"c\.jsonl, line 3 is not JSON"),
        ('{"text": "a"}\n' * 300 + '{"text": 5}\n', r"line 301: text is a JSON number, and text in other rows"),
        ('{"input_ids": [1, 2]}\n' * 300 + '{"input_ids": [1, "2"]}\n', r"line 301: input_ids is no list of integers"),
        ('{"text": "a"}\n5\n', r"line 2: a JSON number where an object"),
    ):
        data.write_text(lines)
        with pytest.raises(DatasetError, match=says):
            opened(data, model, num_samples=400).fingerprint()
    with data.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(80 << 20)  # a hole: a line of 80 MiB that takes no room on disk
    with pytest.raises(DatasetError, match=r"line 1 is longer than 64 MiB: split it"):
        opened(data, model)


def test_csv_and_text_give_the_rows_they_hold(tmp_path: Path) -> None:
    """CSV: quoted line ends stay, an empty field is null; text: lines, paragraphs or the file."""
    model = model_directory(tmp_path / "model", {"template": PLAIN})
    tokenizer = Tokenizer.from_str(GOLDEN["tokenizer"])

    def rows(data: Path, count: int, **settings: Any) -> list[list[int]]:
        dataset = opened(data, model, num_samples=count, add_special_tokens=False, **settings)
        return [ids[mask].tolist() for b in dataset.batches() for ids, mask in zip(b.input_ids, b.mask, strict=True)][
            :count
        ]

    def ids(*texts: str) -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    table = tmp_path / "c.csv"
    table.write_text('n,text\n1,"a\nb"\n2,\n3,"say ""x"""\n')
    assert rows(table, 2) == ids("a\nb", 'say "x"')
    assert sorted(rows(table, 2, seed=3)) == sorted(ids("a\nb", 'say "x"'))
    assert rows(table, 3, column="n") == ids("1", "2", "3")
    prose = tmp_path / "c.txt"
    prose.write_bytes("\ufeffone\r\ntwo\n\n \nthree\n".encode())
    assert rows(prose, 3) == ids("one", "two", "three")
    assert rows(prose, 2, sample_by="paragraph") == ids("one\r\ntwo", "three")
    assert rows(prose, 1, sample_by="document") == ids("one\r\ntwo\n\n \nthree\n")
    assert sorted(rows(prose, 3, seed=1)) == sorted(ids("one", "two", "three"))
    prose.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(DatasetError, match=r"c\.txt, line 2: not UTF-8 text"):
        rows(prose, 2)
