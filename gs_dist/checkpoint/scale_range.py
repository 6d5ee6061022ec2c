"""Whether scales survive the dtype that a model is served in: engines cast them to it as they load."""

from __future__ import annotations

import numpy as np

from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import Layout

__all__ = ["check_scale_range"]

_UNDERFLOW = 2.0**-25  # float16 rounds this and what is below it to 0
_OVERFLOW = 65520.0  # and this and what is above it to infinity
_KEPT_AS_IT_IS = "deq_scale"  # float32, or its bits, whatever is served


def check_scale_range(inventory: Inventory, layout: Layout, sound: set[str]) -> None:
    """Reports scales that float16 cannot hold where that is what config.json says, and tells of them elsewhere.

    bfloat16 reaches as far as float32, so that nothing is lost in it.
    """
    lost, smallest, largest = [], np.inf, 0.0
    for name, expected in layout.tensors.items():
        if name not in sound or expected.values != "scale" or name.endswith(_KEPT_AS_IT_IS):
            continue
        scales = inventory.read(name).astype(np.float32)
        low, high = float(scales.min(initial=np.inf)), float(scales.max(initial=0.0))
        if low <= _UNDERFLOW or high >= _OVERFLOW:
            lost.append(name)
            smallest, largest = min(smallest, low), max(largest, high)
    if not lost:
        return
    found = f"{smallest:.4g}, which float16 makes 0" if smallest <= _UNDERFLOW else f"{largest:.4g}, beyond float16"
    if inventory.architecture is not None and inventory.architecture.dtype == "float16":
        expected_text = "scales that the dtype of config.json holds; quantise with serving_dtype: bfloat16"
        for name in lost:
            inventory.report_tensor(name, "scale-dtype", found, expected_text)
        return
    count = f"{len(lost)} tensors hold scales" if len(lost) > 1 else f"{lost[0]} holds scales"
    inventory.note(
        "scale-dtype",
        f"{count} down to {found}: serve with --dtype bfloat16, or quantise with serving_dtype: float16"
        if smallest <= _UNDERFLOW
        else f"{count} up to {found}: serve with --dtype bfloat16",
    )
