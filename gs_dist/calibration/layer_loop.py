"""The loop over decoder layers that both the distributed job and the PTQ class run.

Forward a micro-batch through the layers, show the inputs of the observed ones to their observers, and
merge finished blocks along the fixed tree. What differs between the callers is only where partial sums
of other workers come from: nowhere in one process, from the replicas of a stage in a job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gs_dist.calibration.observers import ExpertObserver, HostObserver, InputObserver
from gs_dist.errors import LayerError
from gs_dist.model.decoder import LayerInput, Linear
from gs_dist.model.statistics import (
    LayerStatistics,
    StatisticsSettings,
    TreeAccumulator,
    TreeNode,
    merge_nodes,
)
from gs_dist.model.token_sample import token_ids
from gs_dist.solvers.blas import one_thread
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = ["LayerLoop", "ObservableLayer", "Watch"]


class ObservableLayer(Protocol):
    """A decoder layer that can be run, and whose linears' inputs can be seen."""

    @property
    def index(self) -> int:
        """Number of the layer in the model."""

    @property
    def prefix(self) -> str:
        """What precedes names within the layer in full names; ends in a dot unless empty."""

    @property
    def inputs(self) -> Sequence[LayerInput]:
        """The activations that its linears read."""

    @property
    def linears(self) -> Sequence[Linear]:
        """Its linears."""

    def forward(
        self, state: Any, *, capture: bool, mask: npt.NDArray[np.bool_] | None = None
    ) -> tuple[Any, Mapping[str, Any]]:
        """Runs the layer on `state`; with `capture` also returns its inputs by name, as (..., channels).

        `mask` (batch, sequence) is False for padding.
        """

    def tensors(self) -> Mapping[str, npt.NDArray[Any]]:
        """Its tensors by name within the layer, in the checkpoint's dtype."""


Watch = Callable[[int, int, Any, Any, Mapping[str, Any], npt.NDArray[np.bool_] | None], None]


class LayerLoop:
    """Runs micro-batches through `layers` and holds the statistics of those in `settings`.

    Args:
        layers: in forward order.
        settings: for each observed layer, input name to what is taken of it (a name that is not one of
            the layer's `inputs`, such as `key`, is a captured activation observed likewise).
        channels: likewise the channels of each input.
        blocks: bounds of the reduction blocks, as `statistics.block_bounds` gives them.
        observer: makes the observer of an input; the host's by default.
        threads: share the inputs that are observed, and what observers share of an input's work.
        watch: told of each observed layer its index, the micro-batch's, hidden states before and behind it, what was
            captured, and the mask; it refuses what it must.
    """

    def __init__(
        self,
        layers: Sequence[ObservableLayer],
        *,
        settings: Mapping[int, Mapping[str, StatisticsSettings]],
        channels: Mapping[int, Mapping[str, int]],
        blocks: Sequence[tuple[int, int]],
        observer: Callable[[int, StatisticsSettings], InputObserver] = HostObserver,
        threads: Threads = ONE_THREAD,
        watch: Watch | None = None,
    ) -> None:
        self._watch = watch
        self._layers = tuple(layers)
        self._blocks = tuple(blocks)
        self._trees = {index: TreeAccumulator() for index in settings}
        routed = {layer.index: {i.name for i in layer.inputs if i.routed} for layer in layers}
        self._observers: dict[int, dict[str, InputObserver | ExpertObserver]] = {
            index: {
                name: _observer(observer(channels[index][name], taken), routed=name in routed[index])
                for name, taken in inputs.items()
            }
            for index, inputs in settings.items()
        }
        self._block: int | None = None
        self._threads = threads

    def run(self, micro_batch: int, state: Any, mask: npt.NDArray[np.bool_] | None = None) -> Any:
        """Runs one micro-batch through all layers; micro-batches of one loop come in ascending order.

        Args:
            micro_batch: its index among all micro-batches of the job.
            state: what the first layer's `forward` takes.
            mask: (batch, sequence) False for padding, None when there is none.

        Returns:
            What the last layer's `forward` gives.
        """
        if self._observers:
            self._enter_block(micro_batch)
        for layer in self._layers:
            observers, before = self._observers.get(layer.index), state
            state, captured = layer.forward(state, capture=observers is not None, mask=mask)
            if observers is None:
                continue
            if self._watch is not None:
                self._watch(layer.index, micro_batch, before, state, captured, mask)
            # The widest first, so that two threads end at about the same time.
            shown = sorted(
                ((observers[name], captured[name]) for name in observers), key=lambda pair: -int(pair[1].shape[-1])
            )
            self._show(micro_batch, shown, mask)
        return state

    def _show(
        self, micro_batch: int, shown: Sequence[tuple[InputObserver, Any]], mask: npt.NDArray[np.bool_] | None
    ) -> None:
        def observe(pair: tuple[InputObserver, Any]) -> None:
            observer, activation = pair
            if isinstance(observer, ExpertObserver):
                num_tokens = int(activation.tokens.max()) + 1
            else:
                num_tokens = math.prod(activation.shape[:-1])
            observer.observe(activation, mask, token_ids(micro_batch, num_tokens))

        with one_thread():
            self._threads.map(observe, shown)

    def _enter_block(self, micro_batch: int) -> None:
        block = next(i for i, (start, stop) in enumerate(self._blocks) if start <= micro_batch < stop)
        if self._block is not None and block != self._block:
            self._finish_block()
        self._block = block

    def _finish_block(self) -> None:
        if self._block is None:
            return
        for index, observers in self._observers.items():
            statistics = {name: observer.take() for name, observer in observers.items()}
            _refuse_non_finite(self._prefix(index), statistics, self._blocks[self._block])
            self._trees[index].push(self._block, statistics)
        self._block = None

    def _prefix(self, index: int) -> str:
        return next(layer.prefix for layer in self._layers if layer.index == index)

    def observes(self, layer: int) -> bool:
        """Whether the layer's statistics are held here."""
        return layer in self._trees

    def nodes(self, layer: int) -> list[TreeNode]:
        """Partial sums of an observed layer over the micro-batches run so far, for `statistics.merge_nodes`."""
        self._finish_block()
        return self._trees[layer].nodes()

    def forget(self, layer: int) -> None:
        """Frees an observed layer's statistics."""
        self._trees.pop(layer, None)
        self._observers.pop(layer, None)

    def merged(self, layer: int, others: Iterable[TreeNode] = ()) -> LayerStatistics:
        """The layer's statistics, merged with the partial sums of other workers."""
        return merge_nodes([*self.nodes(layer), *others], len(self._blocks))


def _observer(observer: InputObserver, *, routed: bool) -> InputObserver | ExpertObserver:
    return ExpertObserver(observer) if routed else observer


def _refuse_non_finite(prefix: str, statistics: LayerStatistics, block: tuple[int, int]) -> None:
    for name, seen in statistics.items():
        finite = np.isfinite(seen.minimum) & np.isfinite(seen.maximum)
        if seen.num_tokens and not finite.all():
            channel = int(np.flatnonzero(~finite)[0])
            where = f"{prefix.rstrip('.')}: " if prefix else ""
            raise LayerError(
                f"{where}the {name} is not finite (channel {channel}, micro-batches {block[0]} to {block[1] - 1}); "
                "the checkpoint's weights overflow or hold NaN at or before this layer: download it again if they do, "
                "or leave these samples out"
            )
