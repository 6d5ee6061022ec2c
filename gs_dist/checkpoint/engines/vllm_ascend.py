"""vLLM-Ascend at 182b75e: what its loader demands of a directory.

Sources: `vllm_ascend/quantization/utils.py` (which method a directory is taken for), `modelslim_config.py`
(description file), `methods/registry.py` and `methods/*.py` (kinds of dense linears), `kv_c8.py`,
`vllm_ascend/attention/attention_v1.py` (KV cache), `compressed_tensors_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gs_dist.checkpoint.dialects.compressed_tensors.layout import SchemeGroup, scheme_groups
from gs_dist.checkpoint.engines.base import Engine, serve_command
from gs_dist.checkpoint.engines.vllm_ascend_cache import CACHE_LOADERS, WITHOUT_CACHE_LOADER
from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory
from gs_dist.checkpoint.layout import STATIC_KINDS, Layout
from gs_dist.checkpoint.problems import Note
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.numbers.token_step import TokenStep
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["ENGINE"]

_DESCRIPTION = DIALECTS["ascend"].describing_file
# Kinds registered for "linear" by `register_scheme` that a dense int8 or int4 checkpoint can have.
_LINEAR_KINDS = ("FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16")
_EXPERT_KINDS = ("FLOAT", "W8A8_DYNAMIC", "W4A8_DYNAMIC")  # registered for "moe" by `register_scheme`
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.fused_qkv_a_proj": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_KV_BLOCK = 32  # attention_v1.py, NZ_FMT_LAST_DIM


def _check(inventory: Inventory, layout: Layout, version: str) -> None:
    """Applies the loader's rules to an ascend or a compressed-tensors directory; no other dialect is loaded."""
    if layout.dialect == "ascend":
        _check_description(inventory, layout)
        _check_kv(inventory, layout, version)
        _check_dtype(inventory, layout)
    elif layout.dialect == "compressed-tensors":
        _check_compressed_tensors(inventory, layout)
    else:
        expected = f"{_DESCRIPTION}, or quant_method compressed-tensors (utils.py, detect_quantization_method)"
        inventory.report(CONFIG_FILE, "engine-format", f"{layout.dialect} checkpoint", expected)


def _check_description(inventory: Inventory, layout: Layout) -> None:
    """`modelslim_config.py`: get_linear_quant_type, is_layer_skipped_ascend, create_scheme_for_layer."""
    description = inventory.descriptions[_DESCRIPTION]
    architecture = inventory.architecture
    assert architecture is not None  # a layout is built from it
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        for fused, members in _FUSED.items():
            labels = [description.get(f"{prefix}{member}.weight") for member in members]
            if None not in labels and len(set(labels)) > 1:
                expected = "one label for all: they are fused into one linear (get_linear_quant_type)"
                inventory.report(_DESCRIPTION, "fused-label", ", ".join(map(str, labels)), expected, prefix + fused)
    experts: set[str] = set()
    for layer, spec in enumerate(architecture.layers):
        names = [architecture.layer_prefix(layer) + linear.name for expert in spec.mlp.experts for linear in expert]
        experts.update(names)
        kinds = sorted({layout.kinds[name] for name in names if name in layout.kinds})
        if names and (len(kinds) > 1 or kinds[0] not in _EXPERT_KINDS):
            expected = f"one of {', '.join(_EXPERT_KINDS)} for all experts of a layer (registry.py, layer_type moe)"
            inventory.report(_DESCRIPTION, "engine-kind", ", ".join(kinds), expected, names[0])
    for name, kind in layout.kinds.items():
        if name not in experts and kind not in _LINEAR_KINDS:
            expected = f"one of {', '.join(_LINEAR_KINDS)} (methods/registry.py, layer_type linear)"
            inventory.report(_DESCRIPTION, "engine-kind", kind, expected, name)
    for module in ("lm_head", "model.embed_tokens"):
        key = module + ".weight"
        if description.get(key) != "FLOAT":
            found = description.get(key, "no entry")
            expected = "FLOAT, also where tied (is_layer_skipped_ascend finds no such key otherwise)"
            inventory.report(_DESCRIPTION, "float-entry", found, expected, key)


def _check_kv(inventory: Inventory, layout: Layout, version: str) -> None:
    """`attention_v1.py`: the int8 cache is viewed in blocks of 32 channels of a head. Its scales need a loader.

    Up to 0.23 `patch/worker/patch_gqa_c8.py` gives Qwen3, GLM-4 MoE and MiniMax-M2 one, and other models fail with a
    KeyError on `kv_cache_offset`; 0.25.1rc1 maps them for every model.
    """
    architecture = inventory.architecture
    assert architecture is not None
    if layout.kv_layers and architecture.model_type not in CACHE_LOADERS:
        model = architecture.model_type
        if version.startswith(WITHOUT_CACHE_LOADER):
            expected = (
                f"vllm-ascend 0.25.1rc1 or later: before, no loader of {model} takes the scales (patch_gqa_c8.py)"
            )
            inventory.report(_DESCRIPTION, "engine-kv", f"an int8 KV cache of {model}", expected)
        else:
            inventory.note(
                "kv-version",
                f"the int8 KV cache needs vllm-ascend 0.25.1rc1 or later: up to 0.23 loading a {model} fails with a "
                "KeyError on kv_cache_offset (patch_gqa_c8.py)",
            )
    if layout.kv_layers and architecture.head_dim % _KV_BLOCK:
        expected = f"a multiple of {_KV_BLOCK} for an int8 KV cache (attention_v1.py, NZ_FMT_LAST_DIM)"
        inventory.report(CONFIG_FILE, "kv-head-dim", f"head_dim {architecture.head_dim}", expected)


def _check_dtype(inventory: Inventory, layout: Layout) -> None:
    """`w8a8_static.py`, get_perchannel_param: deq_scale is float32 for bfloat16 and int64 for float16.

    A model of another dtype has no deq_scale parameter at all; vLLM turns float32 into bfloat16 unless told
    otherwise, so float32 passes.
    """
    dtype = inventory.config.get("torch_dtype", inventory.config.get("dtype"))
    static = any(kind in STATIC_KINDS for kind in layout.kinds.values())
    if static and dtype is None:
        inventory.report(CONFIG_FILE, "engine-dtype", "no torch_dtype", "torch_dtype, which decides deq_scale's form")
    elif static:
        half = dtype in ("float16", "torch.float16")
        stored, lost = ("64-bit words", "float16") if half else ("float32", "bfloat16")
        wrong = "bfloat16" if half else "float16"
        inventory.note(
            "serving-dtype",
            f"deq_scale is stored as {stored}, for {lost}: served with --dtype {wrong}"
            f"{'' if half else ', as 310P cards serve everything,'} it loads without a word and every static linear is "
            f"wrong (w8a8_static.py, get_perchannel_param); serving_dtype: {wrong} in the recipe makes it fit",
        )


def _check_compressed_tensors(inventory: Inventory, layout: Layout) -> None:
    """`compressed_tensors_config.py`, _detect_quant_type: W8A8 and W8A8_DYNAMIC, symmetric on both sides.

    The first of them is taken, and then quantises its input with what happens to lie in memory. Experts are served in
    W4A16 too (`methods/w4a16.py`, registered for "moe" alone), in groups and without zero points: the offsets that
    its kernel reads are zeros which no checkpoint fills.
    """
    groups = scheme_groups(inventory)
    for group in groups:
        taken = [n for n, kind in layout.kinds.items() if kind != "FLOAT" and _first(groups, n) is group]
        if _is_served_for_experts(group) and all(".experts." in name for name in taken):
            continue
        if not _is_served(group):
            activations = f"{_summary(group.inputs)} activations" if group.inputs else "no activations"
            found = f"{_summary(group.weights)} weights, {activations}"
            expected = (
                "symmetric int8 weights per channel with symmetric int8 activations per token (_detect_quant_type); "
                "W4A16 serves experts of mixtures only, symmetric and in groups (w4a16.py)"
            )
            inventory.report(CONFIG_FILE, "engine-kind", f"{group.label}: {found}", expected)
        elif group.inputs and not group.inputs.get("dynamic"):
            expected = (
                "the ascend format, or activations per token: for compressed-tensors this engine quantises with an "
                "input_offset that the checkpoint has not and nothing sets (w8a8_static.py, get_pertensor_param, "
                "process_weights_after_loading); set format: [ascend], or act_quant_granularity: per_token"
            )
            inventory.report(CONFIG_FILE, "engine-static", f"{group.label}: static int8 activations", expected)
    if inventory.quantization_config.get("kv_cache_scheme"):
        expected = "null: this engine ignores it for compressed-tensors; use the ascend format for an int8 KV cache"
        inventory.report(CONFIG_FILE, "engine-kv", "kv_cache_scheme", expected)


def _first(groups: Sequence[SchemeGroup], name: str) -> SchemeGroup | None:
    return next((group for group in groups if group.takes(name)), None)


def _is_served_for_experts(group: SchemeGroup) -> bool:
    weights = group.weights
    grouped = weights.get("strategy") == "group" and weights.get("num_bits") == 4 and weights.get("type") == "int"
    return grouped and bool(weights.get("symmetric", True)) and group.inputs is None


def _is_served(group: SchemeGroup) -> bool:
    weights, inputs = group.weights, group.inputs or {}
    both = weights.get("num_bits") == inputs.get("num_bits") == 8 and weights.get("strategy") == "channel"
    symmetric = bool(weights.get("symmetric")) and bool(inputs.get("symmetric"))
    way = (inputs.get("strategy"), bool(inputs.get("dynamic")))
    return both and symmetric and not weights.get("dynamic") and way in (("tensor", False), ("token", True))


def _summary(args: Mapping[str, Any]) -> str:
    kind = "symmetric" if args.get("symmetric", True) else "asymmetric"
    return f"{kind} {args.get('num_bits')!r:.20}-bit {args.get('strategy')!s:.40}"


def _serve(dialect: str, architecture: DecoderArchitecture, notes: Sequence[Note]) -> str:
    method = " --quantization ascend" if dialect == "ascend" else ""
    dtype = " --dtype bfloat16" if architecture.dtype == "float32" else ""
    return serve_command("vLLM-Ascend", f"vllm serve DIRECTORY{method}{dtype}")


ENGINE = Engine(
    name="vllm-ascend",
    title="vLLM-Ascend",
    dialects=("compressed-tensors", "ascend"),
    token_step=TokenStep.OVER_127,  # `torch_npu.npu_dynamic_quant`, CANN aclnnDynamicQuant: row maximum / 127
    check=_check,
    serve=_serve,
)
