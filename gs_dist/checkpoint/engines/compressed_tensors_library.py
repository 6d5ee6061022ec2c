"""The compressed-tensors library, through which transformers and vLLM read a directory: what it demands.

Sources: `quantization/quant_config.py`, `quant_args.py`, `quant_scheme.py` (keys of quantization_config, unknown ones
are refused).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gs_dist.checkpoint.dialects.compressed_tensors.layout import scheme_groups
from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory
from gs_dist.checkpoint.layout import Layout

__all__ = ["check_library", "is_symmetric"]

_FORMATS = (
    *("dense", "mixed-precision", "int-quantized", "pack-quantized", "naive-quantized", "float-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
_STATUSES = ("compressed", "frozen")
_ARGS = {
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
}
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block", "token")


def check_library(inventory: Inventory, layout: Layout) -> bool:
    """`quant_config.py`: method, status, formats and arguments that the library knows. False for another dialect."""
    if layout.dialect != "compressed-tensors":
        inventory.report(CONFIG_FILE, "engine-format", f"{layout.dialect} checkpoint", "compressed-tensors")
        return False
    config = inventory.quantization_config
    if config.get("format") not in _FORMATS:
        inventory.report(CONFIG_FILE, "scheme", f"format {config.get('format')!r:.60}", f"one of {', '.join(_FORMATS)}")
    if config.get("quantization_status") not in _STATUSES:
        found = f"quantization_status {config.get('quantization_status')!r:.60}"
        inventory.report(CONFIG_FILE, "status", found, "compressed: weights would be quantised once more otherwise")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not (groups or config.get("kv_cache_scheme")):
        inventory.report(CONFIG_FILE, "config-groups", f"{groups!r:.60}", "at least one group of linears")
    for group in scheme_groups(inventory):
        _check_args(inventory, f"{group.label}.weights", group.weights)
        _check_args(inventory, f"{group.label}.input_activations", group.inputs or {})
    return True


def _check_args(inventory: Inventory, where: str, args: Mapping[str, Any]) -> None:
    unknown = sorted(set(args) - _ARGS)
    if unknown:
        expected = "arguments that the library knows; it refuses others (quant_args.py)"
        inventory.report(CONFIG_FILE, "scheme", f"{where}.{unknown[0]}", expected)
    if args and args.get("strategy") not in _STRATEGIES:
        expected = f"one of {', '.join(_STRATEGIES)}"
        inventory.report(CONFIG_FILE, "scheme", f"{where}.strategy {args.get('strategy')!r:.60}", expected)
    order = args.get("actorder")
    if order is True or str(order).lower() in ("group", "dynamic"):
        expected = (
            "weight, or none: compressed-tensors reads a group index up to 0.18 and refuses it from 0.19 on "
            "(quant_args.py, validate_actorder); quantise with algo_args static_groups: true"
        )
        inventory.report(CONFIG_FILE, "actorder", f"{where}.actorder {order!r:.40}", expected)


def is_symmetric(args: Mapping[str, Any]) -> bool:
    """Whether arguments of a scheme stand for codes without zero points."""
    return bool(args.get("symmetric", True))
