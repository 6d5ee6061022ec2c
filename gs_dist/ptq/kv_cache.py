"""The place in a network where keys and values enter the cache.

MindFormers' networks have a paged-attention cell there, which Golden Stick exchanges. A network of one's own
has a `KVCache` there instead: it hands keys and values on as they are, shows them to the observers, and is
exchanged for a cell that rounds them as an int8 cache would.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import mint, nn

from gs_dist.ptq.cells import token_scale
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedKVCache

__all__ = ["KVCache", "QuantKVCache"]


class KVCache(nn.Cell):
    """Marks where keys and values enter the cache; computes nothing.

    Call it with keys (after the rotary embedding) and values, both (..., num_kv_heads * head_dim), and go on
    with what it returns.

    Args:
        num_kv_heads: heads of keys and values.
        head_dim: channels of a head.
    """

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.channels = num_kv_heads * head_dim

    def construct(self, key: Any, value: Any) -> tuple[Any, Any]:
        """Keys and values as they are."""
        return key, value


class QuantKVCache(nn.Cell):
    """Keys and values as they come back from an int8 cache, per channel with found scales or per token.

    Parameters: `key_scale` and `value_scale`, (channels,) float32, per channel only; NaN until `fill` or a
    checkpoint sets them.
    """

    def __init__(self, name: str, channels: int, policy: QuantPolicy) -> None:
        super().__init__(auto_prefix=False)
        self.channels = channels
        self.policy = policy
        self.strategy = f"C8-{policy.kvcache_quant_granularity.replace('_', '')}"
        self.key_scale: Any = None
        self.value_scale: Any = None
        if policy.kvcache_quant_granularity == "per_channel":
            self.key_scale = _scale(f"{name}.key_scale", channels)
            self.value_scale = _scale(f"{name}.value_scale", channels)

    def fill(self, cache: QuantizedKVCache) -> None:
        """Takes over what a solver found."""
        if self.key_scale is not None:
            self.key_scale.set_data(ms.Tensor(cache.key_scale))
            self.value_scale.set_data(ms.Tensor(cache.value_scale))

    def construct(self, key: Any, value: Any) -> tuple[Any, Any]:
        """Keys and values rounded to int8 and back, in their own dtype."""
        return self._rounded(key, self.key_scale), self._rounded(value, self.value_scale)

    def _rounded(self, x: Any, scale: Any) -> Any:
        wide = x.astype(ms.float32)
        if scale is None:
            scale = token_scale(wide)
        codes = mint.clamp(mint.round(wide / scale), -128.0, 127.0)
        return (codes * scale).astype(x.dtype)


def _scale(name: str, channels: int) -> Any:
    return ms.Parameter(ms.Tensor(np.full(channels, np.nan, np.float32)), name=name, requires_grad=False)
