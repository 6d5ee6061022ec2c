"""Whether quantised weights are those of a float model: each linear is turned back and held beside its source.

Nothing is taken from the codec that wrote the directory: a dialect's layout turns integers back by itself. Algorithms
move factors of channels between a linear and what feeds it. Where a norm feeds it, the factors are read off the norm;
where another linear does (`v_proj`, `up_proj`), they are fitted to that one's rows, and the reader must undo them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import DialectLayout, Layout
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.stored_linear import code_tensors
from gs_dist.model.decoder import LayerInput

__all__ = ["LIMITS", "compare_with_source", "judge_weight"]

Array = npt.NDArray[Any]

# Share of the weight's energy that may be lost: of a linear as a whole, and of any of its rows and columns. Rounding to
# 8 bits loses (absmax / rms / 127)^2 / 12, and to 4 bits up to a half where outliers set the ranges.
LIMITS: Mapping[str, tuple[float, float]] = {"FLOAT": (1e-3, 1e-2), "W8": (0.1, 0.5), "W4": (0.5, 0.99)}
_ODD = 16  # times the median column's loss from which a column that lost its own energy is another


def compare_with_source(
    inventory: Inventory, layout: Layout, dialect: DialectLayout, sound: set[str], source: CheckpointReader
) -> str:
    """Reports tensors that are not the source's, and linears that are not its roundings.

    Args:
        inventory: problems go to it.
        layout: expected tensors and kinds of linears.
        dialect: turns integers back.
        sound: tensors whose form and values are right.
        source: the float model.

    Returns:
        In words how far the linears are from their source.
    """
    architecture = inventory.architecture
    assert architecture is not None  # a layout is built from it
    if source.architecture.layers != architecture.layers:
        found = f"{source.directory.name} has other layers: {source.architecture.num_layers} of another form"
        inventory.report("config.json", "source-architecture", found, "the model that this one was made from")
        return "another architecture"
    _compare_carried(inventory, source)
    worst = ("", 0.0)
    for layer in range(architecture.num_layers):
        inputs = architecture.layers[layer].inputs
        comparison = _Layer(inventory, layout, dialect, sound, source, architecture.layer_prefix(layer), inputs)
        for layer_input in inputs:
            for name, error in comparison.compare(layer_input).items():
                worst = max(worst, (name, error), key=lambda entry: entry[1])
    return f"largest loss of a weight's energy {worst[1]:.3g}, in {worst[0]}" if worst[0] else "no linear to compare"


def _compare_carried(inventory: Inventory, source: CheckpointReader) -> None:
    """Embedding, final norm, head, and norms of queries and keys are the source's bit for bit."""
    carried = {name for name, _ in source.architecture.carried}
    for name, info in source.tensors.items():
        inside = name.startswith("model.layers.") and name not in carried
        held = inventory.tensors.get(name)
        if (inside and not name.endswith(("q_norm.weight", "k_norm.weight"))) or held is None:
            continue
        if held.shape != info.shape or held.dtype != info.dtype:
            inventory.report_tensor(name, "source-tensor", f"{held.dtype} {held.shape}", f"{info.dtype} {info.shape}")
            continue
        theirs = source.read([name])[name].reshape(-1, info.shape[-1])
        start = 0
        for block in inventory.chunks(name):
            if block.tobytes() != theirs[start : start + len(block)].tobytes():
                inventory.report_tensor(name, "source-tensor", "other values", f"those of {source.directory.name}")
                break
            start += len(block)


@dataclass
class _Layer:
    """One layer's linears beside their source; keeps the factors that were fitted to rows."""

    inventory: Inventory
    layout: Layout
    dialect: DialectLayout
    sound: set[str]
    source: CheckpointReader
    prefix: str
    inputs: tuple[LayerInput, ...]

    def __post_init__(self) -> None:
        self._rows: dict[str, Array] = {}

    def compare(self, layer_input: LayerInput) -> dict[str, float]:
        """Full name of each linear of the input to the share of energy that its published weight misses."""
        factors = self._columns(layer_input)
        feeds = {other.source for other in self.inputs}
        found = {}
        for linear in layer_input.linears:
            name = self.prefix + linear
            weight = self._published(name)
            if weight is None:
                continue
            expected = self.source.read([f"{name}.weight"])[f"{name}.weight"].astype(np.float32) * factors
            if linear in feeds:
                expected = expected * self._fit_rows(linear, weight, expected)[:, None]
            found[name] = self._judge(name, weight, expected)
        return found

    def _published(self, name: str) -> Array | None:
        kind = self.layout.kinds.get(name, "?")
        own = [tensor for tensor in self.layout.tensors if tensor.rpartition(".")[0] == name]
        needed = [tensor for tensor in own if not self.layout.tensors[tensor].optional and ".kv_cache_" not in tensor]
        if kind == "?" or not self.sound.issuperset(needed):
            return None
        if kind == "FLOAT":
            return self.inventory.read(f"{name}.weight").astype(np.float32)
        return self.dialect.dequantized(self.inventory, name, kind)

    def _columns(self, layer_input: LayerInput) -> Array:
        """What the published weight's columns are multiplied by against the source, (channels,) float32."""
        none = np.ones(layer_input.channels, np.float32)
        if layer_input.source is None:
            return none
        if layer_input.source in self._rows:
            rows = self._rows[layer_input.source]
            if layer_input.repeat > 1:
                rows = np.repeat(rows.reshape(-1, layer_input.head_dim), layer_input.repeat, axis=0).reshape(-1)
            return np.asarray(1 / rows)
        name = f"{self.prefix}{layer_input.source}.weight"
        if name not in self.sound or self.inventory.tensors[name].shape != (layer_input.channels,):
            return none
        published = self.inventory.read(name).astype(np.float32)
        theirs = self.source.read([name])[name].astype(np.float32)
        return np.asarray(np.divide(theirs, published, out=none, where=(published != 0) & (theirs != 0)))

    def _fit_rows(self, linear: str, weight: Array, expected: Array) -> Array:
        """Factors of the rows by least squares, (out,); 1 for a row that has none."""
        energy = np.einsum("oi,oi->o", expected, expected)
        product = np.einsum("oi,oi->o", weight, expected)
        factors: Array = np.ones_like(energy)
        np.divide(product, energy, out=factors, where=(energy > 0) & (product > 0))
        self._rows[linear] = factors
        return factors

    def _judge(self, name: str, weight: Array, expected: Array) -> float:
        kind = self.layout.kinds[name]
        limits = LIMITS[kind if kind == "FLOAT" else f"W{next(filter(str.isdigit, kind))}"]  # W4A16, MXFP4A16
        return judge_weight(self.inventory, name, weight, expected, limits, self.source.directory.name)


def judge_weight(
    inventory: Inventory, name: str, weight: Array, expected: Array, limits: tuple[float, float], source: str
) -> float:
    """The share of a linear's energy that its published weight misses; more than `limits` is reported.

    Args:
        inventory: problems go to it.
        name: of the linear.
        weight: (out, in), published and turned back.
        expected: the same as the source has it.
        limits: entry of `LIMITS`.
        source: name of the source, for messages.
    """
    limit, line_limit = limits
    lost, energy = np.square(weight - expected), np.square(expected)
    share = float(lost.sum(dtype=np.float64) / max(energy.sum(dtype=np.float64), np.finfo(np.float32).tiny))
    rows = lost.sum(axis=1) > line_limit * energy.sum(axis=1)
    # Small columns may round to nothing, and lose then what all the others lose.
    columns = lost.sum(axis=0)
    odd = (columns > line_limit * energy.sum(axis=0)) & (columns > _ODD * np.median(columns))
    told = [f"{share:.3g} of the weight's energy is missing"] if share > limit else []
    told += [
        f"{int(wrong.sum())} of {wrong.size} {lines} are others, the first {int(np.argmax(wrong))}"
        for lines, wrong in (("rows", rows & (lost.sum(axis=1) > 0)), ("columns", odd))
        if wrong.any()
    ]
    if told:
        others = (tensor for tensor in inventory.tensors if tensor.startswith(f"{name}."))  # of dialects of others
        held = next((n for n in code_tensors(name) if n in inventory.tensors), None) or next(others)
        wanted = f"a rounding of {source}'s, which loses at most {limit:g}"
        inventory.report_tensor(held, "source-weight", "; ".join(told), wanted)
    return share
