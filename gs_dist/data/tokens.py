"""Text to token ids, by the model's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gs_dist.data.chat import read_tokenizer_config, token_text
from gs_dist.data.files import is_lfs_pointer
from gs_dist.errors import DatasetError

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """The tokenizer of a model; what its file says of padding and truncation is for inference and is not obeyed.

    Args:
        path: tokenizer.json.

    Raises:
        DatasetError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.directory = path.parent
        try:
            with path.open("rb") as file:
                if is_lfs_pointer(file.read(64)):
                    raise DatasetError(
                        f"{path} is a Git LFS pointer and not the tokenizer: run `git lfs pull` in the model directory"
                    )
            self._tokenizer = Tokenizer.from_file(str(path))
        except DatasetError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise DatasetError(f"{path} cannot be read as a tokenizer.json: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        first = self._tokenizer.encode("").ids[:1]
        self.added_first: int | None = first[0] if first else None
        """Id that stands before every text to which special tokens are added, such as BOS; None where none does."""

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[NDArray[np.int64]]:
        """Ids of each text; special tokens that stand in it as text are always taken for themselves."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [np.asarray(text.ids, np.int64) for text in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Id of a token; None where there is no such one."""
        found = self._tokenizer.token_to_id(token) if token else None
        return None if found is None else int(found)

    def token(self, index: int) -> str:
        """The token of an id, for messages."""
        return self._tokenizer.id_to_token(index) or "unknown"

    def special_token_notes(self) -> list[str]:
        """Where tokenizer_config.json says otherwise than tokenizer.json what is put around a text.

        tokenizer.json is followed, as transformers 5 does; transformers 4 rebuilds it after the other file for some
        classes, so that models such as DeepSeek-R1-Distill get a BOS from one version and none from the next.
        """
        stated = read_tokenizer_config(self.directory)
        added = self._tokenizer.encode("").ids
        notes = []
        for name in ("bos_token", "eos_token"):
            wanted, token = stated.get(f"add_{name}"), token_text(stated.get(name))
            index = self._tokenizer.token_to_id(token) if token else None
            if isinstance(wanted, bool) and index is not None and wanted is not (index in added):
                notes.append(
                    f"tokenizer_config.json says add_{name}: {str(wanted).lower()}, and tokenizer.json "
                    f"{'adds no' if wanted else 'adds'} {token}: text is read {'without' if wanted else 'with'} it, as "
                    "transformers 5 reads it (transformers 4 may differ)"
                )
        return notes

    def pad_token_id(self) -> int | None:
        """Id of the `pad_token` that tokenizer_config.json names, None where it names none."""
        named = token_text(read_tokenizer_config(self.directory).get("pad_token"))
        found = self._tokenizer.token_to_id(named) if named else None
        return None if found is None else int(found)
