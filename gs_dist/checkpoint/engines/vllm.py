"""vLLM on compressed-tensors and GPTQ's layout: what its loader demands of a directory.

Sources: vLLM `layers/quantization/compressed_tensors/compressed_tensors.py` (schemes, fused linears) with
`schemes/*.py`, `kernels/linear/mixed_precision/*.py` (what a scheme has a kernel for; see `vllm_kernels.py`) and
`layers/attention/attention.py` (KV cache).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gs_dist.checkpoint.dialects.compressed_tensors.layout import SchemeGroup, scheme_groups
from gs_dist.checkpoint.engines.base import Engine, serve_command
from gs_dist.checkpoint.engines.compressed_tensors_library import check_library, is_symmetric
from gs_dist.checkpoint.engines.vllm_kernels import (
    MARLIN_GROUP_SIZES,
    PackedWeights,
    describe_tensor_parallel,
    needs_hopper,
    takes_group_size,
)
from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory
from gs_dist.checkpoint.layout import Layout
from gs_dist.checkpoint.problems import Note
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.numbers.token_step import TokenStep

__all__ = ["ENGINE"]

_FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def _check(inventory: Inventory, layout: Layout, version: str) -> None:
    """The library's rules, schemes with a kernel, one scheme for linears that are fused, and no int8 cache."""
    if layout.dialect == "gptq":
        _check_gptq(inventory, layout)
        return
    if not check_library(inventory, layout):
        return
    architecture = inventory.architecture
    assert architecture is not None  # a layout is built from it
    groups = scheme_groups(inventory)
    for group in groups:
        _check_scheme(inventory, group, architecture.dtype)
    _check_cache(inventory)
    quantized = {
        name: next((group for group in groups if group.takes(name)), None) if kind != "FLOAT" else None
        for name, kind in layout.kinds.items()
    }
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        _check_experts(inventory, layout, quantized, architecture, layer)
        for members in _FUSED:
            names = [prefix + member for member in members]
            if names[0] not in layout.kinds:
                continue
            kinds = [_summary(layout.kinds[name], quantized[name]) for name in names]
            if len(set(kinds)) > 1:
                expected = "one scheme: they are fused into one linear (get_scheme, should_ignore_layer)"
                inventory.report(CONFIG_FILE, "fused-label", ", ".join(kinds), expected, names[0])
            elif layout.kinds[names[0]] == "W8A8":
                _check_shared_input(inventory, names)
    packed = {name: _packed(group) for name, group in quantized.items() if group is not None}
    limit = describe_tensor_parallel({name: found for name, found in packed.items() if found}, architecture)
    if limit is not None:
        inventory.note("tensor-parallel", limit)


def _check_gptq(inventory: Inventory, layout: Layout) -> None:
    """`auto_gptq.py`: Marlin's groups, whatever kernel runs them, and no groups in activation order."""
    architecture, config = inventory.architecture, inventory.quantization_config
    assert architecture is not None  # a layout is built from it
    bits, size = config.get("bits"), config.get("group_size")
    if not isinstance(bits, int) or not isinstance(size, int):
        return  # the dialect's own rules tell of it
    packed = PackedWeights(num_bits=bits, group_size=max(size, 0), symmetric=True)
    if packed.group_size not in MARLIN_GROUP_SIZES:
        expected = "groups of 32, 64 or 128, or weights per channel (marlin_utils.py, verify_marlin_supported)"
        inventory.report(CONFIG_FILE, "engine-kind", f"groups of {size}", expected)
    if config.get("desc_act") and size > 0:
        expected = (
            "false: groups in activation order are refused (gptq_utils.py, normalize_and_validate_gptq_desc_act); "
            "quantise with algo_args static_groups: true"
        )
        inventory.report(CONFIG_FILE, "actorder", "desc_act true", expected)
    limit = describe_tensor_parallel(
        {name: packed for name, kind in layout.kinds.items() if kind != "FLOAT"}, architecture
    )
    if limit is not None:
        inventory.note("tensor-parallel", limit)


def _check_experts(
    inventory: Inventory,
    layout: Layout,
    quantized: Mapping[str, SchemeGroup | None],
    architecture: DecoderArchitecture,
    layer: int,
) -> None:
    """`compressed_tensors_moe.py`, get_moe_method: one scheme for all experts of a layer, its gates, ups and downs.

    int8 activations only per token (`compressed_tensors_moe_w8a8_int8.py`, __init__); 4 and 8 bits alone, with zero
    points or without, as `compressed_tensors_moe_wna16.py` takes them.
    """
    prefix = architecture.layer_prefix(layer)
    names = [prefix + linear.name for expert in architecture.layers[layer].mlp.experts for linear in expert]
    kinds = sorted({_summary(layout.kinds[name], quantized[name]) for name in names})
    if len(kinds) > 1:
        expected = "one scheme: all experts of a layer are run as one (get_moe_method)"
        inventory.report(CONFIG_FILE, "fused-label", ", ".join(kinds), expected, names[0])
    elif names and layout.kinds[names[0]] == "W8A8":
        expected = "activations per token for int8 experts (CompressedTensorsW8A8Int8MoEMethod)"
        inventory.report(CONFIG_FILE, "engine-static", "static int8 activations", expected, names[0])


def _check_scheme(inventory: Inventory, group: SchemeGroup, dtype: str) -> None:
    """`compressed_tensors.py`, _get_scheme_from_parts, and the kernels of what it returns."""
    weights, inputs = group.weights, group.inputs
    packed = _packed(group)
    found, expected = "", ""
    if packed is not None:
        if not takes_group_size(packed, dtype):
            found = f"groups of {packed.group_size}"
            expected = (
                "groups of 32, 64 or 128 (4 bits: 256 too), or weights per channel: no kernel takes others on CUDA "
                "cards (marlin.py, triton_w4a16.py), but for symmetric ones with --dtype float16 (exllama.py)"
            )
        elif needs_hopper(packed):
            inventory.note(
                "zero-points",
                "8-bit weights with zero points: vLLM has a kernel for them on Hopper cards only (machete.py; Marlin "
                "takes zero points of 4 bits)",
            )
    elif inputs is not None and weights.get("num_bits") == 4:
        found = "4-bit weights with 8-bit activations"
        expected = (
            "8-bit weights, or float activations: vLLM runs these on CPUs and Intel XPUs alone (dynamic_4bit.py, which "
            "compressed_tensors_w4a8_int.py ends in); quantise with act_quant_dtype: null for W4A16"
        )
    elif inputs is not None and not is_symmetric(weights):
        found = "8-bit activations with asymmetric weights"
        expected = (
            "symmetric weights (_is_static_tensor_w8a8, _is_dynamic_token_w8a8); quantise with weight_symmetric: true"
        )
    if found:
        inventory.report(CONFIG_FILE, "engine-kind", f"{group.label}: {found}", expected)


def _check_cache(inventory: Inventory) -> None:
    """`layers/attention/attention.py`: a kv_cache_scheme is for an FP8 cache."""
    scheme = inventory.quantization_config.get("kv_cache_scheme")
    if scheme and not (isinstance(scheme, Mapping) and scheme.get("type") == "float"):
        expected = (
            "null: vLLM 0.23 to 0.32 refuse it at load (NotImplementedError, type=int); for an int8 KV cache write the "
            "ascend format, for vLLM-Ascend"
        )
        inventory.report(CONFIG_FILE, "engine-kv", "kv_cache_scheme of type int", expected)


def _check_shared_input(inventory: Inventory, names: list[str]) -> None:
    """`compressed_tensors_w8a8_int8.py`: a fused linear has one static input scale, made of its members'."""
    for leaf in ("input_scale", "input_zero_point"):
        held = [f"{name}.{leaf}" for name in names if f"{name}.{leaf}" in inventory.tensors]
        values = [inventory.read(name).astype(np.float32).reshape(-1) for name in held]
        for name, value in zip(held[1:], values[1:], strict=True):
            if value.size == values[0].size == 1 and value[0] != values[0][0]:
                expected = f"{values[0][0]:.6g} as {held[0]}, with which vLLM fuses it into one linear with one of both"
                inventory.report_tensor(name, "shared-input", f"{value[0]:.6g}", expected)


def _packed(group: SchemeGroup) -> PackedWeights | None:
    """How a group of weights alone is stored, None where activations are quantised or sizes are no numbers."""
    size = group.weights.get("group_size") if group.weights.get("strategy") == "group" else 0
    bits = group.weights.get("num_bits")
    integers = group.inputs is None and group.weights.get("type") == "int"
    if not integers or not isinstance(size, int) or size < 0 or not isinstance(bits, int):
        return None
    return PackedWeights(num_bits=bits, group_size=size, symmetric=is_symmetric(group.weights))


def _summary(kind: str, group: SchemeGroup | None) -> str:
    """A linear's kind with what else decides the parameters that vLLM makes for it."""
    if group is None:
        return kind
    sides = (("weights", group.weights), ("inputs", group.inputs or {}))
    more = [f"{side} with zero points" for side, args in sides if not is_symmetric(args)]
    more += [f"groups of {group.weights['group_size']!r:.20}"] if group.weights.get("group_size") else []
    return " ".join([kind, *([f"({', '.join(more)})"] if more else [])])


def _serve(dialect: str, architecture: DecoderArchitecture, notes: Sequence[Note]) -> str:
    dtype = " --dtype bfloat16" if architecture.dtype == "float32" else ""
    return serve_command("vLLM", f"vllm serve DIRECTORY{dtype}")


ENGINE = Engine(
    name="vllm",
    title="vLLM",
    dialects=("compressed-tensors", "gptq"),
    token_step=TokenStep.OVER_127,  # `csrc/quantization/w8a8/int8/scaled_quant.cu`, and `csrc/cpu/dnnl_kernels.cpp`
    check=_check,
    serve=_serve,
    versions=("0.32.0",),
)
