"""Whether scales survive the dtype that a model is served in: engines cast them to it as they load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import Layout

__all__ = ["check_scale_range"]

_CLOSE = 2.0**-8  # what bfloat16 itself rounds a scale by; below its normal numbers float16 has fewer digits than that
_KEPT_AS_IT_IS = "deq_scale"  # float32, or its bits, whatever is served
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class _Loss:
    """The scale of a tensor that float16 holds worst, and what becomes of it."""

    tensor: str
    scale: float
    becomes: str

    @property
    def found(self) -> str:
        return f"{self.scale:.4g}, {self.becomes}"


def check_scale_range(inventory: Inventory, layout: Layout, sound: set[str]) -> None:
    """Reports scales that float16 cannot hold where that is what config.json says, and tells of them elsewhere.

    bfloat16 reaches as far as float32, so that nothing is lost in it. Of a static input vLLM-Ascend takes the
    reciprocal, in the served dtype (`w8a8_static.py`, aclnn_input_scale_reciprocal).
    """
    losses = []
    for name, expected in layout.tensors.items():
        if name not in sound or expected.values != "scale" or name.endswith(_KEPT_AS_IT_IS):
            continue
        inverted = layout.dialect == "ascend" and name.endswith(".input_scale")
        losses += _loss(name, inventory.read(name).astype(np.float32).reshape(-1), inverted=inverted)
    if not losses:
        return
    if inventory.architecture is not None and inventory.architecture.dtype == "float16":
        expected_text = "scales that the dtype of config.json holds; quantise with serving_dtype: bfloat16"
        for loss in losses:
            inventory.report_tensor(loss.tensor, "scale-dtype", loss.found, expected_text)
        return
    worst = max(losses, key=lambda loss: abs(np.log(loss.scale)))
    count = f"{len(losses)} tensors hold scales" if len(losses) > 1 else f"{losses[0].tensor} holds scales"
    small = worst.scale < 1
    cure = ", or quantise with serving_dtype: float16" if small else ""
    way = "down to" if small else "up to"
    inventory.note("scale-dtype", f"{count} {way} {worst.found}: serve with --dtype bfloat16{cure}")


def _loss(name: str, scales: npt.NDArray[np.float32], *, inverted: bool) -> list[_Loss]:
    """None, or the one of a tensor; only positive and finite scales come here."""
    with np.errstate(over="ignore"):
        halved = scales.astype(np.float16).astype(np.float32)
    off = np.abs(halved / scales - 1)
    worst = int(np.argmax(np.where(np.isfinite(off), off, np.inf))) if off.size else -1
    if worst >= 0 and not off[worst] <= _CLOSE:
        becomes = "beyond float16" if np.isinf(halved[worst]) else f"which float16 makes {halved[worst]:.4g}"
        return [_Loss(name, float(scales[worst]), becomes)]
    if inverted and scales.size and 1 / float(scales.min()) > _LARGEST:
        return [_Loss(name, float(scales.min()), "whose reciprocal, by which inputs are multiplied, is beyond float16")]
    return []
