"""Which tensors a directory must hold, by what its own description says, dialect by dialect.

Written from the format's pages and the loaders' sources, apart from the writers in `formats/`, so that a
writer's fault shows. The pages are named in `formats/ascend.py`, `formats/golden_stick.py` and
`formats/compressed_tensors.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from gs_dist.checkpoint.inventory import CONFIG_FILE, DESCRIPTIONS, Inventory
from gs_dist.model.decoder import DecoderArchitecture, Linear

__all__ = ["Expectation", "Layout", "SchemeGroup", "build_layout", "detect_format", "scheme_groups"]

FLOATS = ("float32", "float16", "bfloat16")
_PACKED_BITS = (4, 8)


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a tensor must be: dtype (one of), shape, and the rule its values follow (see `values.py`)."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    values: str = "any"
    optional: bool = False
    limit: int = 0  # "group-index": number of groups; "padding": values along the packed axis


@dataclass(kw_only=True)
class Layout:
    """Expected tensors by full name, and the kind (`W8A8`, `FLOAT` ...) of every linear of the decoder layers."""

    format: str
    tensors: dict[str, Expectation] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    kv_layers: list[int] = field(default_factory=list)


def detect_format(inventory: Inventory) -> str:
    """The dialect by its description file or quantization_config, "" for none; contradictions are reported."""
    found = [name for name in DESCRIPTIONS if name in inventory.descriptions]
    method = inventory.quantization_config.get("quant_method")
    if len(inventory.descriptions) > 1:
        names = " and ".join(sorted(inventory.descriptions))
        inventory.report(sorted(inventory.descriptions)[1], "description-single", names, "one description file")
    if found and "quantization_config" in inventory.config:
        inventory.report(
            CONFIG_FILE, "config-no-quantization", f"quantization_config ({method})", f"none beside {found[0]}"
        )
    if found:
        return DESCRIPTIONS[found[0]]
    if method == "compressed-tensors":
        return "compressed-tensors"
    if inventory.config:
        expected = f"{' or '.join(DESCRIPTIONS)}, or quantization_config of compressed-tensors in {CONFIG_FILE}"
        inventory.report(CONFIG_FILE, "description-present", "no description of a quantisation", expected)
    return ""


def build_layout(inventory: Inventory, dialect: str, architecture: DecoderArchitecture) -> Layout:
    """Expected tensors of the whole model; faults of the description itself are reported on the way."""
    layout = Layout(format=dialect)
    floats = {name: (shape, "float") for name, shape in architecture.outer_tensors().items()}
    if architecture.tie_word_embeddings and "lm_head.weight" in inventory.tensors:
        floats["lm_head.weight"] = (floats["model.embed_tokens.weight"][0], "tied")
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        for name, shape in architecture.layer_tensors().items():
            floats[prefix + name] = (shape, "float")
    quantised = _DIALECTS[dialect](inventory, layout, architecture)
    for name in quantised:
        floats.pop(name + ".weight", None)
        if floats.pop(name + ".bias", None):
            shape = (quantised[name]["weight_rows"].shape[0],)
            layout.tensors[name + ".bias"] = Expectation(dtypes=FLOATS, shape=shape, values="float")
        for leaf, expectation in quantised[name].items():
            if leaf != "weight_rows":
                layout.tensors[f"{name}.{leaf}"] = expectation
    for name, (shape, values) in floats.items():
        layout.tensors[name] = Expectation(dtypes=FLOATS, shape=shape, values=values)
    return layout


Leaves = dict[str, Expectation]


def _all_linears(architecture: DecoderArchitecture) -> list[tuple[str, Linear]]:
    layers = range(architecture.num_layers)
    return [(architecture.layer_prefix(i) + linear.name, linear) for i in layers for linear in architecture.linears]


def _described(
    inventory: Inventory, layout: Layout, architecture: DecoderArchitecture, file: str, labels: tuple[str, ...]
) -> dict[str, Linear]:
    """Linears that a description file calls quantised; a missing or unknown label is reported."""
    description = inventory.descriptions[file]
    quantised = {}
    for name, linear in _all_linears(architecture):
        label = description.get(name + ".weight")
        if label is None:
            inventory.report(file, "description-entry", "no entry", "a label for every linear", name + ".weight")
            looks_float = inventory.tensors.get(name + ".weight")
            label = "FLOAT" if looks_float is None or looks_float.dtype in FLOATS else "?"
        if label != "FLOAT" and label not in labels:
            if label != "?":
                known = ", ".join(("FLOAT", *labels))
                inventory.report(file, "description-label", f"{label!r:.60}", f"one of {known}", name + ".weight")
            label = _guess(inventory, name)
        layout.kinds[name] = str(label)
        if label != "FLOAT":
            quantised[name] = linear
    _compare_entries(inventory, description, file)
    return quantised


def _guess(inventory: Inventory, name: str) -> str:
    """The kind of a linear whose label is missing or unknown, by its tensors."""
    return "W8A8" if name + ".deq_scale" in inventory.tensors else "W8A8_DYNAMIC"


def _compare_entries(inventory: Inventory, description: Mapping[str, Any], file: str) -> None:
    reported = {problem.tensor for problem in inventory.problems if problem.rule == "description-entry"}
    for name in inventory.tensors:
        if name not in description and name not in reported:
            inventory.report(file, "description-entry", "no entry", "an entry for every tensor", name)
    for name in description:
        tied = name == "lm_head.weight" and bool(inventory.config.get("tie_word_embeddings"))
        if name.count(".") and name not in inventory.tensors and not tied:
            inventory.report(file, "description-extra", "no such tensor", "entries for tensors that are there", name)


def _ascend(inventory: Inventory, layout: Layout, architecture: DecoderArchitecture) -> dict[str, Leaves]:
    """vllm_ascend/quantization/methods/w8a8_static.py, w8a8_dynamic.py, w8a16.py; kv_c8.py."""
    file = "quant_model_description.json"
    scale_dtypes = _with_single(architecture.dtype)
    quantised = {}
    described = _described(inventory, layout, architecture, file, ("W8A8", "W8A8_DYNAMIC", "W8A16"))
    for name, linear in described.items():
        rows, columns = linear.out_features, linear.in_features
        static = layout.kinds[name] == "W8A8"
        leaves = {
            "weight": Expectation(dtypes=("int8",), shape=(rows, columns)),
            "weight_rows": Expectation(dtypes=(), shape=(rows,)),
            "weight_scale": Expectation(dtypes=scale_dtypes, shape=(rows, 1), values="scale", optional=static),
            "weight_offset": Expectation(dtypes=scale_dtypes, shape=(rows, 1), values="zero", optional=static),
        }
        if static:
            half = architecture.dtype == "float16"
            leaves["input_scale"] = Expectation(dtypes=scale_dtypes, shape=(1,), values="scale")
            leaves["input_offset"] = Expectation(dtypes=("int8", *scale_dtypes), shape=(1,), values="offset")
            leaves["deq_scale"] = Expectation(
                dtypes=("int64" if half else "float32",), shape=(rows,), values="bits" if half else "scale"
            )
            leaves["quant_bias"] = Expectation(dtypes=("int32",), shape=(rows,))
        quantised[name] = leaves
    description = inventory.descriptions[file]
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
        inventory.report(file, "description-kv", found, "C8, since there are KV cache scales")
    return quantised


def _made_biases(layout: Layout, description: Mapping[str, Any], architecture: DecoderArchitecture) -> None:
    """Biases that the source model lacks: of norms (vllm_ascend/ops/layernorm.py), and of static linears."""
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        sizes = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), architecture.hidden_size)
        static = [n for n in architecture.linears if not n.bias and layout.kinds.get(prefix + n.name) == "W8A8"]
        for name, size in {**sizes, **{linear.name: linear.out_features for linear in static}}.items():
            if f"{prefix}{name}.bias" in description:
                layout.tensors[f"{prefix}{name}.bias"] = Expectation(dtypes=FLOATS, shape=(size,), values="float")


def _golden_stick(inventory: Inventory, layout: Layout, architecture: DecoderArchitecture) -> dict[str, Leaves]:
    """golden-stick 1.4.1 `save_quantized(backend=ASCEND)`; vllm_mindspore golden_stick/a8w8.py."""
    file = "quantization_description.json"
    scale_dtypes = _with_single(architecture.dtype)
    quantised = {}
    labels = ("W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16")
    for name, linear in _described(inventory, layout, architecture, file, labels).items():
        rows, columns = linear.out_features, linear.in_features
        packed = layout.kinds[name] == "W4A16"
        stored = inventory.tensors.get(name + ".weight_scale")
        groups = stored.shape[0] if packed and stored and len(stored.shape) == 2 else 1
        if columns % groups:
            inventory.report_tensor(name + ".weight_scale", "group-size", f"{groups} groups", f"a divisor of {columns}")
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


def _compressed_tensors(inventory: Inventory, layout: Layout, architecture: DecoderArchitecture) -> dict[str, Leaves]:
    """compressed_tensors quant_config.py, compressors/quantized_compressors/{naive_quantized,pack_quantized}.py."""
    config = inventory.quantization_config
    groups = scheme_groups(inventory)
    ignore = config.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(target, str) for target in ignore):
        inventory.report(CONFIG_FILE, "config-groups", f"ignore {ignore!r:.100}", "a list of names")
        ignore = []
    quantised = {}
    for name, linear in _all_linears(architecture):
        ignored = any(_matches(name, target) for target in ignore)
        group = None if ignored else next((group for group in groups if group.takes(name)), None)
        if group is None:
            layout.kinds[name] = "FLOAT"
            continue
        leaves, kind = _scheme_tensors(inventory, group, linear, name, architecture)
        layout.kinds[name] = kind
        if leaves:
            quantised[name] = leaves
    if config.get("kv_cache_scheme"):
        layout.kv_layers = list(range(architecture.num_layers))
        for layer in layout.kv_layers:
            for leaf in ("k_scale", "v_scale"):
                layout.tensors[f"{architecture.layer_prefix(layer)}self_attn.{leaf}"] = Expectation(
                    dtypes=_with_single(architecture.dtype), shape=(1,), values="scale"
                )
    return quantised


def _scheme_tensors(
    inventory: Inventory, group: SchemeGroup, linear: Linear, name: str, architecture: DecoderArchitecture
) -> tuple[Leaves, str]:
    weights, inputs = group.weights, group.inputs
    bits, size = weights.get("num_bits"), weights.get("group_size") or 0
    rows, columns = linear.out_features, linear.in_features
    grouped = weights.get("strategy") == "group"
    if (
        not isinstance(bits, int)
        or bits not in _PACKED_BITS
        or weights.get("type") != "int"
        or weights.get("strategy") not in ("group", "channel")
    ):
        inventory.report(CONFIG_FILE, "scheme", f"weights {dict(weights)!r:.160}", "int of 4 or 8 bits", name)
        return {}, "?"
    if grouped and (not isinstance(size, int) or size <= 0 or columns % size):
        inventory.report(CONFIG_FILE, "group-size", f"group_size {size!r:.40}", f"a divisor of {columns}", name)
        return {}, "?"
    groups = columns // size if grouped else 1
    scale = Expectation(dtypes=_with_single(architecture.dtype), shape=(rows, groups), values="scale")
    leaves = {"weight_rows": Expectation(dtypes=(), shape=(rows,)), "weight_scale": scale}
    if group.format == "int-quantized":
        leaves["weight"] = Expectation(dtypes=("int8",), shape=(rows, columns))
        zero_point = Expectation(dtypes=("int8",), shape=(rows, groups))
    elif group.format == "pack-quantized":
        factor = 32 // bits
        leaves["weight_packed"] = Expectation(
            dtypes=("int32",), shape=(rows, -(-columns // factor)), values=f"padding{bits}", limit=columns
        )
        leaves["weight_shape"] = Expectation(dtypes=("int64", "int32"), shape=(2,), values=f"shape {rows} {columns}")
        zero_point = Expectation(dtypes=("int32",), shape=(-(-rows // factor), groups))
    else:
        inventory.report(CONFIG_FILE, "scheme", f"format {group.format!r:.60}", "int-quantized or pack-quantized", name)
        return {}, "?"
    if not weights.get("symmetric", True):
        leaves["weight_zero_point"] = zero_point
    if weights.get("actorder") == "group":
        leaves["weight_g_idx"] = Expectation(dtypes=("int32",), shape=(columns,), values="group-index", limit=groups)
    static = inputs is not None and not inputs.get("dynamic")
    if inputs is not None and static:
        leaves["input_scale"] = Expectation(dtypes=scale.dtypes, shape=(1,), values="scale")
        if not inputs.get("symmetric", True):
            leaves["input_zero_point"] = Expectation(dtypes=("int8",), shape=(1,), values="offset")
    kind = f"W{bits}A16" if inputs is None else f"W{bits}A8" + ("" if static else "_DYNAMIC")
    return leaves, kind


@dataclass(frozen=True, kw_only=True)
class SchemeGroup:
    """A config group of compressed-tensors: the linears it targets and the arguments of both sides."""

    label: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None
    format: object

    def takes(self, name: str) -> bool:
        """Whether the group targets a linear."""
        return any(target == "Linear" or _matches(name, target) for target in self.targets)


def scheme_groups(inventory: Inventory) -> list[SchemeGroup]:
    """The groups of quantization_config that are well formed, in their order; others are reported."""
    config = inventory.quantization_config
    groups = config.get("config_groups")
    found = []
    for label, group in groups.items() if isinstance(groups, Mapping) else ():
        content = group if isinstance(group, Mapping) else {}
        targets, weights, inputs = (content.get(key) for key in ("targets", "weights", "input_activations"))
        if not (_is_texts(targets) and isinstance(weights, Mapping) and isinstance(inputs, Mapping | None)):
            expected = "targets (a list of names), weights (a table), input_activations (a table or null)"
            inventory.report(CONFIG_FILE, "config-groups", f"{label}: {group!r:.160}", expected)
            continue
        form = content.get("format") or config.get("format")
        found.append(SchemeGroup(label=label, targets=tuple(targets), weights=weights, inputs=inputs, format=form))
    return found


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _matches(name: str, target: str) -> bool:
    try:
        return re.match(target[3:], name) is not None if target.startswith("re:") else target == name
    except (re.error, OverflowError, RecursionError):
        return False


def _with_single(dtype: str) -> tuple[str, ...]:
    """The model's dtype, and float32, from which loaders cast."""
    return (dtype,) if dtype == "float32" else (dtype, "float32")


_DIALECTS: Mapping[str, Callable[[Inventory, Layout, DecoderArchitecture], dict[str, Leaves]]] = {
    "ascend": _ascend,
    "golden-stick": _golden_stick,
    "compressed-tensors": _compressed_tensors,
}
