"""The PTQ class of Golden Stick: quantise a network of cells in one process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mindspore as ms
from mindspore import nn

from gs_dist.errors import UserError
from gs_dist.ptq.calibration_rows import read_rows
from gs_dist.ptq.cells import FakeQuantDense, LinearForm, QuantDense
from gs_dist.ptq.checkpoint_loading import load_parameters
from gs_dist.ptq.config import PTQConfig, PTQMode, check_schemes, config_from_fields
from gs_dist.ptq.decoder import CausalDecoder, DecoderLayer
from gs_dist.ptq.decoder_solving import solve_decoder
from gs_dist.ptq.kv_cache import KVCache, QuantKVCache
from gs_dist.ptq.network_helper import NetworkHelper
from gs_dist.ptq.policies import checked_layer_policies, resolve_cells
from gs_dist.ptq.solving import solve_network
from gs_dist.ptq.structure import NetworkLayer, copy_network, find_layers, find_linears
from gs_dist.ptq.summary_table import strategy_rows, strategy_table
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.solvers.strategy import strategy
from gs_dist.wording import printable

__all__ = ["PTQ"]

logger = logging.getLogger(__name__)


class PTQ:
    """Post-training quantisation of weights, activations and KV cache, combined at will (`mindspore_gs.ptq.PTQ`).

    Differences from Golden Stick: a dict of PTQConfig fields is accepted as `config`; neither the network
    nor any config of the caller is changed, `apply` and `convert` return a network of their own; names are
    matched as the network gives them, without `network.` before; a linear outside every decoder layer is
    quantised if a key of `layer_policies` matches it; a setting that affects no layer is an error; a linear that a
    job would refuse as destroyed by rounding is warned of.

    Args:
        config: settings of the network, PTQConfig() if None.
        layer_policies: regular expression to settings of the layers it matches, from the start of their
            full dotted names (`re.match`); None leaves them as they are. The order does not matter.

    Attributes:
        decoder_layer_types: types of decoder layers to look for, this package's own to begin with; add your
            network's before `apply`. Where none is found the whole network is taken as one layer.

    Raises:
        TypeError: `config` is neither PTQConfig nor dict; `layer_policies` is no OrderedDict, has a key
            that is not a regular expression, or a value that is neither PTQConfig nor None.
        ValueError: QUANTIZE outside PyNative mode; int8 activations without quantised weights; another
            combination that no algorithm serves.
    """

    def __init__(self, config: dict[str, Any] | PTQConfig | None = None, layer_policies: Any = None) -> None:
        if config is None:
            config = PTQConfig()
        elif isinstance(config, dict):
            config = config_from_fields(config)
        elif not isinstance(config, PTQConfig):
            raise TypeError(f"config must be a PTQConfig or a dict of its fields, but got {type(config).__name__}")
        check_schemes(config, "config")
        _ = config.policy  # refuses what the solvers would refuse
        _require_pynative(config)
        self._config = config
        self._layer_policies = checked_layer_policies(layer_policies, config)
        self.decoder_layer_types: list[type] = [DecoderLayer]

    def apply(
        self, network: Any, network_helper: NetworkHelper | None = None, datasets: Any = None, **kwargs: Any
    ) -> Any:
        """Returns a fake-quantised copy of `network`, or in DEPLOY mode a structure for a checkpoint to load into.

        Args:
            network: any Cell with `nn.Dense` or `mint.nn.Linear` in it; not changed.
            network_helper: drives the network, needed in DEPLOY mode; without, rows of the data are the
                arguments of the network.
            datasets: calibration data, see `calibration_rows.read_rows`; unused in DEPLOY mode.
            **kwargs: `decoder_layer_types`, a sequence that takes the place of the attribute; `propagation`,
                "original" (the default: every layer is observed in the network as it is) or "quantized" (each layer
                behind the quantised ones before it, as Golden Stick's GPTQ does, at the price of one pass a layer).

        Returns:
            A new network. It shares the parameters of what was not quantised with the caller's.

        Raises:
            RuntimeError: the algorithm was not initialised; two patterns match one layer.
            TypeError: `network` is no Cell; an unknown keyword; data of an unknown kind.
            ValueError: DEPLOY without helper; another `propagation`; no data; QUANTIZE outside PyNative mode; a setting
                that affects no layer, or nothing is quantised.
        """
        self._require_initialized()
        _require_cell("network", network)
        layer_types = tuple(kwargs.pop("decoder_layer_types", self.decoder_layer_types))
        propagation = kwargs.pop("propagation", "original")
        if kwargs:
            known = "decoder_layer_types and propagation"
            raise TypeError(f"apply knows no keyword {next(iter(kwargs))!r}: it takes {known}")
        if propagation not in ("original", "quantized"):
            raise ValueError(f"propagation must be 'original' or 'quantized', but got {propagation!r}")
        if network_helper is not None and not isinstance(network_helper, NetworkHelper):
            raise TypeError(f"network_helper must be a NetworkHelper, but got {type(network_helper).__name__}")
        deploy = self._config.mode is PTQMode.DEPLOY
        if deploy and network_helper is None:
            raise ValueError("network_helper is None: PTQMode.DEPLOY needs one")
        _require_pynative(self._config)
        rows = [] if deploy else read_rows(datasets)
        layers = self._layers(network, layer_types)
        caches = {name: cell for name, cell in network.cells_and_names() if isinstance(cell, KVCache)}
        policies = self._resolve(network, layers, list(caches))
        if deploy:
            return self._exchanged(network, dict(_placeholders(network, caches, policies)))
        if isinstance(network, CausalDecoder):
            solved = solve_decoder(network, policies, rows, network_helper, propagation=propagation)
            applied = self._exchanged(network, solved.cells)
            applied.solved = solved.layers
            return applied
        cells = solve_network(network, layers, caches, policies, rows, network_helper, propagation=propagation)
        return self._exchanged(network, cells)

    def convert(self, net_opt: Any, ckpt_path: str = "") -> Any:
        """Returns a copy of a fake-quantised network that holds integers, and prints its summary.

        Args:
            net_opt: what `apply` returned; not changed.
            ckpt_path: a checkpoint (.ckpt or .safetensors) of such a converted network to load, or for this
                package's decoder the model.safetensors.index.json of a directory that a job published;
                "" for none.

        Raises:
            TypeError: `net_opt` is no Cell, `ckpt_path` no str.
            ValueError: `ckpt_path` is no file, or does not hold the network's parameters; `net_opt` holds
                no quantised cell.
        """
        _require_cell("net_opt", net_opt)
        if not isinstance(ckpt_path, str):
            raise TypeError(f"ckpt_path must be a str, but got {type(ckpt_path).__name__}")
        if ckpt_path and not os.path.isfile(ckpt_path):
            raise ValueError(f"ckpt_path is {ckpt_path!r}: there is no such file")
        cells = dict(net_opt.cells_and_names())
        if not any(isinstance(cell, FakeQuantDense | QuantDense | QuantKVCache) for cell in cells.values()):
            raise UserError("net_opt holds no quantised cell: convert takes the network that apply returned")
        exchanged = {name: cell.converted() for name, cell in cells.items() if isinstance(cell, FakeQuantDense)}
        converted = self._exchanged(net_opt, exchanged, share_parameters=not ckpt_path)
        if ckpt_path:
            load_parameters(converted, ckpt_path)
        self.summary(converted)
        return converted

    def summary(self, network: Any) -> None:
        """Prints how every linear and KV cache of a network is quantised, as in `W8-perchannel-A8-pertensor`.

        Prints nothing for a network without any.

        Raises:
            TypeError: `network` is no Cell.
        """
        _require_cell("network", network)
        table = strategy_table(strategy_rows(network))
        if table:
            print(printable(table))

    def _exchanged(self, network: Any, cells: Mapping[str, Any], *, share_parameters: bool = True) -> Any:
        """The network with cells exchanged: a copy of it. `share_parameters` lets the copy hold the others'."""
        return copy_network(network, cells, share_parameters=share_parameters)

    def _require_initialized(self) -> None:
        if not isinstance(getattr(self, "_config", None), PTQConfig):
            raise RuntimeError(
                f"{type(self).__name__} is not initialised: call PTQ.__init__ in the subclass's own before apply"
            )

    def _layers(self, network: Any, layer_types: Sequence[type]) -> list[NetworkLayer]:
        layers = find_layers(network, layer_types)
        if layers:
            return layers
        logger.warning(
            "no decoder layer of the types %s in %s: the whole network is taken as one layer; add its decoder layer's "
            "type to PTQ.decoder_layer_types",
            [kind.__name__ for kind in layer_types],
            type(network).__name__,
        )
        return [NetworkLayer(index=0, name="", linears=tuple(find_linears(network)))]

    def _resolve(
        self, network: Any, layers: Sequence[NetworkLayer], caches: Sequence[str]
    ) -> dict[str, QuantPolicy | None]:
        names = [form.name for form in find_linears(network)]
        within = {form.name for layer in layers for form in layer.linears}
        outer = [name for name in names if name not in within]
        return resolve_cells(names, caches, outer, self._config, self._layer_policies)


def _placeholders(
    network: Any, caches: dict[str, Any], policies: dict[str, QuantPolicy | None]
) -> Iterator[tuple[str, Any]]:
    forms: dict[str, LinearForm] = {form.name: form for form in find_linears(network)}
    for name, policy in policies.items():
        if policy is None:
            continue
        if name in forms:
            yield name, QuantDense(forms[name], policy, strategy(policy))
        else:
            yield name, QuantKVCache(name, caches[name].channels, policy)


def _require_cell(name: str, value: Any) -> None:
    if not isinstance(value, nn.Cell):
        raise TypeError(f"{name} must be a mindspore.nn.Cell, but got {type(value).__name__}")


def _require_pynative(config: PTQConfig) -> None:
    if config.mode is PTQMode.QUANTIZE and ms.get_context("mode") != ms.PYNATIVE_MODE:
        raise ValueError(
            "PTQMode.QUANTIZE runs in PyNative mode: call mindspore.set_context(mode=mindspore.PYNATIVE_MODE)"
        )
