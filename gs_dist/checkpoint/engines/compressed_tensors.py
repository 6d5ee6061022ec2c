"""transformers and vLLM on compressed-tensors: what their loaders demand of a directory.

Sources: compressed-tensors `quantization/quant_config.py`, `quant_args.py`, `quant_scheme.py` (keys of
quantization_config, unknown ones are refused); vLLM `layers/quantization/compressed_tensors/compressed_tensors.py`
(schemes, fused linears).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory
from gs_dist.checkpoint.layouts import Layout, scheme_groups

__all__ = ["check_transformers", "check_vllm"]

_FORMATS = ("dense", "int-quantized", "pack-quantized", "mixed-precision", "naive-quantized")
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
_STRATEGIES = ("tensor", "channel", "group", "token")
_FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def check_transformers(inventory: Inventory, layout: Layout) -> None:
    """`quant_config.py`: method, status, formats and arguments that the library knows."""
    if layout.format != "compressed-tensors":
        inventory.report(CONFIG_FILE, "engine-format", f"a {layout.format} checkpoint", "compressed-tensors")
        return
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


def check_vllm(inventory: Inventory, layout: Layout) -> None:
    """`compressed_tensors.py`: the library's rules, and one scheme for linears that are fused."""
    check_transformers(inventory, layout)
    if layout.format != "compressed-tensors":
        return
    architecture = inventory.architecture
    assert architecture is not None  # a layout is built from it
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        for members in _FUSED:
            kinds = [layout.kinds[prefix + member] for member in members]
            if len(set(kinds)) > 1:
                expected = "one scheme: they are fused into one linear (get_scheme, should_ignore_layer)"
                inventory.report(CONFIG_FILE, "fused-label", ", ".join(kinds), expected, prefix + members[0])


def _check_args(inventory: Inventory, where: str, args: Mapping[str, Any]) -> None:
    unknown = sorted(set(args) - _ARGS)
    if unknown:
        expected = "arguments that the library knows; it refuses others (quant_args.py)"
        inventory.report(CONFIG_FILE, "scheme", f"{where}.{unknown[0]}", expected)
    if args and args.get("strategy") not in _STRATEGIES:
        expected = f"one of {', '.join(_STRATEGIES)}"
        inventory.report(CONFIG_FILE, "scheme", f"{where}.strategy {args.get('strategy')!r:.60}", expected)
