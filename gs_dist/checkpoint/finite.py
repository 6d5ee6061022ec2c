"""Values that are not finite, found in tensors of any float dtype without holding a wide copy of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.errors import CheckpointError
from gs_dist.model.dtypes import BFLOAT16

__all__ = ["beyond_float16", "not_finite", "refuse_not_finite"]

Array = npt.NDArray[Any]

_FLOAT16_OVERFLOW = 65520.0  # what rounds past float16's largest number, 65504
_VALUES = 1 << 22  # looked at together


def not_finite(block: Array) -> npt.NDArray[np.bool_]:
    """Where a block holds NaN or an infinity."""
    if block.dtype == BFLOAT16:  # all exponent bits set; much faster than going through float32
        return np.asarray(block.view(np.uint16) & 0x7F80 == 0x7F80)
    return np.asarray(~np.isfinite(block))


def beyond_float16(block: Array) -> npt.NDArray[np.bool_]:
    """Where a block holds what float16 would make an infinity, or NaN."""
    return np.asarray(~(np.abs(block.astype(np.float32)) < _FLOAT16_OVERFLOW))


def refuse_not_finite(
    tensors: Mapping[str, Array], *, files: Mapping[str, str], names: Iterable[str], dtype: str = ""
) -> None:
    """Refuses tensors that hold NaN or an infinity, by name and place.

    Args:
        tensors: name to array, mapped from its file.
        files: name to the file that holds it.
        names: which ones to look at.
        dtype: that they are served in; "float16" holds less than the others.

    Raises:
        CheckpointError: a value is not finite, or would not be when it is served.
    """
    for name in names:
        flat = tensors[name].reshape(-1)
        for start in range(0, flat.size, _VALUES):
            block = flat[start : start + _VALUES]
            damaged = not_finite(block)
            lost = beyond_float16(block) if dtype == "float16" and block.dtype != np.float16 else damaged
            if not lost.any():
                continue
            first = int(np.argmax(damaged if damaged.any() else lost))
            place = tuple(int(i) for i in np.unravel_index(start + first, tensors[name].shape))
            found = f"{files[name]}: tensor {name!r:.200} holds {block[first]} at {place}"
            if damaged.any():
                raise CheckpointError(f"{found}: the checkpoint is damaged; download the file again, or mend the value")
            raise CheckpointError(f"{found}, which float16 cannot: set serving_dtype: bfloat16")
