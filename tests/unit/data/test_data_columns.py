from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import save_tokenizer
from tokenizers import Tokenizer

from gs_dist.data.dataset import open_dataset
from gs_dist.errors import DatasetError
from gs_dist.recipe.sections import CalibrationData

COUNT = 40
TEXTS = [f"text number {i}, longer than twelve bytes" for i in range(COUNT)]
IDS = [[i, i + 1, i + 2] for i in range(COUNT)]
CHATS = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}] for i in range(COUNT)]
TEMPLATE = "{% for message in messages %}{{ message['role'] + ':' + message['content'] + ';' }}{% endfor %}"
NULL_ROWS = (3, 4, 17)


def encoded(kind: pa.DataType, values: list[Any]) -> pa.Array:
    """The values as an array of this type, which not every type can be made into directly."""
    if pa.types.is_dictionary(kind):
        distinct = list(dict.fromkeys(value for value in values if value is not None))
        indices = [None if value is None else distinct.index(value) for value in values]
        return pa.DictionaryArray.from_arrays(pa.array(indices, kind.index_type), pa.array(distinct, kind.value_type))
    if pa.types.is_run_end_encoded(kind):
        ends = pa.array(range(1, len(values) + 1), kind.run_end_type)
        return pa.RunEndEncodedArray.from_arrays(ends, pa.array(values, kind.value_type))
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.array(values, kind)


def _chat(text: pa.DataType) -> pa.DataType:
    return pa.struct([("role", text), ("content", text)])


TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.uint32(), pa.large_string()),
    pa.dictionary(pa.int32(), pa.string_view()),
    pa.run_end_encoded(pa.int32(), pa.string()),
    pa.run_end_encoded(pa.int16(), pa.string_view()),
]
IDS_TYPES = [
    pa.list_(pa.int32()),
    pa.large_list(pa.uint8()),
    pa.list_(pa.int64(), 3),
    pa.list_view(pa.int16()),
    pa.large_list_view(pa.uint64()),
    pa.run_end_encoded(pa.int32(), pa.list_(pa.int32())),
]
CHAT_TYPES = [
    pa.list_(_chat(pa.string())),
    pa.large_list(_chat(pa.string_view())),
    pa.list_view(_chat(pa.large_string())),
    pa.list_(_chat(pa.dictionary(pa.int32(), pa.string()))),
]
KINDS = [("text", kind) for kind in TEXT_TYPES] + [("input_ids", kind) for kind in IDS_TYPES]
KINDS += [("messages", kind) for kind in CHAT_TYPES]
# pyarrow 25 writes neither run ends, nor a dictionary of views, nor views in lists to Parquet, and does not read
# the nulls of a list of fixed size that it wrote.
NOT_IN_PARQUET = [
    pa.dictionary(pa.int32(), pa.string_view()),
    pa.large_list(_chat(pa.string_view())),
    pa.list_(pa.int64(), 3),
]
IN_PARQUET = [
    (name, kind) for name, kind in KINDS if not pa.types.is_run_end_encoded(kind) and kind not in NOT_IN_PARQUET
]
CASES = [(name, kind, False) for name, kind in KINDS] + [(name, kind, True) for name, kind in IN_PARQUET]
VALUES: dict[str, list[Any]] = {"text": TEXTS, "input_ids": IDS, "messages": CHATS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer of characters and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    save_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def write(path: Path, array: pa.Array, name: str, *, parquet: bool) -> str:
    table = pa.table({"id": list(range(len(array))), name: array})
    if parquet:
        pq.write_table(table, path, row_group_size=7)
    else:
        with pa.ipc.new_file(path, table.schema) as sink:
            sink.write_table(table, max_chunksize=9)
    return str(path)


def rows_of(model: Path, path: str, **settings: Any) -> list[list[int]]:
    settings = {"num_samples": 37, "sequence_length": 64, "packing": False} | settings
    dataset = open_dataset(CalibrationData(data=(path,), **settings), 128, model / "tokenizer.json")
    return [
        ids[mask].tolist()
        for batch in dataset.batches()
        for ids, mask in list(zip(batch.input_ids, batch.mask, strict=True))[: batch.num_samples]
    ]


def expected(model: Path, name: str) -> list[list[int]]:
    """Token ids of every row, by the tokenizer alone."""
    if name == "input_ids":
        return IDS
    texts = TEXTS if name == "text" else [f"user:{chat[0]['content']};assistant:yes;" for chat in CHATS]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize(("name", "kind", "parquet"), CASES, ids=str)
def test_every_accepted_type_is_read_in_every_way(
    tmp_path: Path, model: Path, name: str, kind: pa.DataType, parquet: bool
) -> None:
    """What one check accepts every later operation does: file order, a seed, nulls, packing, a later micro-batch."""
    whole, holes = encoded(kind, VALUES[name]), [*VALUES[name]]
    for row in NULL_ROWS:
        holes[row] = None
    path = write(tmp_path / "whole", whole, name, parquet=parquet)
    want = expected(model, name)
    assert rows_of(model, path) == want[:37], "file order"
    seeded = rows_of(model, path, seed=5, num_samples=COUNT)
    assert sorted(seeded) == sorted(want), "seed"
    assert rows_of(model, path, seed=5) == seeded[:37], "seed, fewer"
    stream = [token for row in want for token in row]
    assert rows_of(model, path, packing=True, sequence_length=16, num_samples=7) == [
        stream[i : i + 16] for i in range(0, 112, 16)
    ], "packing"
    with_nulls = write(tmp_path / "holes", encoded(kind, holes), name, parquet=parquet)
    left = [row for i, row in enumerate(want) if i not in NULL_ROWS]
    assert rows_of(model, with_nulls) == left, "null"
    assert sorted(rows_of(model, with_nulls, seed=5)) == sorted(left), "null and seed"
    with pytest.raises(DatasetError, match=r"row 3: .* is null or empty"):
        rows_of(model, with_nulls, strict=True)
    with pytest.raises(DatasetError, match=rf"has no column absent; set .* can be read: {name} \("):
        rows_of(model, path, column="absent")


def test_a_name_with_a_dot_is_before_a_field_of_that_path(tmp_path: Path, model: Path) -> None:
    """A column called doc.text is read where a struct doc has a field text too; without it, the field is."""
    struct = pa.array([{"text": "inner", "n": 1}] * 8)
    both = write(tmp_path / "both", pa.array(["right"] * 8), "doc.text", parquet=True)
    pq.write_table(pa.table({"doc": struct, "doc.text": ["right"] * 8}), both)
    only = write(tmp_path / "only", struct, "doc", parquet=True)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for path, text in ((both, "right"), (only, "inner")):
        assert rows_of(model, path, column="doc.text", num_samples=4) == [tokenizer.encode(text).ids] * 4
        assert rows_of(model, path, column="doc.text", num_samples=4, seed=3) == [tokenizer.encode(text).ids] * 4


@pytest.mark.parametrize("parquet", [False, True], ids=["ipc", "parquet"])
def test_a_field_is_null_where_its_struct_is(tmp_path: Path, model: Path, parquet: bool) -> None:
    """A null struct is a null row of each of its fields."""
    rows = [{"a": {"text": "x"}}, None, {"a": None}, {"a": {"text": "y"}}]
    path = write(tmp_path / "c", pa.array(rows), "doc", parquet=parquet)
    assert len(rows_of(model, path, column="doc.a.text", num_samples=2)) == 2
    with pytest.raises(DatasetError, match=r"row 1: doc\.a\.text is null or empty"):
        rows_of(model, path, column="doc.a.text", num_samples=2, strict=True)


def test_auto_says_what_it_took(tmp_path: Path, model: Path) -> None:
    """Token ids count before chats, those before text, text before a pair; the choice is told."""
    columns: dict[str, Any] = {"content": TEXTS, "prompt": TEXTS, "response": TEXTS, "text": TEXTS}
    columns |= {"conversations": CHATS, "messages": CHATS, "input_ids": IDS}
    for left_out, taken in (
        ([], "input_ids is read (lists of integers)"),
        (["input_ids"], "messages is read (chats)"),
        (["messages"], "conversations is read (chats)"),
        (["conversations"], "text is read (text)"),
        (["text"], "prompt+response is read (chats)"),
        (["prompt"], "content is read (text)"),
    ):
        for name in left_out:
            del columns[name]
        pq.write_table(pa.table(columns), tmp_path / "c.parquet")
        config = CalibrationData(data=(str(tmp_path / "c.parquet"),), num_samples=1)
        dataset = open_dataset(config, 128, model / "tokenizer.json")
        assert dataset.notes[:1] == (f"calibration.column is auto: {taken}",)


def test_a_question_and_its_answer_are_one_text_without_a_template(tmp_path: Path, model: Path) -> None:
    """Two columns become a chat where the model has a template, and else one text, a line's end between them."""
    plain = tmp_path / "model"
    save_tokenizer(tmp_path)
    pq.write_table(pa.table({"prompt": ["ab", "ab "], "response": ["cd", "cd"]}), tmp_path / "c.parquet")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert not plain.exists()
    for column in ("auto", "prompt+response"):
        got = rows_of(tmp_path, str(tmp_path / "c.parquet"), num_samples=2, column=column)
        assert got == [tokenizer.encode(text).ids for text in ("ab\ncd", "ab cd")]
        chats = rows_of(model, str(tmp_path / "c.parquet"), num_samples=2, column=column)
        assert chats[0] == tokenizer.encode("user:ab;assistant:cd;").ids


SEEDED = """
import pathlib, sys
from gs_dist.data.dataset import open_dataset
from gs_dist.recipe.sections import CalibrationData

def peak():
    # Not ru_maxrss: a child inherits its parent's.
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024

config = CalibrationData(data=(sys.argv[1],), num_samples=64, sequence_length=1024, seed=1)
list(open_dataset(config.model_copy(update={"seed": None, "num_samples": 8}), 2**31).batches())
before = peak()
list(open_dataset(config, 2**31).batches())
print(peak() - before)
"""


@pytest.mark.seconds
def test_memory_with_a_seed_is_bounded(tmp_path: Path) -> None:
    """A seed reads all over a file, and holds neither its column chunks nor a mapping of it."""
    values = np.random.default_rng(0).integers(0, 2**31, 2048 * 1024, np.int32)
    rows = pa.ListArray.from_arrays(pa.array(np.arange(0, values.size + 1, 1024, np.int32)), pa.array(values))
    table = pa.Table.from_batches([pa.record_batch({"input_ids": rows})] * 10)
    with pq.ParquetWriter(tmp_path / "c.parquet", table.schema, compression="none", use_dictionary=False) as sink:
        sink.write_table(table)
    with pa.ipc.new_file(tmp_path / "c.arrow", table.schema) as sink:
        sink.write_table(table)
    for name in ("c.parquet", "c.arrow"):
        path = tmp_path / name
        ran = subprocess.run([sys.executable, "-c", SEEDED, str(path)], capture_output=True, text=True, check=True)
        assert path.stat().st_size / 2**20 > 80
        assert float(ran.stdout) < 40, f"{name}: {ran.stdout} MiB more"
