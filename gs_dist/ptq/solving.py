"""From a network, settings and data to the cells that take the place of its linears."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from gs_dist.calibration.device import DTYPE_NAMES
from gs_dist.calibration.layer_loop import LayerLoop
from gs_dist.errors import UserError
from gs_dist.model.decoder import LayerInput, Linear
from gs_dist.model.sketch import DEFAULT_ROWS
from gs_dist.model.statistics import LayerStatistics, StatisticsSettings, block_bounds
from gs_dist.ptq.calibration_rows import Row
from gs_dist.ptq.cells import FakeQuantDense, LinearForm
from gs_dist.ptq.kv_cache import QuantKVCache
from gs_dist.ptq.network_helper import NetworkHelper
from gs_dist.ptq.observed_network import ObservedNetwork
from gs_dist.ptq.structure import NetworkLayer, copy_network, display_name, find_linears
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.policy import QuantPolicy, required_statistics
from gs_dist.results.quantized import QuantizedKVCache, QuantizedLayer
from gs_dist.solvers.blas import one_thread
from gs_dist.solvers.kv_cache import cache_scale
from gs_dist.solvers.layer import LayerProblem, above_ceilings, solve_layer
from gs_dist.solvers.strategy import strategy
from gs_dist.wording import printable

__all__ = ["CHEAP", "STATISTICS_BYTES", "Propagation", "observe", "solve_and_warn", "solve_network", "statistics_bytes"]

logger = logging.getLogger(__name__)

Propagation = Literal["original", "quantized"]
"""What layers see while they are observed; as a recipe's `propagation`."""

# Statistics held at a time; a network whose Gram matrices need more is run through several times.
STATISTICS_BYTES = 4 << 30

_NUM_BLOCKS = 8  # reduction blocks, the recipe's default

# Nothing is refused here, as in Golden Stick; what a job would refuse by default is warned of.
_MOST_LOST: float | None = CalibrationConfig.model_fields["max_relative_error"].default
_MOST_LOST_BY_TOKEN: float | None = CalibrationConfig.model_fields["max_token_error"].default

CHEAP = StatisticsSettings(gram=False)


def solve_network(
    network: Any,
    layers: Sequence[NetworkLayer],
    caches: Mapping[str, Any],
    policies: Mapping[str, QuantPolicy | None],
    rows: Sequence[Row],
    helper: NetworkHelper | None,
    *,
    propagation: Propagation = "original",
) -> dict[str, Any]:
    """Observes the network on `rows` and solves layer after layer.

    Args:
        network: any Cell; not changed.
        layers: its decoder layers.
        caches: its `KVCache` cells by full name.
        policies: of every linear and cache by full name; None leaves it alone.
        rows: calibration data.
        helper: drives the network.
        propagation: "original" observes all layers in the network as it is, at once where memory allows;
            "quantized" each layer behind the quantised ones before it, with a pass of its own.

    Returns:
        Full name to fake-quantised cell.

    Raises:
        UserError: a linear or cache that is to be quantised was never reached.
        LayerError: activations that are not finite.
    """
    forms = _by_layer(layers, [form for form in find_linears(network) if policies.get(form.name)])
    asked = [name for name in caches if policies.get(name) is not None]
    if propagation == "original":
        return _solve_part(network, forms, {name: caches[name] for name in asked}, policies, rows, helper)
    cells: dict[str, Any] = {}
    for part in _parts(layers, forms, asked):
        behind = copy_network(network, cells) if cells else network
        own = [(index, form) for index, form in forms if form.name in part]
        held = {name: caches[name] for name in asked if name in part}
        cells.update(_solve_part(behind, own, held, policies, rows, helper))
    return cells


def _parts(
    layers: Sequence[NetworkLayer], linears: Sequence[tuple[int, LinearForm]], caches: Sequence[str]
) -> list[set[str]]:
    """Names of linears and caches that are solved together, in the network's order: a layer's, or one outside all."""
    within = {form.name: layer.index for layer in layers for form in layer.linears}
    within |= {name: layer.index for layer in layers for name in caches if name.startswith(f"{layer.name}.")}
    parts: dict[object, set[str]] = {}
    for name in [*(form.name for _, form in linears), *caches]:
        parts.setdefault(within.get(name, name), set()).add(name)
    return list(parts.values())


def _solve_part(
    network: Any,
    linears: Sequence[tuple[int, LinearForm]],
    caches: Mapping[str, Any],
    policies: Mapping[str, QuantPolicy | None],
    rows: Sequence[Row],
    helper: NetworkHelper | None,
) -> dict[str, Any]:
    """Cells of those linears, given with their layers, and of `caches`, all observed in `network` as it is."""
    forms = [form for _, form in linears]
    asked = {name: policy for name in caches if (policy := policies.get(name)) is not None}
    static = [name for name, policy in asked.items() if policy.kvcache_quant_granularity == "per_channel"]
    observed = ObservedNetwork(
        network,
        inputs=[_input(form) for form in forms],
        linears=[_linear(form) for form in forms],
        caches=static,
        helper=helper,
    )
    settings = required_statistics(observed.inputs, policies, gram=False, sketch_rows=DEFAULT_ROWS)
    cells: dict[str, Any] = {}
    for name in asked:
        cells[name] = QuantKVCache(name, caches[name].channels, asked[name])
    if static:
        _fill_caches(static, cells, observe(observed, dict.fromkeys(_cache_names(static), CHEAP), rows))
    for group in _passes(linears, settings):
        statistics = observe(observed, {form.name: settings[form.name] for _, form in group}, rows)
        for index in sorted({index for index, _ in group}):
            chosen = [form for layer, form in group if layer == index]
            cells.update(_solve_linears(index, chosen, policies, statistics, observed))
    return cells


def _by_layer(layers: Sequence[NetworkLayer], forms: Sequence[LinearForm]) -> list[tuple[int, LinearForm]]:
    """Each linear with its layer's index; -1 for one outside every layer."""
    owner = {form.name: layer.index for layer in layers for form in layer.linears}
    return [(owner.get(form.name, -1), form) for form in forms]


def _passes(
    linears: Sequence[tuple[int, LinearForm]], settings: Mapping[str, StatisticsSettings]
) -> Iterator[list[tuple[int, LinearForm]]]:
    """Splits the linears so that the statistics of each part fit `STATISTICS_BYTES`, one linear at least."""
    group: list[tuple[int, LinearForm]] = []
    held = 0
    for index, form in linears:
        needed = statistics_bytes(form.in_features, settings[form.name])
        if group and held + needed > STATISTICS_BYTES:
            yield group
            group, held = [], 0
        group.append((index, form))
        held += needed
    if group:
        yield group


def statistics_bytes(channels: int, settings: StatisticsSettings) -> int:
    """Bytes of one input's statistics over all live partial sums of the reduction tree."""
    return settings.nbytes(channels) * (_NUM_BLOCKS.bit_length() + 1)


def observe(
    observed: ObservedNetwork, settings: Mapping[str, StatisticsSettings], rows: Sequence[Row]
) -> LayerStatistics:
    """Statistics of those activations over all rows.

    Raises:
        UserError: a linear was never reached.
    """
    observed.observe_only(settings)
    loop = LayerLoop(
        [observed],
        settings={observed.index: settings},
        channels={observed.index: observed.channels},
        blocks=block_bounds(len(rows), _NUM_BLOCKS),
    )
    for index, row in enumerate(rows):
        loop.run(index, row)
    statistics = loop.merged(observed.index)
    for name, seen in statistics.items():
        if seen.num_tokens == 0:
            raise UserError(
                f"{display_name(name)}: no calibration token reached it, so that it cannot be quantised: give data "
                "that does, call it outside ms.jit, or add it to opname_blacklist"
            )
    return statistics


def _solve_linears(
    index: int,
    forms: Sequence[LinearForm],
    policies: Mapping[str, QuantPolicy | None],
    statistics: LayerStatistics,
    observed: ObservedNetwork,
) -> dict[str, Any]:
    """Solves linears of one layer, each with an input of its own: what lies before it is unknown."""
    solved: dict[str, Any] = {}
    for dtype in {DTYPE_NAMES.get(form.dtype, "float32") for form in forms}:
        alike = [form for form in forms if DTYPE_NAMES.get(form.dtype, "float32") == dtype]
        problem = LayerProblem(
            layer=index,
            prefix="",
            inputs=tuple(_input(form) for form in alike),
            linears=tuple(_linear(form) for form in alike),
            tensors=observed.tensors(form.name for form in alike),
            statistics=statistics,
            policies={form.name: policies[form.name] for form in alike},
            scale_dtype=dtype,
        )
        layer = solve_and_warn(problem)
        for form in alike:
            quantized = layer.linears[form.name]
            solved[form.name] = FakeQuantDense(form, strategy(quantized.policy), quantized)
    return solved


def solve_and_warn(problem: LayerProblem) -> QuantizedLayer:
    """The layer quantised, with a warning of each linear that a job would refuse by default."""
    with one_thread():  # on several BLAS sums in another order
        layer = solve_layer(problem)
    for name, why in above_ceilings(layer.rows, _MOST_LOST, _MOST_LOST_BY_TOKEN).items():
        logger.warning(
            "%s is destroyed by rounding: %s, from which a job would refuse it; give it another config in "
            "layer_policies, or None",
            printable(display_name(name)),
            why,
        )
    return layer


def _cache_names(caches: Sequence[str]) -> list[str]:
    return [f"{name}.{kind}" for name in caches for kind in ("key", "value")]


def _fill_caches(names: Sequence[str], cells: Mapping[str, Any], statistics: LayerStatistics) -> None:
    for name in names:
        key, value = (cache_scale(statistics[f"{name}.{kind}"], scale_dtype="float32") for kind in ("key", "value"))
        cells[name].fill(QuantizedKVCache(key_scale=key, value_scale=value))


def _input(form: LinearForm) -> LayerInput:
    return LayerInput(name=form.name, channels=form.in_features, linears=(form.name,), source=None)


def _linear(form: LinearForm) -> Linear:
    return Linear(name=form.name, out_features=form.out_features, in_features=form.in_features, bias=form.bias)
