"""The likeliest continuation of a text, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor

from gs_dist.calibration._decoding import decoding_step, rounded_cache
from gs_dist.calibration.network import DecoderNetwork, LayerWeights, OuterWeights, attention_form, rotary_tables
from gs_dist.model.decoder import GatedMlp, GroupedQueryAttention

__all__ = ["Generator"]

Ids = npt.NDArray[np.int32]

_ROUND = 64  # lengths are multiples of this, so that few shapes are compiled
_MASKED = -1e30


@dataclass(frozen=True)
class Generator:
    """A model whose weights are on the device, all layers at once.

    Where every layer is a grouped-query attention and a gated mlp, keys and values of earlier tokens are kept, and a
    token costs one row of each linear. Elsewhere each token runs the whole text again.

    Args:
        network: the decoder.
        outer: embedding, final norm and head.
        layers: all layers in order.
    """

    network: DecoderNetwork
    outer: OuterWeights
    layers: Sequence[LayerWeights]

    @property
    def keeps_cache(self) -> bool:
        """Whether keys and values are kept."""
        return all(
            isinstance(layer.spec.attention, GroupedQueryAttention) and isinstance(layer.spec.mlp, GatedMlp)
            for layer in self.layers
        )

    def tokens(self, prompt: Ids, count: int) -> Iterator[int]:
        """Up to `count` ids that follow `prompt` (t,), each the likeliest; the last may be one that ends a text."""
        positions = -(-(len(prompt) + count) // _ROUND) * _ROUND
        made = self._with_cache if self.keeps_cache else self._without_cache
        for number, token in enumerate(made(prompt, positions)):
            if number == count:
                return
            yield token
            if number + 1 == count or token in self.network.architecture.eos_token_ids:
                return

    def _without_cache(self, prompt: Ids, positions: int) -> Iterator[int]:
        ids = np.zeros((1, positions), np.int32)
        ids[0, : len(prompt)] = prompt
        for known in range(len(prompt), positions):
            hidden = self.network.embed(self.outer, ids)
            for weights in self.layers:
                hidden, _ = self.network.forward_layer(weights, hidden, capture=False)
            ids[0, known] = self._likeliest(hidden[:, known - 1 : known])
            yield int(ids[0, known])

    def _with_cache(self, prompt: Ids, positions: int) -> Iterator[int]:
        ids = np.zeros((1, positions), np.int32)
        ids[0, : len(prompt)] = prompt
        hidden = self.network.embed(self.outer, ids)
        caches = []
        for weights in self.layers:
            hidden, captured = self.network.forward_layer(weights, hidden)
            caches.append(self._kept(weights, captured))
        token = self._likeliest(hidden[:, len(prompt) - 1 : len(prompt)])
        yield token
        for position in range(len(prompt), positions):
            state = self.network.embed(self.outer, np.array([[token]], np.int32))[0]
            for number, weights in enumerate(self.layers):
                state, *kept = self._step(weights, state, caches[number], position, positions)
                caches[number] = ms.mutable(tuple(kept))
            token = self._likeliest(state.reshape((1, 1, -1)))
            yield token

    def _kept(self, weights: LayerWeights, captured: dict[str, Any]) -> Any:
        """Keys and values of the text as the cache holds them; those behind its end are written over in time."""
        scales = weights.attention[3]
        parts = zip(("key", "value"), weights.kv_schemes, scales, strict=True)
        return ms.mutable(tuple(rounded_cache(captured[name][0], scheme, scale) for name, scheme, scale in parts))

    def _step(self, weights: LayerWeights, state: Tensor, cached: Any, position: int, positions: int) -> Any:
        device, dtype = self.network.device, self.network.dtype
        attention = weights.spec.attention
        tables = [table[position : position + 1] for table in rotary_tables(attention, positions)]
        rotary = ms.mutable(tuple(device.to_tensor(np.ascontiguousarray(table), dtype) for table in tables))
        seen = np.arange(positions)
        place = (seen == position).astype(np.float32)[:, None]
        looks = (seen <= position) & (position - seen < (attention.window or positions))
        unseen = np.where(looks, 0.0, _MASKED).astype(np.float32)[None, None]
        epsilon = self.network.architecture.rms_norm_eps
        residual = (weights.spec.norms_after, weights.spec.residual_multiplier)
        form = (residual, epsilon, weights.mlp_schemes, attention_form(weights, epsilon, 1, 0))
        return decoding_step(
            state,
            weights.attention,
            weights.mlp,
            weights.norms,
            rotary,
            cached,
            device.to_tensor(place, dtype),
            device.to_tensor(unseen, dtype),
            form,
        )

    def _likeliest(self, hidden: Tensor) -> int:
        logits = self.network.device.to_numpy(self.network.logits(self.outer, hidden))
        return int(logits.reshape(-1).astype(np.float32).argmax())
