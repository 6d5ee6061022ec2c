"""What a golden-stick directory must hold.

Sources: golden-stick 1.4.1 `save_quantized(backend=ASCEND)`; vllm_mindspore golden_stick/a8w8.py.
"""

from __future__ import annotations

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

    def quantised(self, inventory: Inventory, layout: Layout, architecture: DecoderArchitecture) -> dict[str, Leaves]:
        """See `DialectLayout.quantised`."""
        scale_dtypes = with_single(architecture.dtype)
        quantised = {}
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
                "weight": Expectation(dtypes=("int8",), shape=(columns, rows // 2) if packed else (rows, columns)),
                "weight_rows": Expectation(dtypes=(), shape=(rows,)),
                "weight_scale": Expectation(dtypes=scale_dtypes, shape=scales, values="scale"),
                "weight_offset": Expectation(dtypes=("int32",), shape=scales, values="zero"),
            }
            if layout.kinds[name] == "W8A8":
                leaves["deq_scale"] = Expectation(dtypes=("float32",), shape=(rows,), values="scale")
                leaves["quant_bias"] = Expectation(dtypes=("int32",), shape=(rows,))
                leaves["input_scale"] = Expectation(dtypes=scale_dtypes, shape=(columns,), values="scale")
                leaves["input_offset"] = Expectation(dtypes=("int8",), shape=(columns,), values="offset")
            quantised[name] = leaves
        return quantised

    def check_relations(self, inventory: Inventory, layout: Layout, sound: set[str]) -> None:
        """See `check_static_linears`; the reader adds a linear's bias beside quant_bias."""
        check_static_linears(inventory, layout, sound, folds_bias=False)


LAYOUT: DialectLayout = GoldenStickLayout()
