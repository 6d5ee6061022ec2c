"""A decoder layer of a checkpoint as the layer loop runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.calibration.network import DecoderNetwork, LayerWeights
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.model.decoder import DecoderArchitecture, LayerInput, Linear
from gs_dist.results.quantized import QuantizedLayer

__all__ = ["DecoderLayer"]


class DecoderLayer:
    """One layer: its tensors stay in the checkpoint's file, its weights on the device until dropped.

    Args:
        network: runs it.
        reader: the checkpoint it comes from.
        index: its number in the model.
        quantized: run this published form instead of the checkpoint's weights.
    """

    def __init__(
        self, network: DecoderNetwork, reader: CheckpointReader, index: int, quantized: QuantizedLayer | None = None
    ) -> None:
        self._network = network
        self._reader = reader
        self._quantized = quantized
        self._weights: LayerWeights | None = None
        self.index = index

    @property
    def architecture(self) -> DecoderArchitecture:
        """Of the whole model."""
        return self._reader.architecture

    @property
    def prefix(self) -> str:
        """Dotted prefix of the layer's tensors."""
        return self.architecture.layer_prefix(self.index)

    @property
    def inputs(self) -> tuple[LayerInput, ...]:
        """The activations that its linears read."""
        return self.architecture.inputs(self.index)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its linears."""
        return self.architecture.linears(self.index)

    def tensors(self) -> Mapping[str, npt.NDArray[Any]]:
        """Its tensors by name within the layer, read-only views of the checkpoint's file."""
        return self._reader.read_layer(self.index)

    def load(self) -> LayerWeights:
        """Puts the weights on the device, in the device's compute dtype, unless they are there."""
        if self._weights is None:
            tensors = self.tensors() if self._quantized is None else {}
            self._weights = self._network.layer_weights(self.index, tensors, quantized=self._quantized)
        return self._weights

    def forward(
        self, state: Any, *, capture: bool, mask: npt.NDArray[np.bool_] | None = None
    ) -> tuple[Any, Mapping[str, Any]]:
        """Hidden states (batch, sequence, hidden) after the layer, and what its linears read."""
        return self._network.forward_layer(self.load(), state, capture=capture, seen=mask)
