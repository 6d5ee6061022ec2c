"""Which tensors a directory must hold, by what its own description says: the part that all dialects share.

What a dialect calls for is in the `layout.py` of its folder, written from the format's pages and the loaders'
sources, apart from the codec beside it, so that a codec's fault shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.inventory import CONFIG_FILE, Inventory
from gs_dist.model.decoder import DecoderArchitecture, Linear
from gs_dist.model.dtypes import FLOATS
from gs_dist.recipe.dialects import DIALECTS, description_files

__all__ = [
    "FLOAT_NAMES",
    "STATIC_KINDS",
    "DialectLayout",
    "Expectation",
    "Layout",
    "Leaves",
    "all_linears",
    "build_layout",
    "shared_inputs",
    "described_linears",
    "detect_dialect",
    "with_single",
]

FLOAT_NAMES = tuple(FLOATS)
STATIC_KINDS = ("W8A8", "W8A8_MIX")
"""Kinds of linears with a static scale of their inputs, and what a kernel takes in its place."""
_CACHE = "C8"  # label of scales of an int8 KV cache
_FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


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

    dialect: str
    tensors: dict[str, Expectation] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    kv_layers: list[int] = field(default_factory=list)


Leaves = dict[str, Expectation]
"""Last name of a linear's tensor to what it must be; `weight_rows` has the output channels as its shape, no tensor."""


class DialectLayout(Protocol):
    """A dialect's rules on a directory."""

    def quantized(self, inventory: Inventory, layout: Layout, architecture: DecoderArchitecture) -> dict[str, Leaves]:
        """Full name of every quantised linear to its tensors; puts the kind of every linear and the KV cache's tensors
        into `layout`, and reports faults of the description.
        """

    def check_relations(self, inventory: Inventory, layout: Layout, sound: set[str]) -> None:
        """Reports tensors that contradict each other; `sound` names those whose form and values are right."""

    def dequantized(self, inventory: Inventory, name: str, kind: str) -> npt.NDArray[np.float32]:
        """The weight (out, in) that an engine computes with, of a quantised linear whose tensors are sound."""


def detect_dialect(inventory: Inventory) -> str:
    """The dialect by its description file or quantization_config, "" for none; contradictions are reported."""
    files = description_files()
    methods = {d.quant_method: d.name for d in DIALECTS.values() if d.quant_method is not None}
    found = [name for name in files if name in inventory.descriptions]
    method = inventory.quantization_config.get("quant_method")
    if len(inventory.descriptions) > 1:
        names = " and ".join(sorted(inventory.descriptions))
        inventory.report(sorted(inventory.descriptions)[1], "description-single", names, "one description file")
    if found and "quantization_config" in inventory.config:
        inventory.report(
            CONFIG_FILE, "config-no-quantization", f"quantization_config ({method})", f"none beside {found[0]}"
        )
    if found:
        return files[found[0]]
    if isinstance(method, str) and method in methods:
        return methods[method]
    if inventory.config:
        expected = f"{' or '.join(files)}, or quantization_config of {' or '.join(methods)} in {CONFIG_FILE}"
        inventory.report(CONFIG_FILE, "description-present", "no description of a quantisation", expected)
    return ""


def build_layout(inventory: Inventory, name: str, dialect: DialectLayout, architecture: DecoderArchitecture) -> Layout:
    """Expected tensors of the whole model by the rules of a dialect; faults of its description are reported."""
    layout = Layout(dialect=name)
    outer = {**architecture.outer_tensors(), **dict(architecture.carried)}
    floats = {name: (shape, "float") for name, shape in outer.items()}
    if architecture.tie_word_embeddings and "lm_head.weight" in inventory.tensors:
        floats["lm_head.weight"] = (floats["model.embed_tokens.weight"][0], "tied")
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        for name, shape in architecture.layer_tensors(layer).items():
            floats[prefix + name] = (shape, "float")
    quantized = dialect.quantized(inventory, layout, architecture)
    for name in quantized:
        floats.pop(name + ".weight", None)
        if floats.pop(name + ".bias", None):
            shape = (quantized[name]["weight_rows"].shape[0],)
            layout.tensors[name + ".bias"] = Expectation(dtypes=FLOAT_NAMES, shape=shape, values="float")
        for leaf, expectation in quantized[name].items():
            if leaf != "weight_rows":
                layout.tensors[f"{name}.{leaf}"] = expectation
    for name, (shape, values) in floats.items():
        layout.tensors[name] = Expectation(dtypes=FLOAT_NAMES, shape=shape, values=values)
    return layout


def all_linears(architecture: DecoderArchitecture) -> list[tuple[str, Linear]]:
    """Full name and linear of every linear of the decoder layers."""
    layers = range(architecture.num_layers)
    return [(architecture.layer_prefix(i) + linear.name, linear) for i in layers for linear in architecture.linears(i)]


def shared_inputs(layout: Layout) -> list[tuple[str, ...]]:
    """Full names of linears that read one input and that engines fuse into one, group by group."""
    found = []
    for members in _FUSED:
        firsts = [name for name in layout.kinds if name.endswith(f".{members[0]}")]
        found += [tuple(name.removesuffix(members[0]) + member for member in members) for name in firsts]
    return found


def described_linears(
    inventory: Inventory, layout: Layout, architecture: DecoderArchitecture, file: str, labels: tuple[str, ...]
) -> dict[str, Linear]:
    """Linears that a description file calls quantised; a missing or unknown label is reported."""
    description = inventory.descriptions[file]
    quantized = {}
    for name, linear in all_linears(architecture):
        label = description.get(name + ".weight")
        if label is None:
            inventory.report(file, "description-entry", "no entry", "a label for every linear", name + ".weight")
            looks_float = inventory.tensors.get(name + ".weight")
            label = "FLOAT" if looks_float is None or looks_float.dtype in FLOAT_NAMES else "?"
        if label != "FLOAT" and label not in labels:
            if label != "?":
                known = ", ".join(("FLOAT", *labels))
                inventory.report(file, "description-label", f"{label!r:.60}", f"one of {known}", name + ".weight")
            label = _guess(inventory, name)
        layout.kinds[name] = str(label)
        if label != "FLOAT":
            quantized[name] = linear
    _compare_entries(inventory, description, file)
    _check_labels(inventory, description, file, ("FLOAT", _CACHE, *labels))
    return quantized


def _guess(inventory: Inventory, name: str) -> str:
    """The kind of a linear whose label is missing or unknown, by its tensors."""
    return "W8A8" if name + ".deq_scale" in inventory.tensors else "W8A8_DYNAMIC"


def _check_labels(inventory: Inventory, description: Mapping[str, Any], file: str, known: tuple[str, ...]) -> None:
    """Entries of other tensors than weights of linears have known labels as well; loaders look some of them up."""
    reported = {problem.tensor for problem in inventory.problems if problem.rule == "description-label"}
    for name, label in description.items():
        if "." in name and name in inventory.tensors and label not in known and name not in reported:
            inventory.report(file, "description-label", f"{label!r:.60}", f"one of {', '.join(known)}", name)


def _compare_entries(inventory: Inventory, description: Mapping[str, Any], file: str) -> None:
    reported = {problem.tensor for problem in inventory.problems if problem.rule == "description-entry"}
    for name in inventory.tensors:
        if name not in description and name not in reported:
            inventory.report(file, "description-entry", "no entry", "an entry for every tensor", name)
    for name in description:
        tied = name == "lm_head.weight" and bool(inventory.config.get("tie_word_embeddings"))
        if name.count(".") and name not in inventory.tensors and not tied:
            inventory.report(file, "description-extra", "no such tensor", "entries for tensors that are there", name)


def with_single(dtype: str) -> tuple[str, ...]:
    """The model's dtype, and float32, from which loaders cast."""
    return (dtype,) if dtype == "float32" else (dtype, "float32")
