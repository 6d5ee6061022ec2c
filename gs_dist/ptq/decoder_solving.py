"""Solving the package's own decoder, layer by layer as the distributed job does.

Of this network it is known what lies before a linear. Linears that read one input share its rescaling, and the norm
or linear before them takes it up: an engine needs nothing that its format has no place for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt

from gs_dist.calibration.device import current_device
from gs_dist.model.decoder import DecoderArchitecture, LayerInput, Linear
from gs_dist.model.dtypes import FLOATS
from gs_dist.model.sketch import DEFAULT_ROWS
from gs_dist.model.statistics import LayerStatistics, StatisticsSettings
from gs_dist.ptq.calibration_rows import Row
from gs_dist.ptq.cells import FakeQuantDense, linear_form
from gs_dist.ptq.decoder import CausalDecoder, SolvedLayers
from gs_dist.ptq.kv_cache import QuantKVCache
from gs_dist.ptq.network_helper import NetworkHelper
from gs_dist.ptq.observed_network import ObservedNetwork
from gs_dist.ptq.solving import (
    CHEAP,
    STATISTICS_BYTES,
    Propagation,
    observe,
    solve_and_warn,
    solve_network,
    statistics_bytes,
)
from gs_dist.ptq.structure import copy_network
from gs_dist.recipe.policy import QuantPolicy, required_statistics
from gs_dist.results.quantized import QuantizedLayer
from gs_dist.solvers.layer import LayerProblem
from gs_dist.solvers.strategy import strategy

__all__ = ["SolvedDecoder", "solve_decoder"]

Policies = Mapping[str, QuantPolicy | None]
_CACHE = "self_attn.cache"
_CACHED = ("k_proj", "v_proj")


@dataclass(frozen=True)
class SolvedDecoder:
    """Cells that take the place of a decoder's, by full name, and its layers as files hold them."""

    cells: Mapping[str, Any] = field(default_factory=dict)
    layers: SolvedLayers = field(default_factory=SolvedLayers)


def solve_decoder(
    network: CausalDecoder,
    policies: Policies,
    rows: Sequence[Row],
    helper: NetworkHelper | None,
    *,
    propagation: Propagation = "original",
) -> SolvedDecoder:
    """Observes the decoder on `rows` and solves each layer as a whole; arguments are those of `solve_network`.

    Raises:
        UserError: a linear or cache that is to be quantised was never reached.
        LayerError: activations that are not finite.
    """
    architecture = network.architecture
    cells: dict[str, Any] = {}
    layers: dict[int, QuantizedLayer] = {}
    for part in _parts(architecture, policies, propagation):
        behind = copy_network(network, cells) if cells and propagation == "quantized" else network
        statistics = _observed(behind, part, helper, rows)
        for task in part:
            layer = _solve(network, task, statistics)
            layers[task.index] = layer
            cells |= _cells(network, task, layer)
    outer = {name: policy for name, policy in policies.items() if policy and not name.startswith("model.layers.")}
    if outer:
        behind = copy_network(network, cells) if cells and propagation == "quantized" else network
        cells |= solve_network(behind, [], {}, outer, rows, helper)
    return SolvedDecoder(cells, SolvedLayers(layers))


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One layer to solve.

    Attributes:
        index, prefix: of the layer.
        inputs: the layer's inputs.
        policies: by linear name within the layer, the cache's laid over keys and values.
        settings: what to observe of each input that quantised linears read, by the input's name.
        cache: the policy of the KV cache, None where it stays.
    """

    index: int
    prefix: str
    inputs: tuple[LayerInput, ...]
    policies: dict[str, QuantPolicy | None]
    settings: dict[str, StatisticsSettings]
    cache: QuantPolicy | None

    @property
    def static_cache(self) -> bool:
        """Whether keys and values must be observed."""
        return self.cache is not None and self.cache.kvcache_quant_granularity == "per_channel"

    def reader(self, layer_input: LayerInput) -> str:
        """Full name of the linear at which an input is observed."""
        return self.prefix + layer_input.linears[0]

    @property
    def nbytes(self) -> int:
        """Of the statistics while they are gathered."""
        return sum(statistics_bytes(i.channels, self.settings[i.name]) for i in self.inputs if i.name in self.settings)


def _parts(architecture: DecoderArchitecture, policies: Policies, propagation: Propagation) -> Iterator[list[_Task]]:
    """Layers that are observed in one pass: one each behind quantised layers, else as many as memory holds."""
    part: list[_Task] = []
    held = 0
    for index in range(architecture.num_layers):
        task = _task(architecture, index, policies)
        if task is None:
            continue
        if part and (propagation == "quantized" or held + task.nbytes > STATISTICS_BYTES):
            yield part
            part, held = [], 0
        part.append(task)
        held += task.nbytes
    if part:
        yield part


def _task(architecture: DecoderArchitecture, index: int, policies: Policies) -> _Task | None:
    prefix, inputs = architecture.layer_prefix(index), architecture.inputs(index)
    own = {linear.name: policies.get(prefix + linear.name) for linear in architecture.linears(index)}
    cache = policies.get(prefix + _CACHE)
    if cache is None and not any(own.values()):
        return None
    needed = required_statistics(inputs, own, gram=False, sketch_rows=DEFAULT_ROWS)
    settings = {i.name: needed[i.name] for i in inputs if any(own.get(name) for name in i.linears)}
    if cache is not None:
        taken = {
            "kvcache_quant_dtype": cache.kvcache_quant_dtype,
            "kvcache_quant_granularity": cache.kvcache_quant_granularity,
        }
        for name in own:
            if name.endswith(_CACHED):
                policy = own[name]
                own[name] = cache if policy is None else policy.model_copy(update=taken)
    return _Task(index=index, prefix=prefix, inputs=inputs, policies=own, settings=settings, cache=cache)


def _observed(
    network: CausalDecoder, part: Sequence[_Task], helper: NetworkHelper | None, rows: Sequence[Row]
) -> LayerStatistics:
    """Statistics of the part's inputs by the full name of the linear at which they are seen, and of its caches."""
    cells = dict(network.cells_and_names())
    settings: dict[str, StatisticsSettings] = {}
    inputs: list[LayerInput] = []
    linears: list[Linear] = []
    for task in part:
        for layer_input in task.inputs:
            if layer_input.name in task.settings:
                name = task.reader(layer_input)
                form = linear_form(name, cells[name])
                settings[name] = task.settings[layer_input.name]
                inputs.append(LayerInput(name=name, channels=form.in_features, linears=(name,), source=None))
                linears.append(
                    Linear(name=name, out_features=form.out_features, in_features=form.in_features, bias=form.bias)
                )
    caches = [task.prefix + _CACHE for task in part if task.static_cache]
    settings |= {f"{name}.{kind}": CHEAP for name in caches for kind in ("key", "value")}
    observed = ObservedNetwork(network, inputs=inputs, linears=linears, caches=caches, helper=helper)
    return observe(observed, settings, rows) if settings else {}


def _solve(network: CausalDecoder, task: _Task, statistics: LayerStatistics) -> QuantizedLayer:
    architecture = network.architecture
    seen = {i.name: statistics[task.reader(i)] for i in task.inputs if i.name in task.settings}
    if task.static_cache:
        seen |= {kind: statistics[f"{task.prefix}{_CACHE}.{kind}"] for kind in ("key", "value")}
    problem = LayerProblem(
        layer=task.index,
        prefix=task.prefix,
        inputs=task.inputs,
        linears=architecture.linears(task.index),
        tensors=_tensors(network, task.prefix),
        statistics=seen,
        policies=task.policies,
        scale_dtype=architecture.dtype,
        divides_inputs=False,
    )
    return solve_and_warn(problem)


def _tensors(network: CausalDecoder, prefix: str) -> dict[str, npt.NDArray[Any]]:
    """A layer's parameters by name within it, in the checkpoint's dtype."""
    dtype = FLOATS[network.architecture.dtype]
    found: dict[str, npt.NDArray[Any]] = {}
    for parameter in network.get_parameters():
        if parameter.name.startswith(prefix):
            found[parameter.name.removeprefix(prefix)] = parameter.astype(ms.float32).asnumpy().astype(dtype)
    return found


def _cells(network: CausalDecoder, task: _Task, layer: QuantizedLayer) -> dict[str, Any]:
    """What takes the place of the layer's cells: quantised linears, the cache, and floats that were folded into."""
    cells = dict(network.cells_and_names())
    found: dict[str, Any] = {}
    for name, quantized in layer.linears.items():
        form = linear_form(task.prefix + name, cells[task.prefix + name])
        found[task.prefix + name] = FakeQuantDense(form, strategy(quantized.policy), quantized)
    if task.cache is not None:
        full = task.prefix + _CACHE
        cache = QuantKVCache(full, cells[full].channels, task.cache)
        if layer.kv_cache is not None:
            cache.fill(layer.kv_cache)
        found[full] = cache
    return found | _folded(network, cells, task.prefix, layer)


def _folded(network: CausalDecoder, cells: Mapping[str, Any], prefix: str, layer: QuantizedLayer) -> dict[str, Any]:
    """Copies of norms and float linears of the layer whose tensors are no longer those of the network."""
    before = _tensors(network, prefix)
    found: dict[str, Any] = {}
    device = current_device()
    for name, array in layer.tensors.items():
        owner, _, kind = name.rpartition(".")
        if name in before and np.array_equal(before[name], array):
            continue
        full = prefix + owner
        cell = found.setdefault(full, copy_network(cells[full], share_parameters=False))
        parameter = getattr(cell, kind)
        parameter.set_data(device.to_tensor(np.asarray(array).copy(), parameter.dtype))
    return found
