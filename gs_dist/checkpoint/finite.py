"""Values that are not finite, found in tensors of any float dtype without holding a wide copy of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.errors import CheckpointError
from gs_dist.model.dtypes import BFLOAT16

__all__ = ["not_finite", "refuse_not_finite"]

Array = npt.NDArray[Any]

_VALUES = 1 << 22  # looked at together


def not_finite(block: Array) -> npt.NDArray[np.bool_]:
    """Where a block holds NaN or an infinity."""
    if block.dtype == BFLOAT16:  # all exponent bits set; much faster than going through float32
        return np.asarray(block.view(np.uint16) & 0x7F80 == 0x7F80)
    return np.asarray(~np.isfinite(block))


def refuse_not_finite(tensors: Mapping[str, Array], *, files: Mapping[str, str], names: Iterable[str]) -> None:
    """Refuses tensors that hold NaN or an infinity, by name and place.

    Args:
        tensors: name to array, mapped from its file.
        files: name to the file that holds it.
        names: which ones to look at.

    Raises:
        CheckpointError: a value is not finite.
    """
    for name in names:
        flat = tensors[name].reshape(-1)
        for start in range(0, flat.size, _VALUES):
            block = flat[start : start + _VALUES]
            bad = not_finite(block)
            if bad.any():
                first = int(np.argmax(bad))
                place = tuple(int(i) for i in np.unravel_index(start + first, tensors[name].shape))
                raise CheckpointError(
                    f"{files[name]}: tensor {name!r:.200} holds {block[first]} at {place}: the checkpoint is damaged; "
                    "download the file again, or mend the value"
                )
