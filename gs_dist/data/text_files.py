"""Plain text and CSV: rows of strings. Lines, paragraphs or whole files, as `datasets` takes them (`sample_by`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from gs_dist.data.data_file import DataFile
from gs_dist.data.locations import Location
from gs_dist.data.rows import FieldPath, Rows, WantedRows, taken
from gs_dist.errors import DatasetError

__all__ = ["CsvFile", "SampleBy", "TextFile"]

SampleBy = Literal["line", "paragraph", "document"]

_ROWS_AT_ONCE = 256
_BLOCK = 16 << 20  # bytes that pyarrow's CSV reader holds; a row must fit


class TextFile(DataFile):
    """A file of UTF-8 text, with one column, `text`; lines that hold nothing are no rows."""

    def __init__(self, location: Location, sample_by: SampleBy) -> None:
        super().__init__(location)
        self._sample_by = sample_by

    def _schema(self) -> pa.Schema:
        return pa.schema([("text", pa.large_string())])

    def _lines(self) -> Iterator[str]:
        for number, line in self.location.lines():
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DatasetError(f"{self}, line {number}: not UTF-8 text ({error.reason})") from None

    def _texts(self) -> Iterator[str]:
        if self._sample_by == "line":
            yield from (line.rstrip("\r\n") for line in self._lines() if line.strip())
        elif self._sample_by == "paragraph":
            for holds_text, lines in groupby(self._lines(), lambda line: bool(line.strip())):
                if holds_text:
                    yield "".join(lines).rstrip("\r\n")
        else:
            text = "".join(self._lines())
            yield from [text] * bool(text.strip())

    @cached_property
    def _num_rows(self) -> int:
        return sum(1 for _ in self._texts())

    def count_rows(self) -> int:
        """As in `DataFile`; reads the file."""
        with self.location.errors_named():
            return self._num_rows

    def surely_without_nulls(self, paths: Sequence[FieldPath]) -> bool:
        """Text has none."""
        return True

    def read(self, paths: Sequence[FieldPath], wanted: WantedRows) -> Iterator[tuple[Rows, list[pa.Array]]]:
        """As in `DataFile`."""
        held: list[str] = []
        numbers: list[int] = []
        with self.location.errors_named():
            for number, text in enumerate(self._texts()):
                if wanted.stop is not None and number >= wanted.stop:
                    break
                if wanted.within(number, 1).size:
                    held.append(text)
                    numbers.append(number)
                if len(held) == _ROWS_AT_ONCE:
                    yield np.asarray(numbers), [pa.array(held, pa.large_string())] * len(paths)
                    held, numbers = [], []
        if held:
            yield np.asarray(numbers), [pa.array(held, pa.large_string())] * len(paths)


class CsvFile(DataFile):
    """Comma or tab separated values with a line of names; every column is text, and an empty field is null."""

    def __init__(self, location: Location, delimiter: str) -> None:
        super().__init__(location)
        self._delimiter = delimiter

    def _open(self, source: object, columns: Sequence[str] | None) -> pacsv.CSVStreamingReader:
        names = list(columns or ())
        return pacsv.open_csv(
            source,
            read_options=pacsv.ReadOptions(use_threads=False, block_size=_BLOCK),
            parse_options=pacsv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types={name: pa.large_string() for name in names},
                include_columns=names or None,
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=False,
            ),
        )

    def _schema(self) -> pa.Schema:
        with self.location.open_stream() as source:
            names = self._open(source, None).schema.names
        return pa.schema([(name, pa.large_string()) for name in names])

    @cached_property
    def _num_rows(self) -> int:
        with self.location.open_stream() as source:
            return sum(batch.num_rows for batch in self._open(source, self.schema.names[:1]))

    def count_rows(self) -> int:
        """As in `DataFile`; reads the file."""
        with self.location.errors_named():
            return self._num_rows

    def read(self, paths: Sequence[FieldPath], wanted: WantedRows) -> Iterator[tuple[Rows, list[pa.Array]]]:
        """As in `DataFile`."""
        with self.location.errors_named(), self.location.open_stream() as source:
            start = 0
            for batch in self._open(source, list(dict.fromkeys(path[0] for path in paths))):
                if wanted.stop is not None and start >= wanted.stop:
                    return
                numbers = wanted.within(start, batch.num_rows)
                if numbers.size:
                    yield numbers, [taken(batch.column(path[0]), numbers - start) for path in paths]
                start += batch.num_rows
