"""Columns that qualify token ids: which tokens are padding and therefore no tokens at all.

An `attention_mask` tells it. Without one, what is masked for another reason tells only where padding may be: labels of
-100 and a loss_mask of 0 (completion_mask and assistant_masks, as TRL writes them) stand over prompts too, which the
model sees and which count, and special_tokens_mask over BOS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gs_dist.data.rows import Rows

__all__ = ["ATTENTION_MASK", "QUALIFIERS", "Qualifier", "real_tokens"]

ATTENTION_MASK = "attention_mask"

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Qualifier:
    """A column of one number a token.

    Attributes:
        column: its name.
        masked: which tokens its values mask.
    """

    column: str
    masked: Callable[[NDArray[Any]], Flags]

    @staticmethod
    def fits(kind: pa.DataType) -> bool:
        """Whether a column's type is a list of numbers or flags."""
        value = getattr(kind, "value_type", None)
        if value is None or pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            return False
        return bool(pa.types.is_integer(value) or pa.types.is_boolean(value) or pa.types.is_floating(value))


def _is_zero(values: NDArray[Any]) -> Flags:
    return np.equal(values.astype(np.float64), 0)


def _is_special(values: NDArray[Any]) -> Flags:
    return np.not_equal(values.astype(np.float64), 0)


def _is_ignored(values: NDArray[Any]) -> Flags:
    return np.equal(values.astype(np.int64), -100)  # the index that PyTorch's cross entropy ignores


QUALIFIERS = (
    Qualifier(ATTENTION_MASK, _is_zero),
    Qualifier("labels", _is_ignored),
    Qualifier("loss_mask", _is_zero),
    Qualifier("completion_mask", _is_zero),
    Qualifier("assistant_masks", _is_zero),
    Qualifier("special_tokens_mask", _is_special),
)


def real_tokens(
    lengths: Rows, ids: NDArray[Any], beside: Mapping[str, NDArray[Any]], pad_token_id: int | None
) -> Flags | None:
    """Which tokens are real, over all rows one after the other.

    Where there is no attention_mask, padding is what a row begins or ends with if it is masked and one and the same
    token: the model's padding token, or any that stands there twice or more often.

    Args:
        lengths: tokens of each row.
        ids: of all rows.
        beside: values of the columns of `QUALIFIERS` that there are, as long as `ids`.
        pad_token_id: of the model; None where it has none.

    Returns:
        None where no column tells.
    """
    if not beside:
        return None
    if ATTENTION_MASK in beside:
        return ~_is_zero(beside[ATTENTION_MASK])
    masked = np.zeros(ids.size, np.bool_)
    for qualifier in QUALIFIERS:
        if qualifier.column in beside:
            masked |= qualifier.masked(beside[qualifier.column])
    real = np.ones(ids.size, np.bool_)
    start = 0
    for length in lengths.tolist():
        row, flags = ids[start : start + length], masked[start : start + length]
        before, behind = _run(row, flags, pad_token_id), _run(row[::-1], flags[::-1], pad_token_id)
        real[start : start + before] = False
        real[start + length - behind : start + length] = False
        start += length
    return real


def _run(row: NDArray[Any], masked: Flags, pad_token_id: int | None) -> int:
    """Tokens of padding at the beginning of a row."""
    if row.size == 0 or not masked[0]:
        return 0
    same = masked & (row == row[0])
    count = row.size if same.all() else int(np.argmin(same))
    return count if count > 1 or row[0] == pad_token_id else 0
