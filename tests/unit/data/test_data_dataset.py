from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from gs_dist.data import order as order_module
from gs_dist.data import packing as packing_module
from gs_dist.data.content import Texts
from gs_dist.data.dataset import CalibrationDataset, TokenBatch, open_dataset
from gs_dist.errors import DatasetError
from gs_dist.recipe.sections import CalibrationData

VOCAB = 100
Write = Callable[[pa.Table, Path], None]


def write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, row_group_size=3)


def write_file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(path, table.schema) as sink:
        sink.write_table(table, max_chunksize=4)


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path, table.schema) as sink:
        sink.write_table(table, max_chunksize=4)


WRITERS = {"parquet": write_parquet, "file": write_file, "stream": write_stream}


def write_rows(
    path: Path, rows: list[Any], kind: Any = None, write: Write = write_parquet, name: str = "input_ids"
) -> str:
    write(pa.table({"other": pa.array([0] * len(rows), pa.int8()), name: pa.array(rows, kind)}), path)
    return str(path)


def some_rows(count: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def opened(*data: str, tokenizer: Path | None = None, eos: int | None = None, **settings: Any) -> CalibrationDataset:
    settings = {"num_samples": 4, "sequence_length": 5, "micro_batch_size": 2} | settings
    return open_dataset(CalibrationData(data=data, **settings), VOCAB, tokenizer, eos_token_id=eos)


def samples_of(dataset: CalibrationDataset) -> list[list[int]]:
    """Tokens of every sample, by the masks."""
    return [
        ids[mask].tolist()
        for batch in dataset.batches()
        for ids, mask in list(zip(batch.input_ids, batch.mask, strict=True))[: batch.num_samples]
    ]


def same(left: TokenBatch, right: TokenBatch) -> bool:
    return (
        (left.index, left.num_samples) == (right.index, right.num_samples)
        and np.array_equal(left.input_ids, right.input_ids)
        and np.array_equal(left.mask, right.mask)
    )


def cut(rows: list[list[int]], length: int) -> list[list[int]]:
    """Packing, spelt out token by token."""
    stream = [token for row in rows for token in row]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """Words a b c ... are ids 1 2 3 ...; every text begins with id 90, as Llama 3's tokenizer does it."""
    vocab = {"?": 0, "<s>": 90} | {chr(ord("a") + i): i + 1 for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 90)])
    tokenizer.enable_truncation(3)  # a setting for inference that calibration must not obey
    tokenizer.enable_padding(length=9)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", ["arrow", "parquet", "data"])
def test_format_is_told_by_content(tmp_path: Path, writer: str, suffix: str) -> None:
    """Parquet, IPC files and IPC streams give the same samples, whatever their suffix says."""
    rows = some_rows(20)
    path = write_rows(tmp_path / f"calib.{suffix}", rows, write=WRITERS[writer])
    assert samples_of(opened(path)) == cut(rows, 5)[:4]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int64()), pa.large_list(pa.int8()), pa.list_(pa.uint16(), 3), pa.list_(pa.uint64())],
    ids=str,
)
def test_every_list_of_integers_is_read(tmp_path: Path, kind: pa.DataType, writer: str) -> None:
    """Lists, large lists and lists of fixed size, of any integer type, are token ids."""
    rows = [[i, 2 * i, 3 * i] for i in range(12)]
    path = write_rows(tmp_path / "calib", rows, kind, WRITERS[writer])
    assert samples_of(opened(path)) == cut(rows, 5)[:4]
    assert samples_of(opened(path, packing=False)) == rows[:4]


def test_rows_are_cut_or_masked_without_packing(tmp_path: Path) -> None:
    """Without packing a sample is a row, cut to sequence_length or filled on the right with mask False."""
    path = write_rows(tmp_path / "calib", [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13]])
    first, second = opened(path, packing=False, num_samples=3).batches()
    assert first.input_ids.dtype == np.int32
    assert first.input_ids.tolist() == [[1, 2, 3, 4, 5], [7, 8, 0, 0, 0]]
    assert first.mask.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert second.input_ids.tolist() == [[9, 10, 11, 12, 13], [0] * 5]
    assert second.mask.tolist() == [[True] * 5, [False] * 5]
    assert (first.num_samples, second.num_samples) == (2, 1)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    length=st.integers(1, 7),
    bounds=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_packing_cuts_the_joined_rows(sizes: list[int], length: int, bounds: tuple[int, int]) -> None:
    """Pieces i to j of the joined rows are those of cutting them token by token, for any rows, i and j."""
    tokens = iter(range(sum(sizes)))
    rows = [[next(tokens) for _ in range(size)] for size in sizes]
    first, last = min(bounds), max(bounds) + 1
    got = packing_module.pack((np.array(row, np.int32) for row in rows), length, first, last)
    assert [piece.tolist() for piece in got] == cut(rows, length)[first:last]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ragged")
    for i, write in enumerate(WRITERS.values()):
        write_rows(folder / f"part-{i}.arrow", some_rows(17, seed=i), write=write)
    return str(folder)


@pytest.mark.seconds
@settings(deadline=None, max_examples=60)
@given(
    packing=st.booleans(),
    seed=st.sampled_from([None, 0, 7]),
    size=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 19), max_size=4),
)
def test_any_split_gives_the_same_batches(
    ragged: str, packing: bool, seed: int | None, size: int, cuts: list[int]
) -> None:
    """batches(0, n) is the concatenation of batches over any split of 0..n."""
    dataset = opened(ragged, packing=packing, seed=seed, num_samples=19, micro_batch_size=size)
    total = dataset.num_micro_batches
    edges = sorted({0, total, *(c for c in cuts if c <= total)})
    parts = [b for start, stop in pairwise(edges) for b in dataset.batches(start, stop)]
    whole = list(dataset.batches(0, total))
    assert len(parts) == len(whole) == total
    assert all(same(left, right) for left, right in zip(parts, whole, strict=True))
    assert sum(batch.num_samples for batch in whole) == 19


def test_files_are_joined_in_order(ragged: str) -> None:
    """Samples run over the end of a file into the next one by name."""
    rows = [row for i in range(3) for row in some_rows(17, seed=i)]
    assert samples_of(opened(ragged, num_samples=60)) == cut(rows, 5)[:60]
    assert samples_of(opened(ragged, packing=False, num_samples=50)) == [row[:5] for row in rows[:50]]


def test_seed_chooses_across_the_whole_dataset(tmp_path: Path) -> None:
    """A seed takes distinct rows from all over the data, each seed its own, the same ones every time."""
    path = write_rows(tmp_path / "calib", [[i // 90, i % 90] for i in range(3000)])
    choose = {seed: samples_of(opened(path, packing=False, seed=seed, num_samples=300)) for seed in (1, 2)}
    numbers = [90 * high + low for high, low in choose[1]]
    assert len(set(numbers)) == 300
    assert np.histogram(numbers, bins=6, range=(0, 3000))[0].min() >= 30  # expected 50 a bin, deviation about 6.5
    assert abs(np.corrcoef(np.arange(300), numbers)[0, 1]) < 0.2  # taken in no order of the file
    assert choose[1] != choose[2]
    assert choose[1] == samples_of(opened(path, packing=False, seed=1, num_samples=300))
    assert choose[1][:40] == samples_of(opened(path, packing=False, seed=1, num_samples=40))


@pytest.mark.parametrize("writer", WRITERS)
def test_seeded_choice_does_not_depend_on_the_format(tmp_path: Path, writer: str) -> None:
    """Rows are chosen by their number, so splitting the data over files or formats changes nothing."""
    rows = some_rows(40)
    whole = write_rows(tmp_path / "whole", rows)
    parts = [write_rows(tmp_path / f"{i}", rows[i * 10 : i * 10 + 10], write=WRITERS[writer]) for i in range(4)]
    for packing in (True, False):
        settings = {"seed": 5, "packing": packing, "num_samples": 30}
        assert samples_of(opened(whole, **settings)) == samples_of(opened(*parts, **settings))


def test_seeded_packing_joins_rows_in_the_seeds_order(tmp_path: Path) -> None:
    """With a seed, packing joins the rows that per-row sampling gives, in the same order."""
    rows = some_rows(200, longest=5)
    path = write_rows(tmp_path / "calib", rows)
    by_row = samples_of(opened(path, packing=False, seed=3, num_samples=200))
    assert sorted(by_row) == sorted(rows)
    assert samples_of(opened(path, seed=3, num_samples=100)) == cut(by_row, 5)[:100]


def test_seeded_order_is_the_smallest_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is that of splitmix64 over row numbers, however much of it is asked for at a time."""
    monkeypatch.setattr(order_module, "_KEYS_AT_ONCE", 7)
    monkeypatch.setattr(order_module, "_ROWS_AT_ONCE", 4)
    order = order_module.SeededOrder(50, seed=11)
    start, mask = int(order._seed), 2**64 - 1

    def key(number: int) -> int:
        z = ((number + 1) * 0x9E3779B97F4A7C15 + start) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    want = sorted(range(50), key=key)
    assert [int(n) for i in range(0, 50, 5) for n in order.rows(i, i + 5)] == want


def test_text_is_tokenized_and_ended(tmp_path: Path, tokenizer_file: Path) -> None:
    """Packed texts are joined as the tokenizer gives them, its own special tokens included, an end after each."""
    path = write_rows(tmp_path / "calib", ["a b c d e f", "", "g", "h i j k l m n o"], name="text")
    stream = [90, 1, 2, 3, 4, 5, 6, 99, 90, 99, 90, 7, 99, 90, 8, 9, 10, 11, 12, 13, 14, 15, 99]
    assert samples_of(opened(path, tokenizer=tokenizer_file, eos=99)) == cut([stream], 5)[:4]
    rows = samples_of(opened(path, tokenizer=tokenizer_file, eos=99, packing=False))
    assert rows == [[90, 1, 2, 3, 4], [90], [90, 7], [90, 8, 9, 10, 11]]
    ended = opened(path, tokenizer=tokenizer_file, eos=90, num_samples=1, sequence_length=11)
    assert samples_of(ended) == [[90, 1, 2, 3, 4, 5, 6, 90, 90, 90, 7]]  # the empty text has its end already


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_every_kind_of_text_is_read(tmp_path: Path, tokenizer_file: Path, kind: pa.DataType) -> None:
    """Large strings, string views and dictionary-encoded strings are text."""
    path = write_rows(tmp_path / "calib", ["a b", "c d", "a b", "e"], kind, write_file, "text")
    rows = samples_of(opened(path, tokenizer=tokenizer_file, packing=False))
    assert rows == [[90, 1, 2], [90, 3, 4], [90, 1, 2], [90, 5]]


def test_replica_tokenizes_only_its_rows(tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that reads micro-batches 10 to 12 of unpacked texts tokenises those rows alone."""
    path = write_rows(tmp_path / "calib", [f"a {chr(98 + i % 25)}" for i in range(400)], name="text")
    seen: list[int] = []
    texts = Texts.texts
    monkeypatch.setattr(Texts, "texts", lambda self, rows: seen.append(len(rows)) or texts(self, rows))
    for seed in (None, 4):
        seen.clear()
        dataset = opened(path, tokenizer=tokenizer_file, packing=False, num_samples=400, seed=seed)
        list(dataset.batches(10, 12))
        assert sum(seen) == 4


def test_column_is_input_ids_before_text(tmp_path: Path, tokenizer_file: Path) -> None:
    """`auto` takes input_ids where both are there; naming the column takes that one."""
    path = tmp_path / "calib"
    write_parquet(pa.table({"text": ["a b c"] * 9, "input_ids": [[1, 2, 3, 4, 5]] * 9}), path)
    assert opened(str(path)).column == "input_ids"
    assert opened(str(path), column="text", tokenizer=tokenizer_file).column == "text"


def test_saved_dataset_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    """A save_to_disk directory gives the stream files that state.json lists, in that order, and no others."""
    rows = some_rows(30)
    folder = tmp_path / "saved"
    folder.mkdir()
    write_rows(folder / "data-b.arrow", rows[:15], write=write_stream)
    write_rows(folder / "data-a.arrow", rows[15:], write=write_stream)
    write_rows(folder / "cache-1.arrow", some_rows(30, seed=9), write=write_stream)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-b.arrow"}, {"filename": "data-a.arrow"}]})
    )
    (folder / "dataset_info.json").write_text("{}")
    assert samples_of(opened(str(folder), packing=False, num_samples=30)) == [row[:5] for row in rows]
    (folder / "data-a.arrow").unlink()
    with pytest.raises(DatasetError, match=r"state\.json lists data-a\.arrow, which is not in the directory"):
        opened(str(folder))


def test_dataset_of_several_splits_is_refused_by_name(tmp_path: Path) -> None:
    """A saved DatasetDict names its splits instead of mixing them."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text('{"_data_files": []}')
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DatasetError, match=r"several splits; name one of them in .*: test, train"):
        opened(str(tmp_path))


def test_data_may_be_named_in_many_ways(tmp_path: Path) -> None:
    """A directory, glob patterns, a list, and file URIs with and without a pattern are the same data."""
    rows = some_rows(30)
    for i in range(3):
        (tmp_path / f"day{i}").mkdir()
        write_rows(tmp_path / f"day{i}" / "part.parquet", rows[i * 10 : i * 10 + 10])
    (tmp_path / "day0" / "README.md").write_text("about")
    (tmp_path / "_logs").mkdir()
    (tmp_path / "_logs" / "old.parquet").write_text("not data")
    want = opened(str(tmp_path)).fingerprint()
    for entries in (
        [f"{tmp_path}/day*/part.parquet"],
        [f"{tmp_path}/day?"],
        [f"{tmp_path}/**/part.parquet"],
        [f"{tmp_path}/day{i}/part.parquet" for i in range(3)],
        [f"file://{tmp_path}"],
        [f"file://{tmp_path}/day*/*.parquet"],
    ):
        dataset = opened(*entries, num_samples=4)
        assert dataset.fingerprint() == want, entries
    odd = write_rows(tmp_path / "a[1].parquet", rows)
    assert samples_of(opened(odd)) == cut(rows, 5)[:4]


def test_fingerprint_follows_samples_and_nothing_else(tmp_path: Path) -> None:
    """The fingerprint ignores format and micro-batch size and sees every token, every length and the seed."""
    rows = some_rows(30)
    one = write_rows(tmp_path / "one", rows)
    two = write_rows(tmp_path / "two", rows, pa.large_list(pa.int16()), write_stream)
    want = opened(one).fingerprint()
    assert len(want) == 64
    assert opened(two, micro_batch_size=3).fingerprint() == want
    changed = [row.copy() for row in rows]
    changed[1][0] = (changed[1][0] + 1) % VOCAB
    others = [
        opened(write_rows(tmp_path / "three", changed)),
        opened(one, num_samples=5),
        opened(one, packing=False),
        opened(one, seed=1),
    ]
    assert len({want, *(other.fingerprint() for other in others)}) == 5
    split = [write_rows(tmp_path / f"{i}", rows) for i, rows in enumerate([[[1, 2], [3]], [[1], [2, 3]]])]
    assert len({opened(path, packing=False, num_samples=2).fingerprint() for path in split}) == 2


def test_fewer_samples_are_counted_where_the_caller_allows_it(tmp_path: Path) -> None:
    """With fewer_samples, num_samples is a limit: what is there is served, no more and no less."""
    rows = some_rows(10)
    config = CalibrationData(data=(write_rows(tmp_path / "c", rows),), num_samples=999, sequence_length=5)
    dataset = open_dataset(config, VOCAB, fewer_samples=True)
    assert samples_of(dataset) == cut(rows, 5)
    limited = open_dataset(config.model_copy(update={"num_samples": 2}), VOCAB, fewer_samples=True)
    assert limited.num_samples == 2


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Reading the end of a file 100 times a record batch allocates a few batches, not the file."""
    row = list(range(64)) * 4
    schema = pa.schema({"input_ids": pa.list_(pa.int64())})
    batch = pa.record_batch([pa.array([row] * 64, pa.list_(pa.int64()))], schema=schema)
    for writer in (pa.ipc.new_file, pa.ipc.new_stream):
        with writer(tmp_path / "calib", schema) as sink:
            for _ in range(100):
                sink.write_batch(batch)
        dataset = opened(str(tmp_path / "calib"), num_samples=6400, sequence_length=256)
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        peak = 0
        for _ in dataset.batches(3150, 3200):
            peak = max(peak, pa.total_allocated_bytes() - before)
        python_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak + python_peak < 8 * batch.nbytes < 100 * batch.nbytes


def refusal(*data: str, **settings: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        opened(*data, **settings).fingerprint()
    return str(caught.value)


def test_missing_and_empty_places_are_named(tmp_path: Path) -> None:
    """No match, an empty directory and an empty file each say what was looked for."""
    assert f"nothing at {tmp_path}/no*.parquet" in refusal(f"{tmp_path}/no*.parquet")
    assert f"nothing at {tmp_path}/absent" in refusal(f"{tmp_path}/absent")
    assert f"nothing at {tmp_path}" in refusal(str(tmp_path))
    (tmp_path / "hollow.parquet").touch()
    assert "hollow.parquet is empty (0 bytes)" in refusal(str(tmp_path))


def test_same_file_twice_is_refused(tmp_path: Path) -> None:
    """Overlapping entries would repeat samples, so they are refused."""
    path = write_rows(tmp_path / "calib.parquet", some_rows(9))
    assert "named twice" in refusal(path, f"{tmp_path}/*.parquet")


@pytest.mark.parametrize("writer", WRITERS)
def test_zero_rows_are_refused(tmp_path: Path, writer: str) -> None:
    """A file without rows is told apart from a file with too few."""
    path = write_rows(tmp_path / "calib", [], pa.list_(pa.int32()), WRITERS[writer])
    assert "no samples of 5 tokens in column input_ids" in refusal(path)
    assert "no rows in column input_ids" in refusal(path, packing=False)
    assert "no rows in column input_ids" in refusal(path, packing=False, seed=1)


@pytest.mark.parametrize("seed", [None, 3])
def test_too_few_samples_tell_how_many_there_are(tmp_path: Path, seed: int | None) -> None:
    """The message holds the number that num_samples can be set to, and that number then works."""
    path = write_rows(tmp_path / "calib", [[1, 2, 3]] * 7)
    assert "4 samples of 5 tokens" in (text := refusal(path, num_samples=9, seed=seed))
    assert "set calibration.num_samples to 4" in text
    assert "set calibration.num_samples to 7" in refusal(path, packing=False, num_samples=9, seed=seed)
    assert len(samples_of(opened(path, num_samples=4, seed=seed))) == 4
    with pytest.raises(DatasetError, match=r"set calibration\.num_samples to 4"):
        list(opened(path, num_samples=9, seed=seed).batches(3, 5))


def test_missing_column_lists_the_columns(tmp_path: Path) -> None:
    """A missing column, and one that samples cannot be made of, offer those that they can be made of, and no other."""
    path = write_rows(tmp_path / "calib", some_rows(9), name="tokens")
    for text in (refusal(path), refusal(path, column="input_ids")):
        assert text.endswith("set calibration.column to one that can be read: tokens (lists of integers)")
    assert "has no column input_ids" in text
    assert "column other is int8, neither text nor lists of integers nor chats" in refusal(path, column="other")
    floats = write_rows(tmp_path / "floats", [[0.5]] * 9)
    assert "it has no column of text, token ids or chats, but other (int8), input_ids (list<" in refusal(floats)


def test_later_file_with_another_column_is_named(tmp_path: Path) -> None:
    """Every file must have the column, not only the first."""
    first = write_rows(tmp_path / "1", some_rows(2))
    second = write_rows(tmp_path / "2", some_rows(20), name="tokens")
    assert f"{second} has no column input_ids" in refusal(first, second, num_samples=12)


def test_later_file_with_another_kind_of_column_is_named(tmp_path: Path, tokenizer_file: Path) -> None:
    """A column that is ids in one file and text in the next is refused, with the second file's name."""
    first = write_rows(tmp_path / "1", some_rows(2), name="text")
    second = write_rows(tmp_path / "2", ["a b c"] * 20, name="text")
    for data in ((first, second), (second, first)):
        text = refusal(*data, num_samples=20, tokenizer=tokenizer_file)
        assert data[1] in text
        assert "unlike in other files" in text


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "row 5: input_ids is null or empty; remove the row, or set calibration.strict: false"),
        ([None, 4], "row 5: input_ids holds a null"),
        ([-7, 3], "row 5: token id -7 is outside the model's vocabulary of 100"),
        ([100, 3], "row 5: token id 100 is outside the model's vocabulary of 100"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, bad: Any, message: str, seed: int | None, writer: str) -> None:
    """Nulls where the recipe is strict, and ids outside the vocabulary, are refused with file and row."""
    rows: list[Any] = [[1, 2], [], [3], [4, 5, 6], [7], bad, [8], [9] * 20]
    text = refusal(write_rows(tmp_path / "calib", rows, pa.list_(pa.int64()), WRITERS[writer]), seed=seed, strict=True)
    assert f"{tmp_path}/calib, {message}" in text


def test_row_of_no_token_is_named_without_packing(tmp_path: Path) -> None:
    """A sample needs a token; packing has no such need."""
    path = write_rows(tmp_path / "calib", [[1, 2], [], [3, 4]], pa.list_(pa.int64()))
    assert "row 1: no token in input_ids; remove the row or set calibration.packing: true" in refusal(
        path, packing=False, num_samples=3
    )
    assert samples_of(opened(path, num_samples=1, sequence_length=4)) == [[1, 2, 3, 4]]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize("packing", [True, False])
def test_null_rows_are_passed_over_and_counted(tmp_path: Path, packing: bool, seed: int | None, writer: str) -> None:
    """Data with null rows give the samples of data without them, from any micro-batch on, and count them."""
    rows = some_rows(30)
    holes: list[Any] = [row for i, row in enumerate(rows) for row in ([None] * (i % 4 == 1) + [row])]
    kind = pa.list_(pa.int64())
    settings = {"packing": packing, "num_samples": 24, "sequence_length": 4, "seed": None}
    whole = opened(write_rows(tmp_path / "whole", rows, kind), **settings)
    dataset = opened(write_rows(tmp_path / "holes", holes, kind, WRITERS[writer]), **{**settings, "seed": seed})
    if seed is None:
        assert samples_of(dataset) == samples_of(whole)
    assert len(samples_of(dataset)) == 24
    singly = [batch.input_ids.tolist() for i in range(12) for batch in dataset.batches(i, i + 1)]
    assert singly == [batch.input_ids.tolist() for batch in dataset.batches()]
    dataset.fingerprint()
    found = [note for note in dataset.notes if "null or empty passed over (calibration.strict: true" in note]
    assert len(found) == 1
    assert int(found[0].split()[0]) >= 4


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    """Text without tokenizer.json, and with a damaged one, is refused before any row is read."""
    path = write_rows(tmp_path / "calib", ["a"], name="text")
    assert "the model has no tokenizer.json" in refusal(path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "cannot be read as a tokenizer.json" in refusal(path, tokenizer=tmp_path / "tokenizer.json")


def test_file_of_another_kind_is_named(tmp_path: Path) -> None:
    """Something that is no Arrow data is shown by how it begins."""
    (tmp_path / "calib.parquet").write_text('{"text": "hello"}')
    assert "neither Parquet nor an Arrow file or stream, as its name says: it begins with b'{\"te" in refusal(
        str(tmp_path)
    )


@pytest.mark.parametrize("writer", WRITERS)
def test_truncated_files_are_named(tmp_path: Path, writer: str) -> None:
    """A file that ends early is an error that names it, at whatever byte it ends, or all samples are there."""
    path = Path(write_rows(tmp_path / "calib", some_rows(40), write=WRITERS[writer]))
    whole, want = path.read_bytes(), samples_of(opened(str(path), num_samples=40))
    refused = 0
    for end in range(5, len(whole), 61):
        path.write_bytes(whole[:end])
        with suppress(DatasetError):
            assert samples_of(opened(str(path), num_samples=40)) == want
            continue
        refused += 1
        with pytest.raises(DatasetError, match="calib"):
            samples_of(opened(str(path), num_samples=40))
    assert refused > 3


@pytest.mark.parametrize("writer", ["file", "stream"])
def test_damaged_offsets_lead_nowhere(tmp_path: Path, writer: str) -> None:
    """List offsets that point outside the values are refused, not followed."""
    path = Path(write_rows(tmp_path / "calib", [[1, 2, 3]] * 4, pa.list_(pa.int32()), WRITERS[writer]))
    good = np.array([0, 3, 6, 9, 12], "<i4").tobytes()
    whole = path.read_bytes()
    assert whole.count(good) == 1
    path.write_bytes(whole.replace(good, np.array([0, 3, 2**30, 9, 12], "<i4").tobytes()))
    assert "calib cannot be read" in refusal(str(path), sequence_length=2)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAUSER:sesame+/open@bucket/calib.parquet?region=x",
        "s4://AKIAUSER:sesame@bucket/calib.parquet",
        "s3://bucket/calib.parquet?bogus_option=sesame",
        "s3://bucket/*.parquet?bogus_option=sesame",
    ],
)
def test_secrets_of_a_uri_are_never_shown(uri: str) -> None:
    """Neither the message nor the chain of causes holds user, password or query of a URI."""
    with pytest.raises(DatasetError) as caught:
        opened(uri)
    assert "bucket/" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    for secret in ("AKIAUSER", "sesame"):
        assert secret not in str(caught.value)


def test_micro_batches_outside_the_data_are_refused(tmp_path: Path) -> None:
    """A range outside the job's micro-batches is a mistake of the caller."""
    dataset = opened(write_rows(tmp_path / "calib", some_rows(30)))
    with pytest.raises(ValueError, match="micro-batches 1 to 3 asked for; there are 2"):
        dataset.batches(1, 3)
