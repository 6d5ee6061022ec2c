"""Calibration data for any network: what `apply` accepts as `datasets`, row by row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt

from gs_dist.data.dataset import CalibrationDataset
from gs_dist.errors import DatasetError
from gs_dist.ptq.network_helper import NetworkHelper

__all__ = ["Row", "read_rows", "row_mask", "row_runner"]

Row = Mapping[str, Any] | tuple[Any, ...]
"""One call of the network: values by column name, or positional values."""


def read_rows(datasets: Any) -> list[Row]:
    """All rows of the calibration data, in order; they stay in host memory.

    Args:
        datasets: a `mindspore.dataset`; what `data.dataset.open_dataset` makes of Arrow files; an
            Arrow table or record batch, each row one sample; or an iterable whose entries are arrays (the
            network's only argument), tuples or lists of arrays (positional arguments), or dicts (arguments by
            name) of arrays or of lists of numbers, a list being one sample.

    Raises:
        ValueError: None, or no rows.
        TypeError: something else, or an entry of another kind.
    """
    if datasets is None:
        raise ValueError("datasets is None: give calibration data, such as a mindspore.dataset or a list of arrays")
    if hasattr(datasets, "create_dict_iterator"):
        entries: Iterable[Any] = datasets.create_dict_iterator(num_epochs=1, output_numpy=True)
    elif isinstance(datasets, CalibrationDataset):
        entries = ({"input_ids": batch.input_ids, "attention_mask": batch.mask} for batch in datasets.batches())
    elif hasattr(datasets, "to_pylist"):
        entries = datasets.to_pylist()
    elif isinstance(datasets, str | bytes | Mapping | np.ndarray | ms.Tensor) or not isinstance(datasets, Iterable):
        raise TypeError(
            f"datasets must be a mindspore.dataset, an Arrow table or an iterable of rows, but got "
            f"{type(datasets).__name__}; a single batch goes into a list"
        )
    else:
        entries = datasets
    rows = [_row(entry, index) for index, entry in enumerate(entries)]
    if not rows:
        raise ValueError("datasets is empty: no calibration sample to observe")
    return rows


def _row(entry: Any, index: int) -> Row:
    if isinstance(entry, Mapping):
        return {str(name): _column(value, index) for name, value in entry.items()}
    if isinstance(entry, tuple | list):
        return tuple(_array(value, index) for value in entry)
    return (_array(entry, index),)


def _column(value: Any, index: int) -> Any:
    """A named value; a list of numbers is one sample and gets the axis of the batch."""
    if isinstance(value, list):
        sample = np.asarray(value)
        if sample.dtype.kind in "biuf":
            return sample[None]
    return _array(value, index)


def _array(value: Any, index: int) -> Any:
    if isinstance(value, ms.Tensor | np.ndarray):
        return value
    raise TypeError(f"datasets: row {index} holds a {type(value).__name__} where an array or Tensor is expected")


def row_mask(row: Row) -> npt.NDArray[np.bool_] | None:
    """The row's `attention_mask` (batch, sequence) as bool, None if it has none."""
    if not isinstance(row, Mapping) or "attention_mask" not in row:
        return None
    mask = row["attention_mask"]
    return np.asarray(mask.asnumpy() if isinstance(mask, ms.Tensor) else mask).astype(bool)


def row_runner(network: Any, helper: NetworkHelper | None) -> Callable[[Row], None]:
    """A function that runs `network` on one row.

    With a helper, `helper.generate(network, input_ids, do_sample=False, max_new_tokens=1)`, `input_ids`
    being the column of that name or the row's only value. Without, `network(...)` with the row's values
    by name if every column is a parameter of `construct`, else by position.
    """
    if helper is not None:

        def generate(row: Row) -> None:
            helper.generate(network, _input_ids(row), do_sample=False, max_new_tokens=1)

        return generate
    parameters = inspect.signature(network.construct).parameters

    def call(row: Row) -> None:
        if not isinstance(row, Mapping):
            network(*map(_tensor, row))
            return
        if "attention_mask" not in parameters:  # it then says which tokens count, and nothing to the network
            row = {name: value for name, value in row.items() if name != "attention_mask"}
        if all(name in parameters for name in row):
            network(**{name: _tensor(value) for name, value in row.items()})
        else:
            if not _accepts(parameters.values(), len(row)):
                raise DatasetError(
                    f"datasets: columns {', '.join(row)} do not fit construct({', '.join(parameters)}) of "
                    f"{type(network).__name__}: name the columns as its parameters, or give a network_helper"
                )
            network(*map(_tensor, row.values()))

    return call


def _accepts(parameters: Iterable[inspect.Parameter], num_values: int) -> bool:
    """Whether so many positional values fit the parameters."""
    listed = list(parameters)
    if any(p.kind is p.VAR_POSITIONAL for p in listed):
        return True
    positional = [p for p in listed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(p.default is p.empty for p in positional) <= num_values <= len(positional)


def _input_ids(row: Row) -> Any:
    if isinstance(row, Mapping):
        if "input_ids" not in row and len(row) != 1:
            raise DatasetError(f"datasets: no column input_ids among {', '.join(row)}")
        value = row["input_ids"] if "input_ids" in row else next(iter(row.values()))
    else:
        value = row[0]
    return value.asnumpy() if isinstance(value, ms.Tensor) else value


def _tensor(value: Any) -> Any:
    return value if isinstance(value, ms.Tensor) else ms.Tensor(value)
