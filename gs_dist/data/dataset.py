"""Calibration samples: rows of files, as token ids, joined and cut, or one a row with the rest masked.

A sample is `sequence_length` token ids and is known by its index: whoever reads micro-batch 7 gets the same
ids. Rows are streamed a batch at a time, so memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gs_dist.data.choice import Choice
from gs_dist.data.content import Content, RowBatch
from gs_dist.data.data_file import DataFile
from gs_dist.data.files import open_file
from gs_dist.data.locations import find_files
from gs_dist.data.order import SeededOrder
from gs_dist.data.packing import Ids, pack
from gs_dist.data.rows import Rows, WantedRows
from gs_dist.data.tally import Tally
from gs_dist.errors import DatasetError
from gs_dist.recipe.sections import CalibrationData
from gs_dist.wording import counted, without_secrets

__all__ = ["CalibrationDataset", "TokenBatch", "open_dataset", "samples_fingerprint"]

_FEW_ROWS = 16  # rows of a seed's order that are read together at first, where it is not known how many are wanted
_MANY_ROWS = 1024  # and at most
_DIGEST = 16  # bytes of a sample's digest


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

    def digests(self) -> tuple[bytes, ...]:
        """Of each sample sha256 over its tokens, cut to 128 bits."""
        return tuple(_digest(self.input_ids[row][self.mask[row]]) for row in range(self.num_samples))


def _digest(sample: Ids) -> bytes:
    return hashlib.sha256(sample.astype("<i4").tobytes()).digest()[:_DIGEST]


def samples_fingerprint(sequence_length: int, digests: Sequence[bytes]) -> str:
    """sha256, in hex, over the `TokenBatch.digests` of all samples in order."""
    return hashlib.sha256(f"{len(digests)} x {sequence_length}".encode() + b"".join(digests)).hexdigest()


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
        tokenizer_file: The model's tokenizer.json, for a column of text; a chat template is looked for beside it.
        eos_token_id: Ends every text when texts are packed; None where the model has none.
        fewer_samples: Take `config.num_samples` as a limit and count what is there, which reads the data
            once, instead of refusing data that hold fewer.

    Raises:
        DatasetError: no file, a file of no known format, no such column, a column of the wrong type, text
            without tokenizer_file, chats without a template.
    """
    found = find_files(config.data)
    files = [open_file(location, sample_by=config.sample_by) for location in found.locations[:1]]
    choice = Choice(config, files[0], tokenizer_file, eos_token_id)
    files += [open_file(location, sample_by=config.sample_by) for location in found.locations[1:]]
    dataset = CalibrationDataset(config, files, choice.content, vocab_size, (*found.notes, *choice.notes))
    if fewer_samples:
        dataset._serve_what_is_there()
    return dataset


class CalibrationDataset:
    """Samples by index; made by `open_dataset`."""

    def __init__(
        self,
        config: CalibrationData,
        files: list[DataFile],
        content: Content,
        vocab_size: int,
        notes: tuple[str, ...],
    ) -> None:
        self._config = config
        self._files = files
        self._content = content
        self._vocab_size = vocab_size
        self._num_samples = config.num_samples
        self._notes = notes
        self._tally = Tally()

    @property
    def column(self) -> str:
        """The column that is read, or two of them with a plus sign."""
        return self._content.name

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told of how the data are read; complete once all of them were, by `digests`."""
        return (*self._notes, *self._tally.notes(self.column))

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
        samples = self._samples(start * size, min(stop * size, self._num_samples), Tally())
        for index in range(start, stop):
            count = min(size, self._num_samples - index * size)
            ids, mask = np.zeros((size, length), np.int32), np.zeros((size, length), np.bool_)
            for row in range(count):
                sample = next(samples)
                ids[row, : sample.size] = sample
                mask[row, : sample.size] = True
            yield TokenBatch(index=index, input_ids=ids, mask=mask, num_samples=count)

    def digests(self) -> tuple[bytes, ...]:
        """The `TokenBatch.digests` of all samples, the same for any micro-batch size. Reads everything once.

        Raises:
            DatasetError: as `batches`.
        """
        tally = Tally()
        found = tuple(_digest(sample) for sample in self._samples(0, self._num_samples, tally))
        self._tally = tally
        return found

    def fingerprint(self) -> str:
        """The `samples_fingerprint` of all samples. Reads everything once.

        Raises:
            DatasetError: as `batches`.
        """
        return samples_fingerprint(self._config.sequence_length, self.digests())

    def _serve_what_is_there(self) -> None:
        self._num_samples = self._count_samples()
        if self._num_samples == 0:
            raise self._too_few(0)

    def _count_samples(self) -> int:
        tally = Tally()
        count = sum(1 for _ in self._samples(0, self._config.num_samples, tally, refuse=False))
        self._tally = tally
        return count

    def _samples(self, first: int, last: int, tally: Tally, *, refuse: bool = True) -> Iterator[Ids]:
        """Samples `first` to `last` - 1, without padding; refuses data that hold fewer."""
        found = first
        if first < last:
            if self._config.packing:
                samples = pack(self._rows(0, None, tally), self._config.sequence_length, first, last)
            else:
                samples = self._rows(first, last, tally)
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
        kind = f"{_some(found, 'sample')} of {config.sequence_length} tokens" if config.packing else _some(found, "row")
        return DatasetError(
            f"{names}: {kind} in column {self.column}, while calibration.num_samples asks for "
            f"{config.num_samples}: {cure}"
        )

    def _rows(self, first: int, last: int | None, tally: Tally) -> Iterator[Ids]:
        """Token ids of the `first`-th to (`last` - 1)-th row in the order in which samples take them.

        Rows that hold nothing are no rows. Where none of a sample's tokens would be used, they are not even made.
        """
        if self._config.seed is None:
            yield from self._rows_in_file_order(first, last, tally)
        else:
            yield from self._rows_in_seeds_order(first, last, tally)

    def _rows_in_file_order(self, first: int, last: int | None, tally: Tally) -> Iterator[Ids]:
        skip, left = first, None if last is None else last - first
        for file in self._files:
            wanted = WantedRows()
            if skip and file.surely_without_nulls(self._content.fields(file).required):
                count = file.count_rows()  # metadata: what is skipped is not read
                if skip >= count:
                    skip -= count
                    continue
                wanted, skip = WantedRows(first=skip), 0
            for batch in self._batches_of(file, wanted):
                kept = np.flatnonzero(~self._empty(batch, tally))
                part, skip = kept[skip:][:left], max(0, skip - kept.size)
                yield from self._tokens(batch.at(part), tally)
                left = None if left is None else left - part.size
                if left == 0:
                    return

    def _rows_in_seeds_order(self, first: int, last: int | None, tally: Tally) -> Iterator[Ids]:
        sure = all(file.surely_without_nulls(self._content.fields(file).required) for file in self._files)
        at, skip = (first, 0) if sure else (0, first)
        left = None if last is None else last - first
        size = _FEW_ROWS if last is None else _MANY_ROWS
        order = SeededOrder(self._total_rows, self._config.seed or 0)
        while at < self._total_rows and left != 0:
            stop = min(at + size, self._total_rows if left is None or not sure else at + left)
            wanted = order.rows(at, stop)
            by_number = np.argsort(wanted)
            ascending = list(self._rows_numbered(wanted[by_number], tally))
            for place in np.argsort(by_number).tolist():
                row = ascending[place]
                if row is None or left == 0:
                    continue
                if skip:
                    skip -= 1
                    continue
                yield row
                left = None if left is None else left - 1
            at, size = at + wanted.size, min(2 * size, _MANY_ROWS)  # few rows may be enough where they are long

    @cached_property
    def _total_rows(self) -> int:
        return sum(file.count_rows() for file in self._files)

    def _rows_numbered(self, numbers: Rows, tally: Tally) -> Iterator[Ids | None]:
        """Rows by ascending number over all files; None for those that hold nothing."""
        before = 0
        for file in self._files:
            count = file.count_rows()
            low, high = np.searchsorted(numbers, (before, before + count))
            if low < high:
                for batch in self._batches_of(file, WantedRows(numbers=numbers[low:high] - before)):
                    empty = self._empty(batch, tally)
                    tokens = self._tokens(batch.at(np.flatnonzero(~empty)), tally)
                    yield from (None if flag else next(tokens) for flag in empty.tolist())
            before += count

    def _batches_of(self, file: DataFile, wanted: WantedRows) -> Iterator[RowBatch]:
        fields = self._content.fields(file)
        count = len(fields.required)
        for numbers, arrays in file.read(fields.paths, wanted):
            yield RowBatch(
                file=file,
                numbers=numbers,
                columns=tuple(arrays[:count]),
                beside=dict(zip(fields.beside, arrays[count:], strict=True)),
            )

    def _empty(self, batch: RowBatch, tally: Tally) -> NDArray[np.bool_]:
        """Which rows hold nothing; refuses them where the recipe is strict."""
        empty = self._content.empty(batch)
        if empty.any() and self._config.strict:
            raise DatasetError(
                f"{batch.where(np.argmax(empty))}: {self.column} is null or empty; remove the row, or set "
                "calibration.strict: false to pass over such rows"
            )
        tally.null_rows += int(empty.sum())
        return empty

    def _tokens(self, batch: RowBatch, tally: Tally) -> Iterator[Ids]:
        step = self._content.rows_at_once
        for start in range(0, len(batch), step):
            part = batch.at(np.arange(start, min(start + step, len(batch))))
            lengths, ids = self._content.tokens(part, tally)
            self._check_ids(part, lengths, ids)
            tally.rows += len(part)
            if not self._config.packing and not lengths.all():
                raise DatasetError(
                    f"{part.where(np.argmin(lengths != 0))}: no token in {self.column}; remove the row or set "
                    "calibration.packing: true"
                )
            ends = np.cumsum(lengths)
            small = ids.astype(np.int32)
            cut = lengths if self._config.packing else np.minimum(lengths, self._config.sequence_length)
            begins = ends - lengths
            yield from (small[begin : begin + size].copy() for begin, size in zip(begins, cut, strict=True))

    def _check_ids(self, rows: RowBatch, lengths: Rows, ids: NDArray[Any]) -> None:
        if ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < self._vocab_size):
            return
        place = int(np.argmax((ids < 0) | (ids >= self._vocab_size)))
        row = np.searchsorted(np.cumsum(lengths), place, side="right")
        raise DatasetError(f"{rows.where(row)}: {self._content.outside(int(ids[place]), self._vocab_size)}")


def _some(count: int, noun: str) -> str:
    return counted(count, noun) if count else f"no {noun}s"
