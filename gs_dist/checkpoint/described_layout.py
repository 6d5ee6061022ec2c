"""What a directory must hold by its own description alone, where no network is known that it could be compared with.

Converted mixtures, wrappers and models of any other type are checked by this: every linear has the tensors that its
label or its config group calls for, in forms that agree with each other, and every tensor is described. Written from
the pages and sources that `dialects/*/layout.py` name, and apart from what writes such directories.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from gs_dist.checkpoint.dialects.compressed_tensors.layout import (
    FLOAT_FORMATS,
    SchemeGroup,
    listed_patterns,
    scheme_groups,
)
from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory
from gs_dist.checkpoint.layout import FLOAT_NAMES, Expectation, Layout, Leaves
from gs_dist.model.families import FAMILIES
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["check_scale_biases", "described_layout", "told_by_description"]

_DESCRIPTION = DIALECTS["ascend"].describing_file
_TOLD_BY_ARCHITECTURE = ("FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A8_DYNAMIC", "C8")
_FP8 = "float8_e4m3fn"
_MX_BLOCK = 32
_SHARES = 16  # columns of scale_bias where inputs are spread over ranks (w4a8.py, get_dynamic_quant_param_modelslim)
_CLOSE = 1e-5  # relative to what a channel's terms add up to; sums in float32 differ in their order
_DESCRIBED = ("ascend", "compressed-tensors")
_NO_LINEAR = re.compile(r"(^|\.)\w*(norm|embed|embedding|router|gate|head)\w*$")


def told_by_description(inventory: Inventory, dialect: str) -> bool:
    """Whether the directory's own description must do: its model type is not served, or its number formats are not.

    So it is where layers for multi-token prediction, which conversions may quantise, are not in floats. A model type
    that is served and has a damaged config.json is no such case.
    """
    if dialect in _DESCRIBED and _has_coded_layers_beyond(inventory):
        return True
    if inventory.architecture is None and str(inventory.config.get("model_type")) in FAMILIES:
        return False
    if dialect == "ascend":
        labels = {str(label) for key, label in inventory.descriptions.get(_DESCRIPTION, {}).items() if "." in key}
        return inventory.architecture is None or bool(labels - set(_TOLD_BY_ARCHITECTURE))
    if dialect == "compressed-tensors":
        floats = [group for group in scheme_groups(inventory) if group.weights.get("type") == "float"]
        known = all(group.format in FLOAT_FORMATS and group.inputs is None for group in floats)
        return inventory.architecture is None or not known
    return False


def _has_coded_layers_beyond(inventory: Inventory) -> bool:
    """Whether something of the layers behind the last is stored in another form than floats."""
    carried = () if inventory.architecture is None else inventory.architecture.carried
    return any(inventory.tensors[name].dtype not in FLOAT_NAMES for name, _ in carried)


def described_layout(inventory: Inventory, dialect: str) -> Layout:
    """Expected tensors by the description; its own faults are reported."""
    layout = Layout(dialect=dialect)
    leaves_of = _of_labels(inventory, layout) if dialect == "ascend" else _of_groups(inventory, layout)
    for name, leaves in leaves_of:
        layout.tensors.update({f"{name}.{leaf}": expectation for leaf, expectation in leaves.items()})
    for name, info in inventory.tensors.items():
        if name not in layout.tensors:
            values = "float" if info.dtype in FLOAT_NAMES else "any"
            layout.tensors[name] = Expectation(dtypes=(info.dtype,), shape=info.shape, values=values)
    return layout


def _of_labels(inventory: Inventory, layout: Layout) -> Iterator[tuple[str, Leaves]]:
    description = inventory.descriptions[_DESCRIPTION]
    for name in inventory.tensors:
        if name not in description:
            inventory.report(_DESCRIPTION, "description-entry", "no entry", "an entry for every tensor", name)
    for key, label in description.items():
        if "." not in key:
            continue
        if key not in inventory.tensors and key != "lm_head.weight":
            inventory.report(_DESCRIPTION, "description-extra", "no such tensor", "entries for tensors alone", key)
        if not key.endswith(".weight") or key not in inventory.tensors:
            continue
        name, info = key.removesuffix(".weight"), inventory.tensors[key]
        if label == "FLOAT":
            if len(info.shape) == 2:
                layout.kinds[name] = "FLOAT"
            if info.dtype not in FLOAT_NAMES:
                wanted = f"{' or '.join(FLOAT_NAMES)}, by its label FLOAT"
                inventory.report_tensor(key, "tensor-dtype", info.dtype, wanted)
            continue
        layout.kinds[name] = str(label)
        rule = _LABELS.get(str(label))
        if rule is None or len(info.shape) != 2:
            known = f"FLOAT or one of {', '.join(_LABELS)}, of two dimensions"
            inventory.report(_DESCRIPTION, "description-label", f"{label!r:.60} {info.shape}", known, key)
            continue
        leaves = rule(*info.shape)
        bias = inventory.tensors.get(f"{name}.scale_bias")
        if rule is _pairs_of_outputs and bias is not None and bias.shape[1:] == (_SHARES,):
            leaves["scale_bias"] = Expectation(dtypes=("float32",), shape=(2 * info.shape[0], _SHARES), values="float")
        yield name, leaves


def _channels(rows: int, columns: int) -> Leaves:
    return {
        "weight": Expectation(dtypes=("int8",), shape=(rows, columns)),
        "weight_scale": Expectation(dtypes=FLOAT_NAMES, shape=(rows, 1), values="scale"),
        "weight_offset": Expectation(dtypes=FLOAT_NAMES, shape=(rows, 1), values="zero"),
    }


def _pairs_of_outputs(rows: int, columns: int) -> Leaves:
    single = ("float32",)
    return {
        "weight": Expectation(dtypes=("int8",), shape=(rows, columns)),
        "weight_scale": Expectation(dtypes=single, shape=(2 * rows, 1), values="scale"),
        "weight_offset": Expectation(dtypes=single, shape=(2 * rows, 1), values="zero"),
        "scale_bias": Expectation(dtypes=single, shape=(2 * rows, 1), values="float"),
    }


def check_scale_biases(inventory: Inventory, layout: Layout, sound: set[str]) -> None:
    """scale_bias of int4 experts is 8 x the sum of code x scale, over all inputs or a sixteenth a column."""
    for name, kind in layout.kinds.items():
        parts = [f"{name}.{leaf}" for leaf in ("weight", "weight_scale", "scale_bias")]
        if kind != "W4A8_DYNAMIC" or not sound.issuperset(parts):
            continue
        octets, scale, found = (inventory.read(part) for part in parts)
        codes = np.empty((2 * len(octets), octets.shape[1]), dtype=np.int8)
        codes[0::2], codes[1::2] = (octets << 4) >> 4, octets >> 4  # the arithmetic shift extends the sign
        if codes.shape[1] % found.shape[1]:
            inventory.report_tensor(parts[2], "scale-bias", found.shape, f"a divisor of {codes.shape[1]} columns")
            continue
        shares = codes.reshape(len(codes), found.shape[1], -1).astype(np.float64)
        expected = 8.0 * shares.sum(axis=2) * scale
        wrong = np.abs(found - expected) > _CLOSE * 8.0 * np.abs(shares).sum(axis=2) * scale
        if wrong.any():
            first = int(np.argmax(wrong.any(axis=1)))
            text = f"{found[first].sum():.6g} in channel {first} ({int(wrong.any(axis=1).sum())} are wrong)"
            inventory.report_tensor(parts[2], "scale-bias", text, f"{expected[first].sum():.6g}")


def _fp8_channels(rows: int, columns: int) -> Leaves:
    return {
        "weight": Expectation(dtypes=(_FP8,), shape=(rows, columns), values="float"),
        "weight_scale": Expectation(dtypes=("float32",), shape=(rows, 1), values="scale"),
        "weight_offset": Expectation(dtypes=FLOAT_NAMES, shape=(rows, 1), values="zero"),
    }


def _mxfp8(rows: int, columns: int) -> Leaves:
    return {
        "weight": Expectation(dtypes=(_FP8,), shape=(rows, columns), values="float"),
        "weight_scale": Expectation(dtypes=("uint8",), shape=(rows, -(-columns // _MX_BLOCK)), values="exponent"),
    }


def _mxfp4(rows: int, pairs: int) -> Leaves:
    return {
        "weight": Expectation(dtypes=("uint8",), shape=(rows, pairs)),
        "weight_scale": Expectation(dtypes=("uint8",), shape=(rows, 2 * pairs // _MX_BLOCK), values="exponent"),
    }


_LABELS: Mapping[str, Callable[[int, int], Leaves]] = {
    "W8A8_DYNAMIC": _channels,
    "W8A16": _channels,
    "W4A8_DYNAMIC": _pairs_of_outputs,
    "W8A8FP8_DYNAMIC": _fp8_channels,
    "W8A8_MXFP8": _mxfp8,
    "W4A8_MXFP": _mxfp4,
    "W4A4_MXFP4": _mxfp4,
    "W4A16_MXFP4": _mxfp4,
}


def _of_groups(inventory: Inventory, layout: Layout) -> Iterator[tuple[str, Leaves]]:
    groups = scheme_groups(inventory)
    ignore = listed_patterns(inventory, "ignore", inventory.quantization_config.get("ignore") or [])
    for name, info in inventory.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "weight_packed") or len(info.shape) != 2:
            continue
        group = None if ignore.match(module) else next((group for group in groups if group.takes(module)), None)
        scaled = f"{module}.weight_scale" in inventory.tensors
        if group is None or (not scaled and _NO_LINEAR.search(module)):
            layout.kinds[module] = "FLOAT"
            if scaled:
                found = "a scale, and no group of config_groups that takes the linear"
                inventory.report(CONFIG_FILE, "config-groups", found, "a group for every quantised linear", module)
            continue
        leaves = _group_tensors(group, info.shape)
        if leaves is None:
            found = f"format {group.format!r:.60} with weights {dict(group.weights)!r:.160}"
            inventory.report(CONFIG_FILE, "scheme", found, "a form that compressed-tensors 0.20 has", module)
            continue
        layout.kinds[module] = _kind(group)
        yield module, leaves


_FLOAT_KINDS: Mapping[str, str] = {
    **{name: form.kind.removesuffix("A16") for name, form in FLOAT_FORMATS.items()},
    "mxfp8-quantized": "MXFP8",
    "float-quantized": "FP8",
}


def _kind(group: SchemeGroup) -> str:
    inputs = group.inputs
    kind = _FLOAT_KINDS.get(str(group.format), f"W{group.weights.get('num_bits')}")
    if inputs is None:
        return f"{kind}A16"
    return f"{kind}A{inputs.get('num_bits')}" + ("_DYNAMIC" if inputs.get("dynamic") else "")


def _group_tensors(group: SchemeGroup, shape: tuple[int, ...]) -> Leaves | None:
    rows, stored = shape
    bits, size = group.weights.get("num_bits"), group.weights.get("group_size") or 0
    if group.format == "int-quantized":
        weight = Expectation(dtypes=("int8",), shape=(rows, stored))
        return {"weight": weight, "weight_scale": Expectation(dtypes=FLOAT_NAMES, shape=(rows, 1), values="scale")}
    if group.format == "float-quantized":
        blocks = group.weights.get("block_structure")
        scales = (-(-rows // blocks[0]), -(-stored // blocks[1])) if blocks else (rows, 1)
        weight = Expectation(dtypes=(_FP8,), shape=(rows, stored), values="float")
        return {"weight": weight, "weight_scale": Expectation(dtypes=FLOAT_NAMES, shape=scales, values="scale")}
    if group.format == "mxfp8-quantized":
        return _mxfp8(rows, stored)
    form = FLOAT_FORMATS.get(str(group.format))
    if form is not None:
        return form.tensors(rows, 2 * stored)
    if group.format == "pack-quantized" and bits in (4, 8):
        columns = stored * 32 // bits  # of words that are full
        scales = (rows, columns // size if size else 1)
        return {
            "weight_packed": Expectation(dtypes=("int32",), shape=(rows, stored)),
            "weight_scale": Expectation(dtypes=FLOAT_NAMES, shape=scales, values="scale"),
            "weight_shape": Expectation(dtypes=("int64", "int32"), shape=(2,), values=f"shape {rows} {columns}"),
        }
    return None
