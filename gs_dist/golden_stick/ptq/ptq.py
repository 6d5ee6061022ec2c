"""`mindspore_gs.ptq.ptq`: the PTQ class that changes the network it is given."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from gs_dist.golden_stick.absent import missing_names
from gs_dist.ptq import algorithm
from gs_dist.ptq.config import PTQConfig, PTQMode
from gs_dist.ptq.network_helper import NetworkHelper
from gs_dist.ptq.structure import exchange_cells

__all__ = ["PTQ", "RoundToNearest"]

__getattr__ = missing_names(
    __name__, {"InputCatcher": "PTQ.apply runs the network as a whole and catches no layer's arguments"}
)

logger = logging.getLogger(__name__)

# What scripts set on `PTQ._config` and nothing here depends on, with why.
_MEANINGLESS = {
    "algorithm_cache_path": "nothing is cached between runs",
    "always_use_fp_input_in_processer": "layers see the float network unless apply gets propagation='quantized'",
    "experimental": "there is one way through",
    "reflash_inputs_after_each_processor": "apply gets propagation='quantized' for that",
    "skip_offload_in_processing": "nothing is offloaded",
    "use_fake_quant": "apply returns a fake-quantised network always",
}


class _Settings(PTQConfig):
    """A PTQConfig whose fields can be set afterwards, as scripts do with `PTQ._config`."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _MEANINGLESS:
            logger.debug("PTQ._config.%s has no effect: %s", name, _MEANINGLESS[name])
            return
        if name not in {field.name for field in fields(PTQConfig)}:
            raise AttributeError(
                f"PTQConfig has no field {name!r}, and no setting of Golden Stick is known by that name"
            )
        changed: dict[str, Any] = {name: value}
        checked = replace(self, **changed)  # refuses what a constructor would refuse
        for field in fields(PTQConfig):
            object.__setattr__(self, field.name, getattr(checked, field.name))

    def set_dump_path(self, path: str) -> None:
        """Taken and not needed: nothing is dumped."""


class PTQ(algorithm.PTQ):
    """`gs_dist.ptq.PTQ` for scripts of Golden Stick: `apply` and `convert` change the network and return it.

    In DEPLOY mode `apply` needs no helper, and `framework` is taken by `apply` without effect.
    """

    def __init__(self, config: dict[str, Any] | PTQConfig | None = None, layer_policies: Any = None) -> None:
        super().__init__(config, layer_policies)
        given = self._config
        self._config = _Settings(**{field.name: getattr(given, field.name) for field in fields(PTQConfig)})

    def apply(
        self, network: Any, network_helper: NetworkHelper | None = None, datasets: Any = None, **kwargs: Any
    ) -> Any:
        """Fake-quantises `network` itself, and returns it; nothing is changed where data or settings are refused."""
        kwargs.pop("framework", None)
        if self._config.mode is PTQMode.DEPLOY and network_helper is None:
            network_helper = NetworkHelper()  # which that mode does not call
        return super().apply(network, network_helper, datasets, **kwargs)

    def convert(self, net_opt: Any, ckpt_path: str = "") -> Any:
        """Turns `net_opt` itself into a network of integers, prints its summary, and returns it."""
        return super().convert(net_opt, ckpt_path)

    def _exchanged(self, network: Any, cells: Mapping[str, Any], *, share_parameters: bool = True) -> Any:
        exchange_cells(network, cells)
        return network


class RoundToNearest(PTQ):
    """`mindspore_gs.ptq.RoundToNearest`: PTQ under its older name. It needs data, too, to tell errors."""
