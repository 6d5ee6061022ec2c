"""Rows of a file: which ones are wanted, and their values as plain arrays, whatever Arrow encodes them as."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["FieldPath", "Rows", "WantedRows", "field_of", "plain", "taken"]

Rows = NDArray[np.int64]

FieldPath = tuple[str, ...]
"""Name of a column, and of fields within it where it holds structs."""


class WantedRows:
    """Rows wanted of one file: all from `first` on, or ascending `numbers`."""

    def __init__(self, *, first: int = 0, numbers: Rows | None = None) -> None:
        self._first = first
        self._numbers = numbers
        self.stop = None if numbers is None else int(numbers[-1]) + 1

    def within(self, start: int, count: int) -> Rows:
        """Those of rows `start` to `start + count` - 1 that are wanted."""
        end = start + count
        if self._numbers is None:
            return np.arange(max(start, self._first), end)
        low, high = np.searchsorted(self._numbers, (start, end))
        return self._numbers[low:high]


def taken(array: pa.Array, places: Rows) -> pa.Array:
    """The values at ascending places, of an array of any type: not every type has a kernel for `take`."""
    if places.size == 0:
        return array.slice(0, 0)
    edges = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), places.size]
    runs = [array.slice(int(places[a]), b - a) for a, b in itertools.pairwise(edges)]
    return runs[0] if len(runs) == 1 else pa.concat_arrays(runs)


def field_of(array: pa.Array, path: FieldPath) -> pa.Array:
    """The field within structs that `path` leads to; null where a struct on the way is."""
    for name in path:
        array = pc.struct_field(array, name)
    return array


def plain(array: pa.Array) -> pa.Array:
    """The same values without dictionary, run ends, views of strings or extension type."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(array.storage)
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(array.indices, plain(array.dictionary)).dictionary_decode()
    if pa.types.is_run_end_encoded(kind):
        ends = array.run_ends.to_numpy(zero_copy_only=False)
        runs = np.searchsorted(ends, array.offset + np.arange(len(array)), side="right")
        return plain(array.values).take(pa.array(runs))
    return array.cast(pa.large_string()) if pa.types.is_string_view(kind) else array
