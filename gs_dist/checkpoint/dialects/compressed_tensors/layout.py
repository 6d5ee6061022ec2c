"""What a compressed-tensors directory must hold.

Sources: compressed_tensors quant_config.py, compressors/quantized_compressors/{naive_quantized,pack_quantized}.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory
from gs_dist.checkpoint.layout import (
    FLOAT_NAMES,
    DialectLayout,
    Expectation,
    Layout,
    Leaves,
    all_linears,
    shared_inputs,
    with_single,
)
from gs_dist.checkpoint.name_patterns import NamePatterns
from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture, Linear

__all__ = [
    "FLOAT_FORMATS",
    "LAYOUT",
    "CompressedTensorsLayout",
    "FloatFormat",
    "SchemeGroup",
    "listed_patterns",
    "scheme_groups",
]

_PACKED_BITS = (4, 8)


class CompressedTensorsLayout:
    """Rules on a directory by the schemes of quantization_config."""

    def quantized(self, inventory: Inventory, layout: Layout, architecture: DecoderArchitecture) -> dict[str, Leaves]:
        """See `DialectLayout.quantized`."""
        config = inventory.quantization_config
        groups = scheme_groups(inventory)
        ignore = listed_patterns(inventory, "ignore", config.get("ignore") or [])
        quantized = {}
        for name, linear in all_linears(architecture):
            group = None if ignore.match(name) else next((group for group in groups if group.takes(name)), None)
            if group is None:
                layout.kinds[name] = "FLOAT"
                continue
            leaves, kind = _scheme_tensors(inventory, group, linear, name, architecture)
            layout.kinds[name] = kind
            if leaves:
                quantized[name] = leaves
        _check_carried(inventory, groups, ignore, architecture)
        _check_format(inventory, groups)
        for group in groups:
            _check_sides(inventory, group)
        if not ignore.match("lm_head"):
            _check_head(inventory, groups)
        if config.get("kv_cache_scheme"):
            layout.kv_layers = list(range(architecture.num_layers))
            for layer in layout.kv_layers:
                for leaf in ("k_scale", "v_scale"):
                    layout.tensors[f"{architecture.layer_prefix(layer)}self_attn.{leaf}"] = Expectation(
                        dtypes=with_single(architecture.dtype), shape=(1,), values="scale"
                    )
        return quantized

    def check_relations(self, inventory: Inventory, layout: Layout, sound: set[str]) -> None:
        """Notes where linears that vLLM fuses have static inputs of their own; nothing else follows from the rest."""
        for first, *others in shared_inputs(layout):
            for leaf in ("input_scale", "input_zero_point"):
                names = [f"{name}.{leaf}" for name in (first, *others)]
                if sound.issuperset(names) and len({inventory.read(name).tobytes() for name in names}) > 1:
                    inventory.note(
                        "shared-input",
                        f"{names[0]} and those of its neighbours differ: transformers runs them, vLLM fuses them into "
                        "one linear with one of both",
                    )

    def dequantized(self, inventory: Inventory, name: str, kind: str) -> npt.NDArray[np.float32]:
        """See `DialectLayout.dequantized`; compressed_tensors forward.py, `dequantize`."""
        for form in FLOAT_FORMATS.values():
            if form.kind == kind:
                return form.values(inventory, name)
        scale = inventory.read(f"{name}.weight_scale").astype(np.float32)
        packed = f"{name}.weight_packed" in inventory.tensors
        bits = int(kind[1])
        zero = np.zeros(scale.shape, np.float32)
        if packed:
            rows, columns = inventory.read(f"{name}.weight_shape").tolist()
            codes = _unpacked(inventory.read(f"{name}.weight_packed"), bits)[:, :columns]
        else:
            codes = inventory.read(f"{name}.weight").astype(np.float32)
            rows, columns = codes.shape
        if f"{name}.weight_zero_point" in inventory.tensors:
            stored = inventory.read(f"{name}.weight_zero_point")
            zero = _unpacked(stored.T, bits)[:, :rows].T if packed else stored.astype(np.float32)
        groups = np.arange(columns) // (columns // scale.shape[1])
        if f"{name}.weight_g_idx" in inventory.tensors:
            groups = inventory.read(f"{name}.weight_g_idx")
        return np.asarray((codes - zero[:, groups]) * scale[:, groups], dtype=np.float32)


LAYOUT: DialectLayout = CompressedTensorsLayout()


def _check_format(inventory: Inventory, groups: list[SchemeGroup]) -> None:
    """`format` of the whole is that of the groups, or says that they differ (quant_config.py, `infer_model_format`)."""
    stated = inventory.quantization_config.get("format")
    formats = {str(group.format) for group in groups}
    wanted = formats.pop() if len(formats) == 1 else "mixed-precision"
    if groups and stated != wanted:
        inventory.report(CONFIG_FILE, "format", f"format {stated!r:.60}", f"{wanted}, as its groups of linears say")


def _check_sides(inventory: Inventory, group: SchemeGroup) -> None:
    """Arguments of both sides (quant_args.py, whose defaults are 8 bits, int, symmetric and static)."""
    for side, args in (("weights", group.weights), ("input_activations", group.inputs or {})):
        for key in ("symmetric", "dynamic"):
            if not isinstance(args.get(key, False), bool):
                found = f"{group.label}: {side}.{key} {args.get(key)!r:.40}"
                inventory.report(CONFIG_FILE, "scheme", found, "true or false")
    if group.weights.get("dynamic"):
        inventory.report(CONFIG_FILE, "scheme", f"{group.label}: weights.dynamic", "false: weights are stored")
    if group.inputs is None:
        return
    wanted = {
        "num_bits": (8,),
        "type": ("int",),
        "strategy": ("token" if group.inputs.get("dynamic") else "tensor", None),
    }
    for key, values in wanted.items():
        if group.inputs.get(key, values[-1]) not in values:
            found = f"{group.label}: input_activations.{key} {group.inputs.get(key)!r:.40}"
            inventory.report(CONFIG_FILE, "scheme", found, f"{values[0]}, which the stored weights are for")


def _check_carried(
    inventory: Inventory, groups: list[SchemeGroup], ignore: NamePatterns, architecture: DecoderArchitecture
) -> None:
    """Engines build the linears of a module that is targeted and not ignored for codes, which floats are not."""
    for tensor, shape in architecture.carried:
        name = tensor.removesuffix(".weight")
        if name == tensor or len(shape) != 2 or ignore.match(name) or not any(group.takes(name) for group in groups):
            continue
        inventory.report(CONFIG_FILE, "carried", f"a group takes {name}, which is float", f"{name} in ignore", tensor)


def _check_head(inventory: Inventory, groups: list[SchemeGroup]) -> None:
    """Transformers replaces every linear that is targeted and not ignored, the head among them."""
    taken = next((group.label for group in groups if group.takes("lm_head")), None)
    held = inventory.tensors.get("lm_head.weight")
    if taken is not None and (held is None or held.dtype in FLOAT_NAMES):
        inventory.report(CONFIG_FILE, "head", f"{taken} takes lm_head, which is float", "lm_head in ignore")


def _scheme_tensors(
    inventory: Inventory, group: SchemeGroup, linear: Linear, name: str, architecture: DecoderArchitecture
) -> tuple[Leaves, str]:
    weights, inputs = group.weights, group.inputs
    bits, size = weights.get("num_bits"), weights.get("group_size") or 0
    rows, columns = linear.out_features, linear.in_features
    grouped = weights.get("strategy") == "group"
    form = FLOAT_FORMATS.get(str(group.format))
    if form is not None:
        return _float_tensors(inventory, group, form, linear, name)
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
    scale = Expectation(dtypes=with_single(architecture.dtype), shape=(rows, groups), values="scale")
    leaves = {"weight_rows": Expectation(dtypes=(), shape=(rows,)), "weight_scale": scale}
    if group.format == "int-quantized":
        leaves["weight"] = Expectation(dtypes=("int8",), shape=(rows, columns), values="codes", limit=bits)
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
class FloatFormat:
    """Floats of 4 bits, two a byte, and their scales.

    Attributes:
        kind: what the linear is called.
        arguments: that its weights must have.
        leaves: scales of (rows, groups).
        scales: what codes are multiplied by, (rows, groups) float32.
    """

    kind: str
    arguments: Mapping[str, Any]
    leaves: Callable[[int, int], Leaves]
    scales: Callable[[Inventory, str], npt.NDArray[np.float32]]

    def tensors(self, rows: int, columns: int) -> Leaves:
        """All tensors of a linear but its bias."""
        packed = Expectation(dtypes=("uint8",), shape=(rows, columns // 2))
        return {"weight_packed": packed, **self.leaves(rows, columns // self.arguments["group_size"])}

    def values(self, inventory: Inventory, name: str) -> npt.NDArray[np.float32]:
        """Two values a byte, the first in the low half; each times the scale of its group."""
        packed, scales = inventory.read(f"{name}.weight_packed"), self.scales(inventory, name)
        nibbles = np.stack([packed & 0x0F, packed >> 4], axis=2).reshape(len(packed), -1)
        values = np.where(nibbles & 8, -_E2M1[nibbles & 7], _E2M1[nibbles & 7])
        return np.asarray(values * np.repeat(scales, self.arguments["group_size"], axis=1), dtype=np.float32)


_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)


def _exponents(rows: int, groups: int) -> Leaves:
    return {"weight_scale": Expectation(dtypes=("uint8",), shape=(rows, groups), values="exponent")}


def _powers_of_two(inventory: Inventory, name: str) -> npt.NDArray[np.float32]:
    return np.ldexp(np.float32(1), inventory.read(f"{name}.weight_scale").astype(np.int32) - 127)


def _block_scales(rows: int, groups: int) -> Leaves:
    return {
        "weight_scale": Expectation(dtypes=("float8_e4m3fn",), shape=(rows, groups), values="scale"),
        "weight_global_scale": Expectation(dtypes=("float32",), shape=(1,), values="scale"),
    }


def _divided(inventory: Inventory, name: str) -> npt.NDArray[np.float32]:
    scale = inventory.read(f"{name}.weight_scale").astype(np.float32)
    return np.asarray(scale / inventory.read(f"{name}.weight_global_scale"), dtype=np.float32)


FLOAT_FORMATS: Mapping[str, FloatFormat] = {
    # compressors/nvfp4/base.py and quant_scheme.py, NVFP4A16
    "nvfp4-pack-quantized": FloatFormat(
        kind="NVFP4A16",
        arguments={"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        leaves=_block_scales,
        scales=_divided,
    ),
    # compressors/mxfp4/base.py and quant_scheme.py, MXFP4A16
    "mxfp4-pack-quantized": FloatFormat(
        kind="MXFP4A16",
        arguments={"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        leaves=_exponents,
        scales=_powers_of_two,
    ),
}
"""By the name in config.json."""


def _float_tensors(
    inventory: Inventory, group: SchemeGroup, form: FloatFormat, linear: Linear, name: str
) -> tuple[Leaves, str]:
    found = {key: group.weights.get(key) for key in form.arguments}
    size = form.arguments["group_size"]
    if found != form.arguments or group.inputs is not None or not group.weights.get("symmetric", True):
        told = ", ".join(f"{key} {value}" for key, value in form.arguments.items())
        expected = f"symmetric, {told}, and no quantised inputs"
        inventory.report(CONFIG_FILE, "scheme", f"weights {dict(group.weights)!r:.160}", expected, name)
        return {}, "?"
    rows, columns = linear.out_features, linear.in_features
    if columns % size:
        inventory.report(CONFIG_FILE, "group-size", f"group_size {size}", f"a divisor of {columns}", name)
        return {}, "?"
    return {"weight_rows": Expectation(dtypes=(), shape=(rows,)), **form.tensors(rows, columns)}, form.kind


def _unpacked(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.float32]:
    """Values along the last axis of int32 words, the first in the lowest bits, each made unsigned by half the range."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = (np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    return np.asarray(values.reshape(len(words), -1).astype(np.float32) - np.float32(1 << (bits - 1)))


@dataclass(frozen=True, kw_only=True)
class SchemeGroup:
    """A config group of compressed-tensors: the linears it targets and the arguments of both sides."""

    label: str
    targets: tuple[str, ...]
    patterns: NamePatterns
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None
    format: object

    def takes(self, name: str) -> bool:
        """Whether the group targets a linear."""
        return "Linear" in self.targets or self.patterns.match(name)


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
        patterns = listed_patterns(inventory, label, targets)
        found.append(
            SchemeGroup(
                label=label, targets=tuple(targets), patterns=patterns, weights=weights, inputs=inputs, format=form
            )
        )
    return found


def listed_patterns(inventory: Inventory, where: str, targets: object) -> NamePatterns:
    """Targets or exceptions that are well formed; of a list that is not, nothing."""
    try:
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(f"{targets!r:.100}")
        return NamePatterns(targets)
    except CheckpointError as error:
        inventory.report(CONFIG_FILE, "config-groups", f"{where}: {error}", "a list of names and patterns")
        return NamePatterns(())


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
