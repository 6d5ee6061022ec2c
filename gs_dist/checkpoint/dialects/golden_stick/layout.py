"""What a golden-stick directory must hold.

Sources: golden-stick 1.4.1 `save_quantized(backend=ASCEND)`; vllm_mindspore golden_stick/a8w8.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import DialectLayout, Expectation, Layout, Leaves, described_linears, with_single
from gs_dist.checkpoint.values import check_static_linears
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["LAYOUT", "GoldenStickLayout"]

_DESCRIPTION = DIALECTS["golden-stick"].describing_file
_LABELS = ("W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16")


class GoldenStickLayout:
    """Rules on Golden Stick's layout, by the description's labels."""

    def quantized(self, inventory: Inventory, layout: Layout, architecture: DecoderArchitecture) -> dict[str, Leaves]:
        """See `DialectLayout.quantized`."""
        scale_dtypes = with_single(architecture.dtype)
        quantized = {}
        for name, linear in described_linears(inventory, layout, architecture, _DESCRIPTION, _LABELS).items():
            rows, columns = linear.out_features, linear.in_features
            packed = layout.kinds[name] == "W4A16"
            stored = inventory.tensors.get(name + ".weight_scale")
            groups = stored.shape[0] if packed and stored and len(stored.shape) == 2 else 1
            if columns % groups:
                inventory.report_tensor(
                    name + ".weight_scale", "group-size", f"{groups} groups", f"a divisor of {columns}"
                )
            scales = (groups, rows) if groups > 1 else (rows,)
            leaves = {
                "weight": Expectation(dtypes=("int8",), shape=(columns, rows // 2))
                if packed
                else Expectation(dtypes=("int8",), shape=(rows, columns), values="codes", limit=8),
                "weight_rows": Expectation(dtypes=(), shape=(rows,)),
                "weight_scale": Expectation(dtypes=scale_dtypes, shape=scales, values="scale"),
                "weight_offset": Expectation(dtypes=("int32",), shape=scales, values="zero"),
            }
            if layout.kinds[name] == "W8A8":
                leaves["deq_scale"] = Expectation(dtypes=("float32",), shape=(rows,), values="scale")
                leaves["quant_bias"] = Expectation(dtypes=("int32",), shape=(rows,))
                leaves["input_scale"] = Expectation(dtypes=scale_dtypes, shape=(columns,), values="scale")
                leaves["input_offset"] = Expectation(dtypes=("int8",), shape=(columns,), values="offset")
            quantized[name] = leaves
        return quantized

    def check_relations(self, inventory: Inventory, layout: Layout, sound: set[str]) -> None:
        """See `check_static_linears`; the reader adds a linear's bias beside quant_bias."""
        check_static_linears(inventory, layout, sound, folds_bias=False)

    def dequantized(self, inventory: Inventory, name: str, kind: str) -> npt.NDArray[np.float32]:
        """See `DialectLayout.dequantized`. A byte of int4 holds two output channels, the even one in its low half."""
        stored = inventory.read(f"{name}.weight")
        if kind == "W8A8":  # a static linear has its weight's scale in deq_scale alone, by channel of the input
            scale = inventory.read(f"{name}.deq_scale")[:, None] / inventory.read(f"{name}.input_scale").astype(
                np.float32
            )
            return np.asarray(stored.astype(np.float32) * scale)
        scale = inventory.read(f"{name}.weight_scale").astype(np.float32)
        if kind != "W4A16":
            return np.asarray(stored.astype(np.float32) * scale[:, None])
        halves = np.stack([stored.view(np.uint8) & 15, stored.view(np.uint8) >> 4], axis=2)  # (in, pairs, 2)
        codes = halves.reshape(len(stored), -1).astype(np.float32)
        codes = np.where(codes > 7, codes - 16, codes)
        steps = scale if scale.ndim == 2 else scale[None, :]
        return np.asarray((codes * np.repeat(steps, len(codes) // len(steps), axis=0)).T)


LAYOUT: DialectLayout = GoldenStickLayout()
