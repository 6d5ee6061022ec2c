"""Calibration samples from Arrow data (see `arrow_files`): joined and cut, or one a row with the rest masked.

A sample is `sequence_length` token ids and is known by its index: whoever reads micro-batch 7 gets the same
ids. Rows are streamed a record batch at a time, so memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gs_dist.data.arrow_files import ArrowFile, Rows, WantedRows, find_files, without_secrets
from gs_dist.errors import DatasetError
from gs_dist.recipe.config import CalibrationData

__all__ = ["CalibrationDataset", "TokenBatch", "open_dataset"]

Ids = NDArray[np.int32]

_ROWS_AT_ONCE = 1024  # rows turned into tokens together
_TEXTS_AT_ONCE = 32  # texts may be whole books
_KEYS_AT_ONCE = 1 << 20  # row numbers hashed together by a seeded choice


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """A micro-batch, always of one shape: what a short last one lacks is filled with rows of mask False.

    Attributes:
        index: Which micro-batch it is.
        input_ids: int32 (micro_batch_size, sequence_length); 0 where the mask is False.
        mask: bool, same shape; True where there is a token.
        num_samples: Samples in it; the first rows.
    """

    index: int
    input_ids: Ids
    mask: NDArray[np.bool_]
    num_samples: int


def open_dataset(
    config: CalibrationData,
    vocab_size: int,
    tokenizer_file: Path | None = None,
    *,
    eos_token_id: int | None = None,
    fewer_samples: bool = False,
) -> CalibrationDataset:
    """Finds the files and looks at the first one; rows are read by the dataset's methods.

    Args:
        config: The recipe's `calibration` section.
        vocab_size: Ids at or above it are refused.
        tokenizer_file: The model's tokenizer.json, for a column of text.
        eos_token_id: Ends every text when texts are packed; None where the model has none.
        fewer_samples: Take `config.num_samples` as a limit and count what is there, which reads the data
            once, instead of refusing data that hold fewer.

    Raises:
        DatasetError: no file, a file that is not Arrow data, no such column, a column of the wrong type, text
            without tokenizer_file.
    """
    files = find_files(config.data)
    column, is_text = _choose_column(files[0], config.column)
    tokenizer = _load_tokenizer(tokenizer_file, files[0], column) if is_text else None
    dataset = CalibrationDataset(config, files, column, tokenizer, vocab_size, eos_token_id)
    if fewer_samples:
        dataset._serve_what_is_there()
    return dataset


class CalibrationDataset:
    """Samples by index; made by `open_dataset`."""

    def __init__(
        self,
        config: CalibrationData,
        files: list[ArrowFile],
        column: str,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_token_id: int | None,
    ) -> None:
        self._config = config
        self._files = files
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_id = eos_token_id if config.packing else None
        self._num_samples = config.num_samples
        self.column = column

    @property
    def num_samples(self) -> int:
        """Samples served, over all micro-batches."""
        return self._num_samples

    @property
    def micro_batch_size(self) -> int:
        """Rows of every micro-batch."""
        return self._config.samples_per_micro_batch

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches served; the last may hold fewer samples."""
        return -(-self._num_samples // self.micro_batch_size)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[TokenBatch]:
        """Micro-batches `start` to `stop` - 1, in order; the same ones however a job deals them.

        Rows before the first are not tokenised, except where texts are packed: there a sample's place
        depends on the length of everything before it.

        Raises:
            ValueError: a range outside 0 to num_micro_batches.
            DatasetError: while iterating; unreadable files, nulls, ids outside the vocabulary, too few samples.
        """
        stop = self.num_micro_batches if stop is None else stop
        if not 0 <= start <= stop <= self.num_micro_batches:
            raise ValueError(f"micro-batches {start} to {stop} asked for; there are {self.num_micro_batches}")
        return self._batches(start, stop)

    def _batches(self, start: int, stop: int) -> Iterator[TokenBatch]:
        size, length = self.micro_batch_size, self._config.sequence_length
        samples = self._samples(start * size, min(stop * size, self._num_samples))
        for index in range(start, stop):
            count = min(size, self._num_samples - index * size)
            ids, mask = np.zeros((size, length), np.int32), np.zeros((size, length), np.bool_)
            for row in range(count):
                sample = next(samples)
                ids[row, : sample.size] = sample
                mask[row, : sample.size] = True
            yield TokenBatch(index=index, input_ids=ids, mask=mask, num_samples=count)

    def fingerprint(self) -> str:
        """sha256 of all samples' ids and masks, in hex; the same for any micro-batch size. Reads everything once.

        Raises:
            DatasetError: as `batches`.
        """
        digest = hashlib.sha256(f"{self._num_samples} x {self._config.sequence_length}".encode())
        for sample in self._samples(0, self._num_samples):
            digest.update(sample.size.to_bytes(8, "little"))
            digest.update(sample.astype("<i4").tobytes())
        return digest.hexdigest()

    def _serve_what_is_there(self) -> None:
        self._num_samples = self._count_samples()
        if self._num_samples == 0:
            raise self._too_few(0)

    def _count_samples(self) -> int:
        return sum(1 for _ in self._samples(0, self._config.num_samples, refuse=False))

    def _samples(self, first: int, last: int, *, refuse: bool = True) -> Iterator[Ids]:
        """Samples `first` to `last` - 1, without padding; refuses data that hold fewer."""
        length = self._config.sequence_length
        found = first
        if first < last:
            if self._config.packing:
                samples = _pack(self._rows(0), length, first, last)
            else:
                samples = (row[:length] for row in self._rows(first, last))
            for sample in samples:
                found += 1
                yield sample
        if found < last and refuse:
            raise self._too_few(self._count_samples())

    def _too_few(self, found: int) -> DatasetError:
        config = self._config
        names = ", ".join([without_secrets(entry) for entry in config.data[:3]] + ["..."] * (len(config.data) > 3))
        cure = f"set calibration.num_samples to {found} or give more data"
        if found == 0:
            cure = (
                "set a smaller calibration.sequence_length or give more data" if config.packing else "give other data"
            )
        kind = f"samples of {config.sequence_length} tokens" if config.packing else "rows"
        return DatasetError(
            f"{names}: {found or 'no'} {kind} in column {self.column}, while calibration.num_samples asks for "
            f"{config.num_samples}: {cure}"
        )

    def _rows(self, first: int, last: int | None = None) -> Iterator[Ids]:
        """Token ids of the rows in the order in which samples take them, from the first-th on."""
        if self._config.seed is None:
            yield from self._rows_in_file_order(first, last)
            return
        size = 16 if self._config.packing else _ROWS_AT_ONCE
        order = _SeededOrder(self._total_rows, self._config.seed)
        stop = self._total_rows if last is None else min(last, self._total_rows)
        while first < stop:
            wanted = order.rows(first, min(first + size, stop))
            by_number = np.argsort(wanted)
            ascending = list(self._rows_numbered(wanted[by_number]))
            yield from (ascending[place] for place in np.argsort(by_number))
            first, size = first + size, min(2 * size, _ROWS_AT_ONCE)  # few rows may be enough where they are long

    @cached_property
    def _total_rows(self) -> int:
        return sum(file.count_rows(self.column) for file in self._files)

    def _rows_in_file_order(self, first: int, last: int | None) -> Iterator[Ids]:
        before = 0  # stays 0 where all rows are wanted: counting them would read a remote stream twice
        for file in self._files:
            wanted = WantedRows(first=first - before, stop=None if last is None else last - before)
            for numbers, array in file.read(self.column, wanted):
                yield from self._tokens(file, numbers, array)
            if last is not None:
                before += file.count_rows(self.column)
                if before >= last:
                    return

    def _rows_numbered(self, numbers: Rows) -> Iterator[Ids]:
        """Rows by ascending number over all files."""
        before = 0
        for file in self._files:
            count = file.count_rows(self.column)
            low, high = np.searchsorted(numbers, (before, before + count))
            if low < high:
                for rows, array in file.read(self.column, WantedRows(numbers=numbers[low:high] - before)):
                    yield from self._tokens(file, rows, array)
            before += count

    def _tokens(self, file: ArrowFile, rows: Rows, array: pa.Array) -> Iterator[Ids]:
        step = _ROWS_AT_ONCE if self._tokenizer is None else _TEXTS_AT_ONCE
        for start in range(0, len(array), step):
            part, numbers = array.slice(start, step), rows[start : start + step]
            if file.column_is_text(self.column) is (self._tokenizer is None):
                raise DatasetError(f"{file}: column {self.column} is {array.type}, unlike in other files of the data")
            if pa.types.is_dictionary(part.type):
                part = part.dictionary_decode()
            if part.null_count:
                raise DatasetError(f"{file}, row {numbers[_first_true(part.is_null())]}: {self.column} is null")
            lengths, ids = self._encode(part) if self._tokenizer is not None else self._ids(file, numbers, part)
            self._check_ids(file, numbers, lengths, ids)
            if not self._config.packing and not lengths.all():
                row = numbers[int(np.argmin(lengths != 0))]
                raise DatasetError(
                    f"{file}, row {row}: no token in {self.column}; remove the row or set calibration.packing: true"
                )
            ends = np.cumsum(lengths)
            small = ids.astype(np.int32)
            yield from (small[end - size : end] for end, size in zip(ends, lengths, strict=True))

    def _ids(self, file: ArrowFile, rows: Rows, array: pa.Array) -> tuple[Rows, NDArray[Any]]:
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)
        values = pc.list_flatten(array)
        if values.null_count:
            row = rows[np.searchsorted(np.cumsum(lengths), _first_true(values.is_null()), side="right")]
            raise DatasetError(f"{file}, row {row}: {self.column} holds a null")
        return lengths, values.to_numpy(zero_copy_only=False)

    def _encode(self, array: pa.Array) -> tuple[Rows, NDArray[Any]]:
        """Tokens of texts as the tokenizer gives them, special ones included, and an end where texts are packed."""
        assert self._tokenizer is not None
        encoded = self._tokenizer.encode_batch(array.to_pylist())
        eos = self._eos_token_id
        pieces = [np.asarray(text.ids, np.int64) for text in encoded]
        if eos is not None:
            pieces = [np.append(ids, eos) if ids.size and ids[-1] != eos else ids for ids in pieces]
        return np.asarray([ids.size for ids in pieces], np.int64), np.concatenate(pieces)

    def _check_ids(self, file: ArrowFile, rows: Rows, lengths: Rows, ids: NDArray[Any]) -> None:
        if ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < self._vocab_size):
            return
        place = int(np.argmax((ids < 0) | (ids >= self._vocab_size)))
        row = rows[np.searchsorted(np.cumsum(lengths), place, side="right")]
        raise DatasetError(
            f"{file}, row {row}: token id {ids[place]} is outside the model's vocabulary of {self._vocab_size}; "
            f"tokenise the data with this model's tokenizer, or set calibration.column to a column of text"
        )


def _pack(rows: Iterable[Ids], length: int, first: int, last: int) -> Iterator[Ids]:
    """Cuts the joined rows into pieces of `length` and yields pieces `first` to `last` - 1; a rest is dropped."""
    skip, left = first * length, last - first
    held: list[Ids] = []
    size = 0
    for row in rows:
        if skip >= row.size:
            skip -= row.size
            continue
        held.append(row[skip:])
        size += row.size - skip
        skip = 0
        if size < length:
            continue
        joined = np.concatenate(held)
        for start in range(0, size - length + 1, length):
            yield joined[start : start + length]
            left -= 1
            if left == 0:
                return
        size %= length
        held = [joined[joined.size - size :]]


class _SeededOrder:
    """Row numbers by a hash of seed and number: an order of the whole dataset that need not be held.

    The hash is splitmix64 (Steele, Lea and Flood, 2014), spelt out so that no library release changes it.
    """

    def __init__(self, total: int, seed: int) -> None:
        self._total = total
        self._seed = np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little"))
        self._known: Rows = np.zeros(0, np.int64)

    def rows(self, start: int, stop: int) -> Rows:
        """The start-th to (stop - 1)-th row numbers of the order."""
        if stop > self._known.size:
            self._known = self._first(min(max(2 * stop, _ROWS_AT_ONCE), self._total))
        return self._known[start:stop]

    def _first(self, count: int) -> Rows:
        keys, numbers = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        for start in range(0, self._total, _KEYS_AT_ONCE):
            more = np.arange(start, min(start + _KEYS_AT_ONCE, self._total), dtype=np.int64)
            keys, numbers = np.append(keys, self._keys(more)), np.append(numbers, more)
            best = np.lexsort((numbers, keys))[:count]
            keys, numbers = keys[best], numbers[best]
        return numbers

    def _keys(self, numbers: Rows) -> NDArray[np.uint64]:
        z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + self._seed
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _choose_column(file: ArrowFile, column: str) -> tuple[str, bool]:
    if column == "auto":
        column = next((name for name in ("input_ids", "text") if name in file.schema.names), "input_ids")
    return column, file.column_is_text(column)


def _load_tokenizer(path: Path | None, file: ArrowFile, column: str) -> Tokenizer:
    if path is None or not path.is_file():
        raise DatasetError(
            f"{file}: column {column} is text, and the model has no tokenizer.json to tokenise it with; put one "
            f"beside its config.json, or set calibration.column to a column of token ids"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DatasetError(f"{path} cannot be read as a tokenizer.json: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _first_true(flags: pa.Array) -> int:
    return int(np.argmax(flags.to_numpy(zero_copy_only=False)))
