"""What is noticed of the rows while they are read, and what a user should be told of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gs_dist.wording import counted

__all__ = ["Tally"]


@dataclass
class Tally:
    """Counts over the rows that samples are made of.

    Attributes:
        rows: rows that were taken.
        null_rows: rows that hold nothing, and were passed over.
        padding: tokens left out because a column beside them says that they are padding.
        repeated: rows whose first or last tokens are one and the same, with no column that says what they are.
        double_bos: texts that begin with the token that is put before them.
        bos: that token.
    """

    rows: int = 0
    null_rows: int = 0
    padding: int = 0
    repeated: int = 0
    double_bos: int = 0
    bos: str = ""

    def notes(self, column: str) -> Iterator[str]:
        """Sentences about what was noticed.

        Args:
            column: the one that was read.
        """
        if self.null_rows:
            yield (
                f"{counted(self.null_rows, 'row')} in which {column} is null or empty passed over "
                "(calibration.strict: true refuses them)"
            )
        if self.padding:
            yield f"{counted(self.padding, 'token')} of padding left out of {column}"
        if 4 * self.repeated > self.rows:
            yield (
                f"{self.repeated} of {counted(self.rows, 'row')} of {column} begin or end with eight equal tokens, and "
                "all of them count: if that is padding, give an attention_mask beside it"
            )
        if self.double_bos:
            yield (
                f"{self.bos} stands before {counted(self.double_bos, 'text')} in column {column} already, and is put "
                "there once more: set calibration.add_special_tokens: false"
            )
