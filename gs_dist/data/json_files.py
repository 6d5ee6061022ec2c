"""JSON: an object a line, or one list of them.

`pyarrow.json` takes the types of a whole file from its first block, and chats are seldom of one type: a message's
content may be text in one row and parts in another. Lines are told apart as bytes, and only wanted ones are parsed.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from gs_dist.data.data_file import DataFile
from gs_dist.data.rows import FieldPath, Rows, WantedRows
from gs_dist.errors import DatasetError

__all__ = ["JsonFile", "JsonLinesFile"]

_ROWS_AT_ONCE = 256
_ROWS_LOOKED_AT = 200  # for names and types of the columns
_LARGEST_LIST = 1 << 30  # bytes of a file that is parsed as a whole


class _JsonRows(DataFile):
    """A file of JSON objects; a bare text stands for a row with `text`, a bare list for `input_ids` or `messages`."""

    @abstractmethod
    def _values(self, wanted: WantedRows) -> Iterator[tuple[int, str, Any]]:
        """Wanted values, each with its row number and with what a message calls the row."""

    def _rows(self, wanted: WantedRows) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        for number, name, value in self._values(wanted):
            yield number, name, self._row(value, name)

    def _row(self, value: Any, name: str) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            return value
        if isinstance(value, str):
            return {"text": value}
        if isinstance(value, list):
            return {"input_ids" if all(map(_is_integer, value)) else "messages": value}
        raise DatasetError(f'{name}: a JSON {_json_name(value)} where an object such as {{"text": ...}} is expected')

    def _schema(self) -> pa.Schema:
        rows = [row for _, _, row in islice(self._rows(WantedRows()), _ROWS_LOOKED_AT)]
        if not rows:
            raise DatasetError(f"{self} holds no row")
        fields = _struct_of(rows)
        return pa.schema(list(fields))

    def read(self, paths: Sequence[FieldPath], wanted: WantedRows) -> Iterator[tuple[Rows, list[pa.Array]]]:
        """As in `DataFile`; what is neither text nor a list of integers comes as JSON text."""
        kinds = [self._kind(path) for path in paths]
        with self.location.errors_named():
            rows = self._rows(wanted)
            while held := list(islice(rows, _ROWS_AT_ONCE)):
                arrays = [_column(held, path, kind) for path, kind in zip(paths, kinds, strict=True)]
                yield np.asarray([number for number, _, _ in held]), arrays

    def _kind(self, path: FieldPath) -> pa.DataType:
        kind: pa.DataType = self.schema.field(path[0]).type
        for name in path[1:]:
            kind = kind.field(name).type
        return kind


class JsonLinesFile(_JsonRows):
    """A value a line (https://jsonlines.org); empty lines are no rows."""

    def _values(self, wanted: WantedRows) -> Iterator[tuple[int, str, Any]]:
        number = 0
        for line_number, line in self.location.lines():
            if wanted.stop is not None and number >= wanted.stop:
                return
            if not line.strip():
                continue
            if wanted.within(number, 1).size:
                name = f"{self}, line {line_number}"
                yield number, name, self._parsed(line, name)
            number += 1

    @staticmethod
    def _parsed(line: bytes, name: str) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{name} is not JSON ({error}): write one JSON object a line") from None

    @cached_property
    def _num_rows(self) -> int:
        return sum(1 for _, line in self.location.lines() if line.strip())

    def count_rows(self) -> int:
        """As in `DataFile`; reads the file, and parses nothing."""
        with self.location.errors_named():
            return self._num_rows


class JsonFile(_JsonRows):
    """A list of values, parsed as a whole."""

    @cached_property
    def _list(self) -> list[Any]:
        with self.location.open_stream() as source:
            data = source.read(_LARGEST_LIST + 1)
        if len(data) > _LARGEST_LIST:
            raise DatasetError(f"{self} is one JSON value of more than 1 GiB: write JSON lines, an object a line")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{self} is not JSON ({error})") from None
        return value if isinstance(value, list) else [value]

    def _values(self, wanted: WantedRows) -> Iterator[tuple[int, str, Any]]:
        for number in wanted.within(0, len(self._list)).tolist():
            yield number, f"{self}, row {number}", self._list[number]

    def count_rows(self) -> int:
        """As in `DataFile`."""
        with self.location.errors_named():
            return len(self._list)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _json_name(value: Any) -> str:
    return {bool: "boolean", type(None): "null", str: "text", list: "list", dict: "object"}.get(type(value), "number")


def _column(rows: Iterable[tuple[int, str, Mapping[str, Any]]], path: FieldPath, kind: pa.DataType) -> pa.Array:
    """One field of all rows; a row without it holds a null."""
    values = []
    for _, name, row in rows:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if pa.types.is_large_string(kind) and not isinstance(value, str | None):
            raise DatasetError(f"{name}: {'.'.join(path)} is a JSON {_json_name(value)}, and text in other rows")
        if _is_ids(kind) and not (value is None or (isinstance(value, list) and all(map(_is_integer, value)))):
            raise DatasetError(f"{name}: {'.'.join(path)} is no list of integers, as it is in other rows")
        values.append(value)
    if pa.types.is_large_string(kind) or _is_ids(kind):
        try:
            return pa.array(values, kind)
        except (OverflowError, pa.ArrowInvalid) as error:
            raise DatasetError(f"{'.'.join(path)} holds what no token id is ({error})") from None
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.large_string())


def _is_ids(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_list(kind) and pa.types.is_integer(kind.value_type))


def _struct_of(rows: Sequence[Mapping[str, Any]]) -> pa.StructType:
    """Names and types over all rows, in the order of their first appearance."""
    names = dict.fromkeys(str(name) for row in rows for name in row)
    return pa.struct([(name, _type_of([row[name] for row in rows if row.get(name) is not None])) for name in names])


def _type_of(values: Sequence[Any]) -> pa.DataType:
    """The type that holds all values (nulls left out): `pa.json_()` where no other does."""
    if not values:
        return pa.null()
    if all(isinstance(value, str) for value in values):
        return pa.large_string()
    if all(isinstance(value, bool) for value in values):
        return pa.bool_()
    if all(map(_is_integer, values)):
        return pa.int64()
    if all(isinstance(value, Mapping) for value in values):
        return _struct_of(values)
    if all(isinstance(value, list) for value in values):
        inner = _type_of([part for value in values for part in value if part is not None])
        return pa.large_list(pa.int64() if pa.types.is_null(inner) else inner)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return pa.float64() if numbers else pa.json_(pa.large_string())
