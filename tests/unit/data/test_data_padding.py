from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_dist.data.dataset import CalibrationDataset, open_dataset
from gs_dist.data.padding import real_tokens
from gs_dist.errors import DatasetError
from gs_dist.recipe.sections import CalibrationData

ROWS = [[10, 11, 12], [20, 21], [30, 31, 32, 33, 34, 35], [40], [50, 51, 52, 53, 54]] * 4
LENGTH = 8
PAD = 0


def padded(rows: list[list[int]], side: str, filler: int) -> list[list[int]]:
    """Rows filled up to LENGTH on a side."""
    filled = [[filler] * (LENGTH - len(row)) for row in rows]
    return [fill + row if side == "left" else row + fill for row, fill in zip(rows, filled, strict=True)]


def opened(path: Path, columns: dict[str, Any], model: Path | None = None, **settings: Any) -> CalibrationDataset:
    pq.write_table(pa.table(columns), path)
    settings = {"num_samples": 6, "sequence_length": LENGTH, "packing": False} | settings
    tokenizer = None if model is None else model / "tokenizer.json"
    return open_dataset(CalibrationData(data=(str(path),), **settings), 128, tokenizer)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.bool_()), pa.list_(pa.float32())], ids=str)
def test_masked_tokens_are_no_tokens(tmp_path: Path, side: str, packing: bool, seed: int | None, kind: Any) -> None:
    """Padded rows beside an attention_mask give the samples of rows that never were padded, whatever its type."""
    mask = pa.array(padded([[1] * len(row) for row in ROWS], side, 0)).cast(kind)
    settings = {"packing": packing, "seed": seed}
    beside = {"input_ids": padded(ROWS, side, PAD), "attention_mask": mask}
    got = opened(tmp_path / "padded", beside, **settings)
    assert got.fingerprint() == opened(tmp_path / "bare", {"input_ids": ROWS}, **settings).fingerprint()
    assert "tokens whose attention_mask is 0 are left out" in got.notes
    assert any("tokens of padding left out of input_ids" in note for note in got.notes)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("column", ["labels", "loss_mask", "special_tokens_mask", "completion_mask", "assistant_masks"])
def test_other_masks_tell_padding_at_either_end(tmp_path: Path, column: str, side: str) -> None:
    """Without an attention_mask, padding is the masked run at an end; a masked prompt stays."""
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<unk>"}')  # id 0
    marks = {"labels": (-100, 5), "special_tokens_mask": (1, 0)}
    masked, told = marks.get(column, (0, 1))
    values = [[masked] + [told] * (len(row) - 1) for row in ROWS]  # the first token of each row is a prompt's
    beside = {"input_ids": padded(ROWS, side, PAD), column: padded(values, side, masked)}
    got = opened(tmp_path / "padded", beside, tmp_path)
    assert got.fingerprint() == opened(tmp_path / "bare", {"input_ids": ROWS}).fingerprint()
    assert any(note.startswith(f"{column} beside input_ids: padding at either end is left out") for note in got.notes)


def test_a_mask_counts_before_what_else_is_there(tmp_path: Path) -> None:
    """With an attention_mask, labels of -100 change nothing."""
    mask = padded([[1] * len(row) for row in ROWS], "right", 0)
    labels = [[-100] * LENGTH for _ in ROWS]
    columns = {"input_ids": padded(ROWS, "right", PAD), "attention_mask": mask}
    want = opened(tmp_path / "one", columns).fingerprint()
    assert opened(tmp_path / "two", {**columns, "labels": labels}).fingerprint() == want


def test_masks_within_a_struct_are_those_beside_its_ids(tmp_path: Path) -> None:
    """A mask qualifies the ids of its own struct, and no others."""
    rows = [{"input_ids": ids, "attention_mask": [1] * 2 + [0] * 6} for ids in padded(ROWS, "right", PAD)]
    other = [[0] * LENGTH for _ in ROWS]
    dataset = opened(tmp_path / "c", {"doc": rows, "attention_mask": other}, column="doc.input_ids")
    assert next(iter(dataset.batches())).mask.sum(1)[:6].tolist() == [2] * 6


def test_a_mask_of_another_length_is_named(tmp_path: Path) -> None:
    """Masks that do not fit their row, or are null, are refused with file and row."""
    ids = [[1, 2, 3]] * 6
    for value, says in (
        ([1, 1], "row 4: attention_mask has 2 entries and input_ids 3"),
        (None, "row 4: attention_mask is null"),
        ([1, None, 1], "row 4: attention_mask holds a null"),
    ):
        mask = [[1, 1, 1]] * 4 + [value] + [[1, 1, 1]]
        with pytest.raises(DatasetError, match=says):
            opened(tmp_path / "c", {"input_ids": ids, "attention_mask": mask}).fingerprint()


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.list_(pa.int8())), pa.int64(), pa.run_end_encoded(pa.int32(), pa.list_(pa.int8()))], ids=str
)
def test_an_attention_mask_that_cannot_be_read_is_no_mask_that_is_passed_over(tmp_path: Path, kind: Any) -> None:
    """A mask of two dimensions would be left out without a word, and padding counted; a class a row is no label."""
    ids = pa.array([[1, 2, 3]] * 6)
    mask = pa.nulls(6, kind)
    if pa.types.is_run_end_encoded(kind):
        mask = pa.RunEndEncodedArray.from_arrays(pa.array([6], pa.int32()), pa.array([[1, 1, 0]], kind.value_type))
    table = pa.table({"input_ids": ids, "attention_mask": mask})
    with pa.ipc.new_file(tmp_path / "c.arrow", table.schema) as sink:
        sink.write_table(table)
    data = CalibrationData(data=(str(tmp_path / "c.arrow"),), num_samples=2, sequence_length=LENGTH)
    with pytest.raises(DatasetError, match=r"attention_mask beside input_ids is .*: give lists of 0 and 1"):
        open_dataset(data, 128).fingerprint()
    pq.write_table(pa.table({"input_ids": ids, "labels": [3] * 6}), tmp_path / "d.parquet")
    open_dataset(data.model_copy(update={"data": (str(tmp_path / "d.parquet"),)}), 128).fingerprint()


def test_a_row_that_is_all_padding_is_named(tmp_path: Path) -> None:
    """A sample needs a token that counts."""
    mask = [[1, 1]] * 5 + [[0, 0]]
    with pytest.raises(DatasetError, match="row 5: no token in input_ids"):
        opened(tmp_path / "c", {"input_ids": [[1, 2]] * 6, "attention_mask": mask}).fingerprint()


def test_rows_that_look_padded_are_told(tmp_path: Path) -> None:
    """Long runs of one token at the end of many rows, with no column that tells what they are, are worth a warning."""
    rows = [row + [PAD] * 10 for row in ROWS]
    padded_rows = opened(tmp_path / "c", {"input_ids": rows}, sequence_length=16)
    padded_rows.fingerprint()
    assert any("begin or end with eight equal tokens" in note for note in padded_rows.notes)
    bare = opened(tmp_path / "d", {"input_ids": ROWS})
    bare.fingerprint()
    assert bare.notes == ("calibration.column is auto: input_ids is read (lists of integers)",)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    sides=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=8, max_size=8),
)
def test_padding_token_under_a_mask_is_found_exactly(rows: list[list[int]], sides: list[tuple[int, int]]) -> None:
    """The model's padding token at both ends of a row under a mask of it is what is left out."""
    filled = [[PAD] * a + row + [PAD] * b for row, (a, b) in zip(rows, sides, strict=False)]
    ids = np.asarray([token for row in filled for token in row])
    real = real_tokens(
        np.asarray([len(row) for row in filled]), ids, {"loss_mask": (ids != PAD).astype(np.int64)}, pad_token_id=PAD
    )
    assert real is not None
    assert ids[real].tolist() == [token for row in rows for token in row]
