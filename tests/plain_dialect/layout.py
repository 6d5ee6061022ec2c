"""What a directory of the plain dialect must hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import DialectLayout, Expectation, Layout, Leaves, all_linears
from gs_dist.model.decoder import DecoderArchitecture


class PlainLayout:
    def quantized(self, inventory: Inventory, layout: Layout, architecture: DecoderArchitecture) -> dict[str, Leaves]:
        named = inventory.descriptions["plain_description.json"].get("linears", [])
        found = {}
        for name, linear in all_linears(architecture):
            layout.kinds[name] = "W8A16" if name in named else "FLOAT"
            if name in named:
                rows, columns = linear.out_features, linear.in_features
                found[name] = {
                    "weight": Expectation(dtypes=("int8",), shape=(rows, columns)),
                    "weight_scale": Expectation(dtypes=("float32",), shape=(rows,), values="scale"),
                    "weight_rows": Expectation(dtypes=(), shape=(rows,)),
                }
        return found

    def check_relations(self, inventory: Inventory, layout: Layout, sound: set[str]) -> None:
        pass

    def dequantized(self, inventory: Inventory, name: str, kind: str) -> npt.NDArray[np.float32]:
        codes = inventory.read(f"{name}.weight").astype(np.float32)
        return codes * inventory.read(f"{name}.weight_scale")[:, None]


LAYOUT: DialectLayout = PlainLayout()
