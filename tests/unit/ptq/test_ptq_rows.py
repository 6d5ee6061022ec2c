from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import mindspore.dataset
import numpy as np
import pyarrow as pa
import pytest
from mindspore import nn
from ptq_networks import CHANNELS, Mlp, batches, random_dense
from pyarrow import parquet

from gs_dist.data.dataset import open_dataset
from gs_dist.ptq import PTQ, PTQConfig
from gs_dist.ptq.calibration_rows import read_rows, row_mask
from gs_dist.recipe.sections import CalibrationData

STATIC = PTQConfig(act_quant_dtype=ms.int8, act_symmetric=True)


class Gated(nn.Cell):
    """A network with two arguments, one of which has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = random_dense(np.random.default_rng(0), CHANNELS, 4)

    def construct(self, x, gate, bias=None):
        return self.linear(x * gate)


def input_scale(network: nn.Cell, datasets: Any) -> float:
    """The scale that calibration finds for the first linear's input."""
    fake = PTQ(STATIC).apply(network, datasets=datasets)
    cell = fake.linear if hasattr(fake, "linear") else fake.body[0]
    return float(cell.input_scale.asnumpy()[0])


def largest(rows: list[np.ndarray]) -> float:
    return max(float(np.abs(row).max()) for row in rows) / 127.5


def test_mindspore_dataset_and_list_give_the_same():
    """A mindspore.dataset is read through its dict iterator, row by row."""
    rows = batches(3)
    dataset = mindspore.dataset.GeneratorDataset([(row,) for row in rows], ["x"], shuffle=False)
    assert len(read_rows(dataset)) == 3
    assert input_scale(Mlp(), dataset) == input_scale(Mlp(), rows) == pytest.approx(largest(rows))


@pytest.mark.parametrize("make", [iter, tuple, lambda rows: [ms.Tensor(row) for row in rows]])
def test_any_iterable_of_arrays_will_do(make: Any):
    """A generator, a tuple and a list of Tensors are calibration data too."""
    rows = batches(2)
    assert input_scale(Mlp(), make(rows)) == pytest.approx(largest(rows))


def test_tuples_and_dicts_are_the_networks_arguments():
    """Values of a row go to the network by position, or by name where the names are its parameters."""
    x, gate = batches(1)[0], np.full((2, 8, 1), 3.0, np.float32)
    wanted = pytest.approx(largest([x * 3]), rel=1e-6)
    assert input_scale(Gated(), [(x, gate)]) == wanted
    assert input_scale(Gated(), [{"gate": gate, "x": x}]) == wanted
    assert input_scale(Gated(), [{"first": x, "second": gate}]) == wanted


def test_columns_that_do_not_fit_are_named():
    """Columns that are neither parameters nor as many as those are an error that lists both."""
    x, gate = batches(1)[0], np.ones((2, 8, 1), np.float32)
    assert input_scale(Gated(), [{"a": x, "b": gate, "c": gate}]) > 0  # the argument with a default may be given
    with pytest.raises(ValueError, match=r"first.*construct\(x, gate, bias\)"):
        input_scale(Gated(), [{"first": batches(1)[0]}])


def test_padding_is_left_out_of_statistics():
    """Tokens that attention_mask marks as padding do not count, whether or not the network takes the mask."""
    x = batches(1)[0]
    mask = np.ones((2, 8), np.int32)
    mask[:, 5:] = 0
    x[:, 5:] *= 1000
    assert input_scale(Mlp(), [{"x": x, "attention_mask": mask}]) == pytest.approx(largest([x[:, :5]]))
    assert row_mask({"x": x, "attention_mask": ms.Tensor(mask)}).sum() == 10
    assert row_mask({"x": x}) is None


def test_arrow_table_gives_a_sample_a_row():
    """Each row of an Arrow table is a batch of one."""
    table = pa.table({"input_ids": [[1, 2, 3], [4, 5]]})
    rows = read_rows(table)
    assert [row["input_ids"].tolist() for row in rows] == [[[1, 2, 3]], [[4, 5]]]
    assert len(read_rows(table.to_batches()[0])) == 2


def test_arrow_files_come_through_the_jobs_dataset(tmp_path: Path):
    """What open_dataset makes of a Parquet file is calibration data; filler rows of the last batch do not count."""
    parquet.write_table(pa.table({"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]}), tmp_path / "ids.parquet")
    config = CalibrationData(data=str(tmp_path / "ids.parquet"), num_samples=3, sequence_length=4, micro_batch_size=2)
    rows = read_rows(open_dataset(config, vocab_size=16))
    assert [row["input_ids"].shape for row in rows] == [(2, 4), (2, 4)]
    assert [int(row_mask(row).sum()) for row in rows] == [8, 4]


def test_lists_of_numbers_in_a_dict_are_one_sample():
    """Rows of a Hugging Face dataset are dicts of lists; each is a batch of one."""
    rows = read_rows([{"input_ids": [1, 2, 3]}])
    np.testing.assert_array_equal(rows[0]["input_ids"], [[1, 2, 3]])
    with pytest.raises(TypeError, match="row 0"):
        read_rows([{"text": ["a"]}])


def test_passes_follow_the_statistics_they_can_hold(monkeypatch: pytest.MonkeyPatch):
    """With room for one linear's statistics at a time the network is run once a linear, with the same result."""
    calls = []

    class Counted(Mlp):
        def construct(self, x):
            calls.append(1)
            return super().construct(x)

    rows = batches(2)
    config = PTQConfig(weight_quant_dtype=ms.qint4x2, weight_clip=True)
    at_once = PTQ(config).apply(Counted(), datasets=rows)
    assert len(calls) == 2
    monkeypatch.setattr("gs_dist.ptq.solving.STATISTICS_BYTES", 1)
    one_by_one = PTQ(config).apply(Counted(), datasets=rows)
    assert len(calls) == 2 + 4
    for a, b in zip(at_once.get_parameters(), one_by_one.get_parameters(), strict=True):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy())
