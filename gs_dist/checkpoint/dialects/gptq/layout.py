"""What a GPTQ directory must hold.

Sources: vLLM `layers/quantization/auto_gptq.py` (create_weights) and `utils/gptq_utils.py` (dynamic); AutoGPTQ
`nn_modules/qlinear/qlinear_cuda.py` (forward).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory
from gs_dist.checkpoint.layout import DialectLayout, Expectation, Layout, Leaves, all_linears, with_single
from gs_dist.checkpoint.name_patterns import NamePatterns
from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture, Linear

__all__ = ["LAYOUT", "GPTQLayout"]

_LEFT_OUT = "-:"  # by which `dynamic` tells patterns of linears that stay from overrides


class GPTQLayout:
    """Rules on a directory by its quantization_config."""

    def quantized(self, inventory: Inventory, layout: Layout, architecture: DecoderArchitecture) -> dict[str, Leaves]:
        """See `DialectLayout.quantized`."""
        form = _form(inventory)
        floats = _left_out(inventory)
        quantized = {}
        for name, linear in all_linears(architecture):
            layout.kinds[name] = "FLOAT"
            if floats.match(name) or form is None:
                continue
            bits, size = form
            if (size > 0 and linear.in_features % size) or linear.in_features % (32 // bits):
                inventory.report(CONFIG_FILE, "group-size", f"group_size {size}", _divisor(linear, bits), name)
                continue
            layout.kinds[name] = f"W{bits}A16"
            quantized[name] = _leaves(linear, bits, size, architecture.dtype)
        return quantized

    def check_relations(self, inventory: Inventory, layout: Layout, sound: set[str]) -> None:
        """Zero points are the middle of the range, less the 1 that readers add; groups follow from desc_act."""
        config = inventory.quantization_config
        ordered, size = bool(config.get("desc_act")), config.get("group_size")
        for name, kind in layout.kinds.items():
            zeros, index = f"{name}.qzeros", f"{name}.g_idx"
            if kind == "FLOAT" or not sound.issuperset((zeros, index)):
                continue
            middle = (1 << (int(kind[1]) - 1)) - 1
            found = np.unique(_unpacked(inventory.read(zeros).T, int(kind[1])))
            if found.tolist() != [middle]:
                inventory.report_tensor(zeros, "offset-zero", f"{found[0]} to {found[-1]}", f"{middle}: sym is true")
            groups = inventory.read(index)
            natural = np.arange(len(groups)) // (size if isinstance(size, int) and size > 0 else len(groups))
            if not ordered and not np.array_equal(groups, natural):
                inventory.report_tensor(index, "group-index", "groups out of order", "neighbours: desc_act is false")

    def dequantized(self, inventory: Inventory, name: str, kind: str) -> npt.NDArray[np.float32]:
        """See `DialectLayout.dequantized`."""
        bits = int(kind[1])
        codes = _unpacked(inventory.read(f"{name}.qweight"), bits).astype(np.float32)
        zeros = _unpacked(inventory.read(f"{name}.qzeros").T, bits).T.astype(np.float32) + 1
        scales = inventory.read(f"{name}.scales").astype(np.float32)
        groups = inventory.read(f"{name}.g_idx")
        return np.ascontiguousarray(((codes - zeros[groups]) * scales[groups]).T, dtype=np.float32)


LAYOUT: DialectLayout = GPTQLayout()


def _form(inventory: Inventory) -> tuple[int, int] | None:
    """Bits and group size (-1 a channel); None, and a report, where they are others than the layout has."""
    config = inventory.quantization_config
    bits, size = config.get("bits"), config.get("group_size")
    faults = {
        "bits": type(bits) is int and bits in (4, 8),
        "group_size": type(size) is int and (size == -1 or size > 0),
        "sym": config.get("sym") is True,
        "desc_act": isinstance(config.get("desc_act"), bool),
        "checkpoint_format": config.get("checkpoint_format", "gptq") == "gptq",
        "lm_head": config.get("lm_head", False) is False,  # else a loader looks for a quantised head
    }
    for key, right in faults.items():
        if not right:
            expected = "symmetric weights of 4 or 8 bits, group_size -1 or above 0, desc_act a boolean; a float head"
            inventory.report(CONFIG_FILE, "scheme", f"{key} {config.get(key)!r:.60}", expected)
    return (bits, size) if type(bits) is int and type(size) is int and all(faults.values()) else None


def _left_out(inventory: Inventory) -> NamePatterns:
    dynamic = inventory.quantization_config.get("dynamic") or {}
    keys = [str(key) for key in dynamic] if isinstance(dynamic, Mapping) else []
    if not isinstance(dynamic, Mapping) or not all(key.startswith(_LEFT_OUT) for key in keys):
        inventory.report(CONFIG_FILE, "scheme", f"dynamic {dynamic!r:.100}", f"patterns behind {_LEFT_OUT} alone")
        keys = [key for key in keys if key.startswith(_LEFT_OUT)]
    try:
        return NamePatterns([f"re:{key.removeprefix(_LEFT_OUT)}" for key in keys])
    except CheckpointError as error:
        inventory.report(CONFIG_FILE, "scheme", f"dynamic: {error}", "patterns")
        return NamePatterns(())


def _divisor(linear: Linear, bits: int) -> str:
    return f"a divisor of {linear.in_features}, and input channels in whole words of {32 // bits}"


def _leaves(linear: Linear, bits: int, size: int, dtype: str) -> Leaves:
    rows, columns, a_word = linear.out_features, linear.in_features, 32 // bits
    groups = columns // size if size > 0 else 1
    return {
        "weight_rows": Expectation(dtypes=(), shape=(rows,)),
        "qweight": Expectation(dtypes=("int32",), shape=(columns // a_word, rows)),
        "qzeros": Expectation(dtypes=("int32",), shape=(groups, rows // a_word)),
        "scales": Expectation(dtypes=with_single(dtype), shape=(groups, rows), values="scale"),
        "g_idx": Expectation(dtypes=("int32",), shape=(columns,), values="group-index", limit=groups),
    }


def _unpacked(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.int64]:
    """Unsigned values down the first axis of int32 words (n, m), the first in the lowest bits: (n * 32 / bits, m)."""
    wide = np.ascontiguousarray(words).view(np.uint32).astype(np.int64)
    values = np.stack([(wide >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)], axis=1)
    return np.asarray(values.reshape(-1, words.shape[1]))
