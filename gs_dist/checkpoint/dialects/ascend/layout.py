"""What an ascend directory must hold.

Sources: vllm_ascend/quantization/methods/w8a8_static.py, w8a8_dynamic.py, w8a16.py, w4a8.py; kv_c8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.described_layout import check_scale_biases
from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import (
    FLOAT_NAMES,
    STATIC_KINDS,
    DialectLayout,
    Expectation,
    Layout,
    Leaves,
    described_linears,
    with_single,
)
from gs_dist.checkpoint.values import check_static_linears
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["LAYOUT", "AscendLayout"]

_DESCRIPTION = DIALECTS["ascend"].describing_file
_INT4_EXPERTS = "W4A8_DYNAMIC"
_MIXED = "W8A8_MIX"  # needs the scales of a static linear and of one by token (w8a8_pdmix.py)
_LABELS = ("W8A8", "W8A8_DYNAMIC", _MIXED, "W8A16", _INT4_EXPERTS)
_SHARES = 16  # columns of scale_bias where a rank of tensor parallelism takes its share of the inputs (w4a8.py)


class AscendLayout:
    """Rules on ModelSlim's layout, by the description's labels."""

    def quantized(self, inventory: Inventory, layout: Layout, architecture: DecoderArchitecture) -> dict[str, Leaves]:
        """See `DialectLayout.quantized`."""
        scale_dtypes = with_single(architecture.dtype)
        quantized = {}
        described = described_linears(inventory, layout, architecture, _DESCRIPTION, _LABELS)
        for name, linear in described.items():
            rows, columns = linear.out_features, linear.in_features
            if layout.kinds[name] == _INT4_EXPERTS:
                quantized[name] = _int4_expert(name, rows, columns)
                continue
            static = layout.kinds[name] in STATIC_KINDS
            unread = static and layout.kinds[name] != _MIXED
            leaves = {
                "weight": Expectation(dtypes=("int8",), shape=(rows, columns), values="codes", limit=8),
                "weight_rows": Expectation(dtypes=(), shape=(rows,)),
                "weight_scale": Expectation(dtypes=scale_dtypes, shape=(rows, 1), values="scale", optional=unread),
                "weight_offset": Expectation(dtypes=scale_dtypes, shape=(rows, 1), values="zero", optional=unread),
            }
            if static:
                half = architecture.dtype == "float16"
                leaves["input_scale"] = Expectation(dtypes=scale_dtypes, shape=(1,), values="scale")
                leaves["input_offset"] = Expectation(dtypes=("int8", *scale_dtypes), shape=(1,), values="offset")
                leaves["deq_scale"] = Expectation(
                    dtypes=("int64" if half else "float32",), shape=(rows,), values="bits" if half else "scale"
                )
                leaves["quant_bias"] = Expectation(dtypes=("int32",), shape=(rows,))
            quantized[name] = leaves
        description = inventory.descriptions[_DESCRIPTION]
        _made_biases(layout, description, architecture)
        for layer in range(architecture.num_layers):
            prefix = architecture.layer_prefix(layer) + "self_attn."
            if any(f"{prefix}{projection}.kv_cache_scale" in description for projection in ("k_proj", "v_proj")):
                layout.kv_layers.append(layer)
                for projection in ("k_proj", "v_proj"):
                    for leaf, values in (("scale", "scale"), ("offset", "zero")):
                        layout.tensors[f"{prefix}{projection}.kv_cache_{leaf}"] = Expectation(
                            dtypes=scale_dtypes, shape=(architecture.kv_size,), values=values
                        )
        if layout.kv_layers and description.get("kv_cache_type") != "C8":
            found = f"kv_cache_type {description.get('kv_cache_type')!r:.40}"
            inventory.report(_DESCRIPTION, "description-kv", found, "C8, since there are KV cache scales")
        _check_head(inventory, layout, description)
        return quantized

    def check_relations(self, inventory: Inventory, layout: Layout, sound: set[str]) -> None:
        """See `check_static_linears`; the engine adds quant_bias alone, with the linear's bias in it."""
        check_static_linears(inventory, layout, sound, folds_bias=True)
        check_scale_biases(inventory, layout, sound)

    def dequantized(self, inventory: Inventory, name: str, kind: str) -> npt.NDArray[np.float32]:
        """See `DialectLayout.dequantized`; a static linear has its weight's scale in deq_scale alone."""
        if kind == _INT4_EXPERTS:
            octets = inventory.read(f"{name}.weight")
            paired = np.stack([(octets << 4) >> 4, octets >> 4], axis=1)  # the arithmetic shift extends the sign
            scale = inventory.read(f"{name}.weight_scale")
            return np.asarray(paired.reshape(-1, octets.shape[1]).astype(np.float32) * scale)
        codes = inventory.read(f"{name}.weight").astype(np.float32)
        if kind not in STATIC_KINDS:
            return np.asarray(codes * inventory.read(f"{name}.weight_scale").astype(np.float32))
        scale = inventory.read(f"{name}.deq_scale")
        if scale.dtype == np.int64:
            scale = scale.astype(np.uint32).view(np.float32)
        return np.asarray(codes * (scale / inventory.read(f"{name}.input_scale").astype(np.float32))[:, None])


LAYOUT: DialectLayout = AscendLayout()


def _int4_expert(name: str, rows: int, columns: int) -> Leaves:
    """Two outputs a byte, and what the kernel adds for the lower halves of activations (`w4a8.py`)."""
    shares = _SHARES if name.endswith(("down_proj", "w2")) else 1
    single = ("float32",)
    return {
        "weight": Expectation(dtypes=("int8",), shape=(rows // 2, columns)),
        "weight_rows": Expectation(dtypes=(), shape=(rows,)),
        "weight_scale": Expectation(dtypes=single, shape=(rows, 1), values="scale"),
        "weight_offset": Expectation(dtypes=single, shape=(rows, 1), values="zero"),
        "scale_bias": Expectation(dtypes=single, shape=(rows, shares), values="float"),
    }


def _check_head(inventory: Inventory, layout: Layout, description: Mapping[str, Any]) -> None:
    """What the description says of the model as a whole: msmodelslim's version and the kind of most linears."""
    kinds = sorted(set(layout.kinds.values()))
    stated = description.get("model_quant_type")
    if stated not in kinds:
        inventory.report(
            _DESCRIPTION, "description-kind", f"model_quant_type {stated!r:.40}", f"one of {', '.join(kinds)}"
        )
    written_since = {"group_size", "metadata", "optional"} & set(description)  # msmodelslim 1.0.0 of the description
    if written_since and not isinstance(description.get("version"), str):
        inventory.report(
            _DESCRIPTION, "description-version", f"{description.get('version')!r:.40}", "a version as text"
        )


def _made_biases(layout: Layout, description: Mapping[str, Any], architecture: DecoderArchitecture) -> None:
    """Biases that the source model lacks: of norms (vllm_ascend/ops/layernorm.py), and of static linears."""
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        sizes = dict.fromkeys(architecture.layers[layer].norms, architecture.hidden_size)
        linears = [linear for linear in architecture.linears(layer) if not linear.bias]
        static = [linear for linear in linears if layout.kinds.get(prefix + linear.name) in STATIC_KINDS]
        for name, size in {**sizes, **{linear.name: linear.out_features for linear in static}}.items():
            if f"{prefix}{name}.bias" in description:
                layout.tensors[f"{prefix}{name}.bias"] = Expectation(dtypes=FLOAT_NAMES, shape=(size,), values="float")
