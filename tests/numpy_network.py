"""A decoder in a few NumPy products, in place of the one that MindSpore runs: as deterministic, and not a model.

For tests of what a job does around its layers, which run it thousands of times. What a layer observes depends on the
samples, on every tensor of the layer, and on all layers before it, published or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.device_kind import DeviceKind
from gs_dist.results.quantized import QuantizedLayer

Array = npt.NDArray[Any]


class NumpyDevice:
    """Tensors are arrays."""

    kind = DeviceKind.CPU

    def to_tensor(self, array: Array, dtype: Any = None) -> Array:
        return array

    def to_numpy(self, tensor: Array) -> Array:
        return tensor

    def peak_memory(self) -> int:
        return 1


class NumpyNetwork:
    """What `StagePass` asks of a `DecoderNetwork`."""

    def __init__(self, architecture: DecoderArchitecture, device: NumpyDevice) -> None:
        self._architecture = architecture

    def outer_weights(self, tensors: Mapping[str, Array]) -> Array:
        return tensors["model.embed_tokens.weight"].astype(np.float32)

    def embed(self, outer: Array, ids: Array) -> Array:
        return outer[ids]

    def layer_weights(
        self, layer: int, tensors: Mapping[str, Array], quantized: QuantizedLayer | None = None
    ) -> tuple[int, dict[str, float]]:
        """A number a tensor."""
        present = dict(tensors) if quantized is None else dict(quantized.tensors)
        if quantized is not None:
            present |= {f"{name}.weight": linear.dequantized() for name, linear in quantized.linears.items()}
        return layer, {name: float(np.abs(array.astype(np.float64)).sum()) for name, array in sorted(present.items())}

    def forward_layer(
        self, weights: tuple[int, dict[str, float]], hidden: Array, *, capture: bool, seen: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        layer, numbers = weights
        spec = self._architecture.layers[layer]
        shape = hidden.shape[:-1]
        factor = np.float32(1 + 0.01 * np.sin(sum(numbers.values())))
        captured = {}
        for place, (name, channels) in enumerate(spec.channels.items()):
            repeated = np.tile(hidden, -(-channels // hidden.shape[-1]))[..., :channels]
            captured[name] = np.ascontiguousarray(repeated * (factor + place)).reshape(*shape, channels)
        return np.tanh(hidden * factor) + np.float32(0.1) * hidden, captured if capture else {}
