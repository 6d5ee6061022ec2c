"""Kinds of attention as data: linears, what they read, norms and tensor names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gs_dist.model.linear import LayerInput, Linear
from gs_dist.model.rotary import Rotary

__all__ = ["GroupedQueryAttention"]


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Causal attention whose key/value heads each serve `num_heads / num_kv_heads` query heads.

    `qk_norm` is the RMSNorm of queries and keys before the rotary embedding: "none", "head" for one over the
    channels of each head, "all" for one over those of all heads. `window` is how many tokens a query
    sees back, None for all.
    """

    kind: ClassVar[str] = "grouped_query"

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: Rotary
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str = "none"
    window: int | None = None

    @property
    def query_size(self) -> int:
        """Channels of the attention output: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of the keys, and of the values: num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    @property
    def cached(self) -> dict[str, str]:
        """`key` and `value` to the linear that makes what the cache keeps."""
        return {"key": "self_attn.k_proj", "value": "self_attn.v_proj"}

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Queries, keys, values and output, in checkpoint order."""
        rows = (
            ("q_proj", self.query_size, self.hidden_size, self.qkv_bias),
            ("k_proj", self.kv_size, self.hidden_size, self.qkv_bias),
            ("v_proj", self.kv_size, self.hidden_size, self.qkv_bias),
            ("o_proj", self.hidden_size, self.query_size, self.o_bias),
        )
        return tuple(
            Linear(name=f"self_attn.{name}", out_features=out, in_features=channels, bias=bias)
            for name, out, channels, bias in rows
        )

    @property
    def norms(self) -> dict[str, tuple[int, ...]]:
        """Name within the layer to shape of the weights of its own norms, in the order of use."""
        if self.qk_norm == "none":
            return {}
        sizes = (self.head_dim, self.head_dim) if self.qk_norm == "head" else (self.query_size, self.kv_size)
        return {"self_attn.q_norm.weight": (sizes[0],), "self_attn.k_norm.weight": (sizes[1],)}

    def inputs(self, source: str | None) -> tuple[LayerInput, ...]:
        """What its linears read, where `source` is the norm before it."""
        return (
            LayerInput(
                name="attention_input",
                channels=self.hidden_size,
                linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                source=source,
            ),
            LayerInput(
                name="attention_output",
                channels=self.query_size,
                linears=("self_attn.o_proj",),
                source="self_attn.v_proj",
                repeat=self.num_heads // self.num_kv_heads,
                head_dim=self.head_dim,
            ),
        )
