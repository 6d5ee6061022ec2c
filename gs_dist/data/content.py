"""What samples are made of: token ids, text, or a question with its answer; each knows its columns and gives tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gs_dist.data.chat import ChatTemplate, messages_of
from gs_dist.data.columns import ColumnKind, find_path, has_path, kind_of, offered, type_at
from gs_dist.data.data_file import DataFile
from gs_dist.data.padding import ATTENTION_MASK, QUALIFIERS, real_tokens
from gs_dist.data.rows import FieldPath, Rows, taken
from gs_dist.data.tally import Tally
from gs_dist.data.tokens import TextTokenizer
from gs_dist.errors import DatasetError

__all__ = ["Chats", "Content", "Fields", "Pairs", "RowBatch", "Texts", "TokenIds"]

Tokens = tuple[Rows, NDArray[Any]]
"""Lengths of rows, and the ids of all of them one after the other."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Fields of one file: those that samples are made of, and by role those that say more of them."""

    required: tuple[FieldPath, ...]
    beside: Mapping[str, FieldPath]

    @property
    def paths(self) -> tuple[FieldPath, ...]:
        """All of them, the required ones first."""
        return (*self.required, *self.beside.values())


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """Rows of one file with their numbers: values of the required fields, and of those beside them by role."""

    file: DataFile
    numbers: Rows
    columns: tuple[pa.Array, ...]
    beside: Mapping[str, pa.Array]

    def __len__(self) -> int:
        return int(self.numbers.size)

    def where(self, place: int | np.integer[Any]) -> str:
        """The row at a place, for messages."""
        return f"{self.file}, row {self.numbers[place]}"

    def at(self, places: Rows) -> RowBatch:
        """Those at ascending places."""
        return RowBatch(
            file=self.file,
            numbers=self.numbers[places],
            columns=tuple(taken(column, places) for column in self.columns),
            beside={role: taken(column, places) for role, column in self.beside.items()},
        )


class Content(ABC):
    """What each row holds.

    Args:
        names: of the columns that samples are made of.
    """

    kinds: ClassVar[frozenset[ColumnKind]]
    rows_at_once: ClassVar[int]
    """Rows turned into tokens together."""

    def __init__(self, *names: str) -> None:
        self._names = names

    @property
    def name(self) -> str:
        """Of its columns, for messages."""
        return "+".join(self._names)

    def fields(self, file: DataFile) -> Fields:
        """Where the columns are in a file.

        Raises:
            DatasetError: it lacks one, or one is of another type than in the first file.
        """
        required = []
        for name in self._names:
            path = find_path(file.schema, name)
            if path is None:
                count = file.schema.names.count(name) or "no"
                raise DatasetError(f"{file} has {count} column {name}; {offered(file.schema)}")
            kind = type_at(file.schema, path)
            if kind_of(kind, name) not in self.kinds:
                raise DatasetError(f"{file}: column {name} is {kind}, unlike in other files of the data")
            required.append(path)
        return Fields(required=tuple(required), beside=self._beside(file, required[0]))

    def _beside(self, file: DataFile, path: FieldPath) -> Mapping[str, FieldPath]:
        return {}

    def empty(self, rows: RowBatch) -> NDArray[np.bool_]:
        """Which rows hold nothing."""
        null = [column.is_null().to_numpy(zero_copy_only=False) for column in rows.columns]
        found: NDArray[np.bool_] = np.logical_or.reduce(null)
        return found

    @abstractmethod
    def tokens(self, rows: RowBatch, tally: Tally) -> Tokens:
        """Token ids of rows of which none is `empty`.

        Raises:
            DatasetError: a row holds something else.
        """

    @abstractmethod
    def outside(self, index: int, vocab_size: int) -> str:
        """What to say of a token id that the model has no embedding for."""


class TokenIds(Content):
    """Lists of token ids; a column that tells padding is read beside them."""

    kinds = frozenset({ColumnKind.IDS})
    rows_at_once = 1024

    def __init__(self, name: str, pad_token_id: int | None) -> None:
        super().__init__(name)
        self._pad_token_id = pad_token_id

    def _beside(self, file: DataFile, path: FieldPath) -> Mapping[str, FieldPath]:
        """The columns that qualify this one, of the same table or struct.

        What else is called `labels` or so, such as a class a row, is another thing and passed over.
        """
        found = {}
        for qualifier in QUALIFIERS:
            beside = (*path[:-1], qualifier.column)
            if not has_path(file.schema, beside):
                continue
            kind = type_at(file.schema, beside)
            if qualifier.fits(kind):
                found[qualifier.column] = beside
            elif qualifier.column == ATTENTION_MASK:
                raise DatasetError(
                    f"{file}: {qualifier.column} beside {self.name} is {kind}, which does not tell of each token if "
                    "it is padding: give lists of 0 and 1, as long as those of token ids, or leave the column out"
                )
        return found

    def tokens(self, rows: RowBatch, tally: Tally) -> Tokens:
        """As they are, without padding."""
        lengths, ids = flat(rows, rows.columns[0], self.name)
        beside = {name: flat(rows, column, name) for name, column in rows.beside.items()}
        for name, (sizes, _) in beside.items():
            if (sizes != lengths).any():
                place = np.argmax(sizes != lengths)
                raise DatasetError(
                    f"{rows.where(place)}: {name} has {sizes[place]} entries and {self.name} {lengths[place]}"
                )
        real = real_tokens(lengths, ids, {name: values for name, (_, values) in beside.items()}, self._pad_token_id)
        if real is None:
            tally.repeated += int(np.count_nonzero(_repeated(lengths, ids)))
            return lengths, ids
        tally.padding += int(np.count_nonzero(~real))
        owner = np.repeat(np.arange(lengths.size), lengths)
        return np.bincount(owner[real], minlength=lengths.size).astype(np.int64), ids[real]

    def outside(self, index: int, vocab_size: int) -> str:
        """The data are another tokenizer's."""
        return (
            f"token id {index} is outside the model's vocabulary of {vocab_size}; tokenise the data with this model's "
            "tokenizer, or set calibration.column to a column of text"
        )


def flat(rows: RowBatch, array: pa.Array, name: str) -> Tokens:
    """Lengths of lists and what all of them hold; refuses nulls in them."""
    if array.null_count:
        raise DatasetError(f"{rows.where(_first_true(array.is_null()))}: {name} is null")
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)
    values = pc.list_flatten(array)
    if values.null_count:
        place = np.searchsorted(np.cumsum(lengths), _first_true(values.is_null()), side="right")
        raise DatasetError(f"{rows.where(place)}: {name} holds a null")
    return lengths, values.to_numpy(zero_copy_only=False)


def _repeated(lengths: Rows, ids: NDArray[Any], run: int = 8) -> NDArray[np.bool_]:
    """Which rows begin or end with a run of one and the same token."""
    long = lengths > run
    ends = np.cumsum(lengths)[long]
    first, last = (ends - lengths[long])[:, None] + np.arange(run), ends[:, None] - 1 - np.arange(run)
    found = np.zeros(lengths.size, np.bool_)
    runs = [ids[places] for places in (first, last)]
    found[long] = np.logical_or.reduce([(part == part[:, :1]).all(1) for part in runs])
    return found


class Texts(Content):
    """A column of text.

    Args:
        name: of the column.
        tokenizer: the model's.
        add_special_tokens: whether the tokenizer puts its own before and behind each text.
        end: id that ends every text, where texts are packed; None for none.
    """

    kinds = frozenset({ColumnKind.TEXT})
    rows_at_once = 32  # texts may be whole books

    def __init__(self, *names: str, tokenizer: TextTokenizer, add_special_tokens: bool, end: int | None) -> None:
        super().__init__(*names)
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens
        self._end = end

    def texts(self, rows: RowBatch) -> Sequence[str]:
        """What is tokenised of each row."""
        return rows.columns[0].to_pylist()  # type: ignore[no-any-return]  # pyarrow is untyped

    def tokens(self, rows: RowBatch, tally: Tally) -> Tokens:
        """As the tokenizer gives them, and an end where texts are packed."""
        pieces = self._tokenizer.encode(self.texts(rows), add_special_tokens=self._add_special_tokens)
        first = self._tokenizer.added_first
        if self._add_special_tokens and first is not None:
            doubled = sum(1 for ids in pieces if ids.size > 1 and ids[0] == ids[1] == first)
            if doubled:
                tally.double_bos += doubled
                tally.bos = self._tokenizer.token(first)
        if self._end is not None:
            pieces = [np.append(ids, self._end) if ids.size and ids[-1] != self._end else ids for ids in pieces]
        return np.asarray([ids.size for ids in pieces], np.int64), np.concatenate(pieces)

    def outside(self, index: int, vocab_size: int) -> str:
        """The model's own tokenizer knows more tokens than the model."""
        return (
            f"the model's tokenizer.json gives token {index} ({self._tokenizer.token(index)!r}), and the model has "
            f"embeddings for {vocab_size} tokens: use the tokenizer.json that the model was trained with, or a model "
            "whose embeddings were resized when the token was added"
        )


class Pairs(Texts):
    """A question and its answer in two columns, one text behind the other."""

    def texts(self, rows: RowBatch) -> Sequence[str]:
        """With a line's end between them, unless white space stands there."""
        asked, answered = (column.to_pylist() for column in rows.columns)
        return [
            a + ("" if a[-1:].isspace() or b[:1].isspace() else "\n") + b for a, b in zip(asked, answered, strict=True)
        ]


class Chats(Texts):
    """Chats, rendered by the model's template, which writes the special tokens itself: none is added.

    Args:
        names: a column of messages, or two of a question and its answer.
        template: the model's.
        tokenizer: the model's.
    """

    kinds = frozenset({ColumnKind.CHAT, ColumnKind.TEXT})

    def __init__(self, *names: str, template: ChatTemplate, tokenizer: TextTokenizer) -> None:
        super().__init__(*names, tokenizer=tokenizer, add_special_tokens=False, end=None)
        self._template = template

    def empty(self, rows: RowBatch) -> NDArray[np.bool_]:
        """Which rows hold no message."""
        null = super().empty(rows)
        if len(rows.columns) > 1 or null.all():
            return null
        values = rows.columns[0].to_pylist()
        return null | np.asarray([value in (None, [], "", "[]") for value in values], np.bool_)

    def texts(self, rows: RowBatch) -> Sequence[str]:
        """Rendered chats."""
        values = list(zip(*(column.to_pylist() for column in rows.columns), strict=True))
        return [self._text(rows, place, value) for place, value in enumerate(values)]

    def _text(self, rows: RowBatch, place: int, value: tuple[Any, ...]) -> str:
        try:
            if len(value) == 1:
                return self._template.render(messages_of(value[0]))
            asked, answered = value
            return self._template.render(
                [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            )
        except ValueError as error:
            raise DatasetError(
                f"{rows.where(place)}: {self.name}: {error}; mend or remove the row, or give data that are rendered "
                "already, with calibration.add_special_tokens: false"
            ) from None


def _first_true(flags: pa.Array) -> int:
    return int(np.argmax(flags.to_numpy(zero_copy_only=False)))
