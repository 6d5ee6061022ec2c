"""A file of rows, whatever its format: its columns, how many rows it has, and those that are wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import pyarrow as pa

from gs_dist.data.locations import Location
from gs_dist.data.rows import FieldPath, Rows, WantedRows

__all__ = ["DataFile"]


class DataFile(ABC):
    """One file; rows are read a batch at a time, so that memory does not grow with it."""

    def __init__(self, location: Location) -> None:
        self.location = location

    def __str__(self) -> str:
        return str(self.location)

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the file.

        Raises:
            DatasetError: it cannot be read, or is damaged.
        """
        with self.location.errors_named():
            return self._schema()

    @abstractmethod
    def _schema(self) -> pa.Schema: ...

    @abstractmethod
    def count_rows(self) -> int:
        """Rows of the file; from its metadata where the format has them there."""

    def surely_without_nulls(self, paths: Sequence[FieldPath]) -> bool:
        """Whether the file's metadata tell that none of these fields is null in any row."""
        return False

    @abstractmethod
    def read(self, paths: Sequence[FieldPath], wanted: WantedRows) -> Iterator[tuple[Rows, list[pa.Array]]]:
        """Wanted rows of some fields, a batch at a time, with their numbers in the file; the arrays are `plain`.

        Raises:
            DatasetError: while iterating; the file cannot be read, or is damaged.
        """
