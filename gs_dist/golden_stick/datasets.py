"""`mindspore_gs.datasets.get_datasets`: calibration samples from the files that Golden Stick's scripts name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.errors import DatasetError
from gs_dist.golden_stick.absent import missing_names

__all__ = ["get_datasets"]

_INSTEAD = (
    "gs_dist measures perplexity and multiple-choice accuracy of what it publishes with `gs-dist evaluate`, and "
    "calibrates on rows of any kind: give apply a list of {'input_ids': array}"
)
__getattr__ = missing_names(
    __name__,
    {f"create_{name}_dataset": _INSTEAD for name in ("wikitext", "squad", "boolq", "ceval", "gsm8k", "calibrate")},
)


def _question(row: dict[str, Any]) -> str:
    return f"{row['passage']}\n{row['question']}"


# Kind to what of a row is the text; None where a line is.
_KINDS: dict[str, Callable[[dict[str, Any]], str] | None] = {
    "boolq": _question,
    "calibrate": lambda row: str(row["prompt"]),
    "gsm8k": lambda row: str(row["question"]),
    "wikitext2": None,
}


def get_datasets(
    ds_type: str,
    ds_path: str,
    mode: str,
    batch_size: int,
    seq_length: int,
    max_new_tokens: int,
    tokenizer: Any,
    ignore_token_id: int | None = None,
    repeat: int = 1,
    need_pad: bool = False,
    n_samples: int = -1,
    add_special_tokens: bool = True,
) -> list[dict[str, npt.NDArray[np.int32]]]:
    """Samples of a file for `PTQ.apply`, in order, one row each.

    Args:
        ds_type: what the file holds. JSON lines: `boolq` (passage and question), `calibrate` (prompt), `gsm8k`
            (question); text, a sample a line: `wikitext2`.
        ds_path: the file.
        tokenizer: of transformers or of tokenizers.
        seq_length: tokens at most of a sample; the rest is cut off.
        n_samples: how many at most; all where it is not positive.
        add_special_tokens: whether the tokenizer adds them.
        mode: taken, like all that follow, and not needed: there is one part of the data.
        batch_size: statistics of a sample do not depend on the samples it is run with.
        max_new_tokens: nothing is generated.
        ignore_token_id: there are no labels.
        repeat: no sample is taken twice.
        need_pad: none is padded.

    Returns:
        One `{"input_ids": int32 (1, tokens)}` a sample.

    Raises:
        DatasetError: no such file or kind, a row without the text, or no sample at all.
    """
    kind = ds_type.lower()
    if kind not in _KINDS:
        raise DatasetError(
            f"dataset type {ds_type!r} is not read here: write one of {', '.join(_KINDS)}, or give apply a list of "
            "{'input_ids': array}"
        )
    rows = []
    for text in _texts(Path(ds_path), kind):
        ids = _ids(tokenizer, text, add_special_tokens=add_special_tokens)[:seq_length]
        if ids:
            rows.append({"input_ids": np.array([ids], np.int32)})
        if len(rows) == n_samples:
            break
    if not rows:
        raise DatasetError(f"{ds_path}: holds no text to calibrate on")
    return rows


def _texts(path: Path, kind: str) -> Iterator[str]:
    text_of, number = _KINDS[kind], 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    yield line.strip() if text_of is None else text_of(json.loads(line))
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be read ({error.strerror}): give the file of dataset type {kind}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{path}, line {number}: is not a row of dataset type {kind} ({type(error).__name__}: {error})"
        ) from error


def _ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    encoded = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return list(getattr(encoded, "ids", encoded))
