"""A network seen as one observable layer, so that the layer loop of the distributed job serves it too.

The whole network runs once for each row, whatever lies between its layers, and the inputs of its linears
are shown to the observers. Every layer sees what the network that is given sends it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt

from gs_dist.errors import UserError
from gs_dist.model.decoder import LayerInput, Linear
from gs_dist.ptq.calibration_rows import Row, row_mask, row_runner
from gs_dist.ptq.kv_cache import KVCache
from gs_dist.ptq.network_helper import NetworkHelper
from gs_dist.ptq.structure import copy_network, display_name, is_linear

__all__ = ["ObservedNetwork"]

Array = npt.NDArray[Any]


class ObservedNetwork:
    """Implements `calibration.layer_loop.ObservableLayer` for a copy of a network.

    Args:
        network: any Cell; it is copied, hooks go to the copy.
        inputs: of the linears, each named as its linear in full.
        linears: full names.
        caches: full names of `KVCache` cells, observed as `<name>.key` and `<name>.value`.
        helper: drives the network, see `row_runner`.
    """

    prefix = ""

    def __init__(
        self,
        network: Any,
        *,
        inputs: Sequence[LayerInput],
        linears: Sequence[Linear],
        caches: Collection[str],
        helper: NetworkHelper | None,
    ) -> None:
        self.index = 0
        self.inputs = tuple(inputs)
        self.linears = tuple(linears)
        self._captured: dict[str, list[Any]] = {}
        self._observed: frozenset[str] = frozenset()
        self._channels = {layer_input.name: layer_input.channels for layer_input in inputs}
        self._network = copy_network(network)
        self._network.set_train(False)  # dropout would make the statistics a matter of chance
        self._cells = dict(self._network.cells_and_names())
        for linear in linears:
            cell = self._cells[linear.name]
            assert is_linear(cell), linear.name
            cell.register_forward_pre_hook(self._hook(linear.name), with_kwargs=True)
        for name in caches:
            cell = self._cells[name]
            assert isinstance(cell, KVCache), name
            self._channels.update({f"{name}.key": cell.channels, f"{name}.value": cell.channels})
            cell.register_forward_pre_hook(self._cache_hook(name), with_kwargs=True)
        self._run = row_runner(self._network, helper)

    @property
    def channels(self) -> dict[str, int]:
        """Channels of each activation by name."""
        return dict(self._channels)

    def observe_only(self, names: Collection[str]) -> None:
        """Restricts the next passes to these activations."""
        self._observed = frozenset(names)

    def forward(
        self, state: Row, *, capture: bool, mask: npt.NDArray[np.bool_] | None = None
    ) -> tuple[None, Mapping[str, Array]]:
        """Runs a row; with `capture` returns the observed activations, (tokens, channels) each, padding left out."""
        self._captured = {name: [] for name in self._observed}
        self._run(state)
        if not capture:
            return None, {}
        mask = row_mask(state)
        return None, {name: self._tokens(name, mask) for name in self._observed}

    def tensors(self, names: Iterable[str] | None = None) -> Mapping[str, Array]:
        """Weights and biases, in float32 by name, of the linears or of those named."""
        found: dict[str, Array] = {}
        for name in [linear.name for linear in self.linears] if names is None else names:
            cell = self._cells[name]
            found[f"{name}.weight"] = cell.weight.astype(ms.float32).asnumpy()
            if cell.bias is not None:
                found[f"{name}.bias"] = cell.bias.astype(ms.float32).asnumpy()
        return found

    def _hook(self, name: str) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def see(cell: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(name, args[0] if args else next(iter(kwargs.values())))

        return see

    def _cache_hook(self, name: str) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def see(cell: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            key, value = args if len(args) == 2 else (kwargs.get("key", *args[:1]), kwargs["value"])
            self._see(f"{name}.key", key)
            self._see(f"{name}.value", value)

        return see

    def _see(self, name: str, activation: Any) -> None:
        if name not in self._captured:
            return
        channels = self._channels[name]
        if activation.shape[-1] != channels:
            raise UserError(
                f"{display_name(name)}: {activation.shape[-1]} channels came in where {channels} are expected"
            )
        # A copy: the network may go on to change the activation in place.
        array = np.array(activation.astype(ms.float32).asnumpy())
        self._captured[name].append(array.reshape(-1, channels))

    def _tokens(self, name: str, mask: npt.NDArray[np.bool_] | None) -> Array:
        seen = self._captured.pop(name)
        if not seen:
            return np.zeros((0, self._channels[name]), np.float32)
        # A mask speaks of (batch, sequence); an activation that is pooled or routed has other axes.
        kept = [
            tokens[mask.reshape(-1)] if mask is not None and mask.size == len(tokens) else tokens for tokens in seen
        ]
        return np.concatenate(kept)
