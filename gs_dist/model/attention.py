"""Kinds of attention as data: linears, what they read, norms and tensor names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gs_dist.model.linear import LayerInput, Linear
from gs_dist.model.rotary import Rotary

__all__ = ["Attention", "GroupedQueryAttention", "LatentAttention"]


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Causal attention whose key/value heads each serve `num_heads / num_kv_heads` query heads.

    `qk_norm` is the RMSNorm of queries and keys before the rotary embedding: "none", "head" for one over the
    channels of each head, "all" for one over those of all heads. `window` is how many tokens a query
    sees back, None for all. `stated_scale` is what products of queries and keys are multiplied by, None for
    1 / sqrt(head_dim). Where `fused`, one linear makes queries, keys and values, in this order.
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
    stated_scale: float | None = None
    fused: bool = False

    @property
    def query_size(self) -> int:
        """Channels of the queries, and of the attention output: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def table_channels(self) -> int:
        """Channels that tables of the rotary embedding have: those of a head."""
        return self.head_dim

    @property
    def output_size(self) -> int:
        """Channels of the attention output."""
        return self.query_size

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return float(self.head_dim**-0.5) if self.stated_scale is None else self.stated_scale

    @property
    def kv_size(self) -> int:
        """Channels of the keys, and of the values: num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    @property
    def captured(self) -> tuple[str, ...]:
        """Names of the activations that a forward pass may show, in its order."""
        return ("attention_input", "attention_output", "key", "value")

    @property
    def cached(self) -> dict[str, str]:
        """`key` and `value` to the linear that makes what the cache keeps; none where one makes both."""
        return {} if self.fused else {"key": "self_attn.k_proj", "value": "self_attn.v_proj"}

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Queries, keys, values and output, in checkpoint order."""
        made = {"q_proj": self.query_size, "k_proj": self.kv_size, "v_proj": self.kv_size}
        if self.fused:
            made = {"qkv_proj": sum(made.values())}
        rows = (
            *((name, out, self.hidden_size, self.qkv_bias) for name, out in made.items()),
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
        """What its linears read, where `source` is the norm before it.

        The rows of a fused linear that make values could take up a rescaling of what they give; they do not.
        """
        *first, last = (linear.name for linear in self.linears)
        return (
            LayerInput(name="attention_input", channels=self.hidden_size, linears=tuple(first), source=source),
            LayerInput(
                name="attention_output",
                channels=self.query_size,
                linears=(last,),
                source=None if self.fused else "self_attn.v_proj",
                repeat=self.num_heads // self.num_kv_heads,
                head_dim=self.head_dim,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention: keys and values of all heads are made of one narrow latent, which is what is cached.

    A head's query and key are `nope_dim` channels that carry no position and `rotary.channels` that do; those of the
    key are one for all heads. Queries come from a latent of `query_rank` channels, or from the hidden states where that
    is None. Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1), transformers `DeepseekV3Attention`.

    The linear that expands the latent stays as it is: engines take it apart and absorb it into queries and output.
    """

    kind: ClassVar[str] = "latent"
    qk_norm: ClassVar[str] = "none"
    latent_epsilon: ClassVar[float] = 1e-6  # of the latents' norms, whatever `rms_norm_eps` says, as in transformers
    window: ClassVar[int | None] = None

    hidden_size: int
    num_heads: int
    query_rank: int | None
    kv_rank: int
    nope_dim: int
    value_dim: int
    rotary: Rotary
    bias: bool = False

    @property
    def num_kv_heads(self) -> int:
        """As many as query heads, once the latent is expanded."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Channels of a head's query and key."""
        return self.nope_dim + self.rotary.channels

    @property
    def table_channels(self) -> int:
        """Channels that tables of the rotary embedding have: those that turn."""
        return self.rotary.channels

    @property
    def query_size(self) -> int:
        """Channels of the queries."""
        return self.num_heads * self.head_dim

    @property
    def output_size(self) -> int:
        """Channels of the attention output."""
        return self.num_heads * self.value_dim

    @property
    def kv_size(self) -> int:
        """Channels of the keys once expanded."""
        return self.num_heads * self.head_dim

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        scaling = self.rotary.scaling
        return float(self.head_dim**-0.5 * (1.0 if scaling is None else scaling.score_factor))

    @property
    def captured(self) -> tuple[str, ...]:
        """Names of the activations that a forward pass may show, in its order."""
        return tuple(layer_input.name for layer_input in self.inputs(None))

    @property
    def cached(self) -> dict[str, str]:
        """No linear makes what the cache keeps alone."""
        return {}

    @property
    def query_linears(self) -> tuple[Linear, ...]:
        """What makes the queries: one linear, or two with a norm between."""
        rank = self.query_rank
        if rank is None:
            return (self._linear("q_proj", self.query_size, self.hidden_size),)
        return (
            self._linear("q_a_proj", rank, self.hidden_size, bias=self.bias),
            self._linear("q_b_proj", self.query_size, rank),
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Of queries, latent, keys and values, and output, in checkpoint order."""
        return (
            *self.query_linears,
            self._linear("kv_a_proj_with_mqa", self.kv_rank + self.rotary.channels, self.hidden_size, bias=self.bias),
            self._linear("kv_b_proj", self.num_heads * (self.nope_dim + self.value_dim), self.kv_rank, stays=True),
            self._linear("o_proj", self.hidden_size, self.output_size, bias=self.bias),
        )

    def _linear(self, name: str, out: int, channels: int, *, bias: bool = False, stays: bool = False) -> Linear:
        return Linear(name=f"self_attn.{name}", out_features=out, in_features=channels, bias=bias, stays=stays)

    @property
    def norms(self) -> dict[str, tuple[int, ...]]:
        """Name within the layer to shape of the weights of its own norms, in the order of use."""
        query = {} if self.query_rank is None else {"self_attn.q_a_layernorm.weight": (self.query_rank,)}
        return {**query, "self_attn.kv_a_layernorm.weight": (self.kv_rank,)}

    def inputs(self, source: str | None) -> tuple[LayerInput, ...]:
        """What its linears read, where `source` is the norm before it."""
        first, *second = (linear.name for linear in self.query_linears)
        found = [
            LayerInput(
                name="attention_input",
                channels=self.hidden_size,
                linears=(first, "self_attn.kv_a_proj_with_mqa"),
                source=source,
            )
        ]
        if self.query_rank is not None:
            found.append(
                LayerInput(
                    name="query_latent",
                    channels=self.query_rank,
                    linears=tuple(second),
                    source="self_attn.q_a_layernorm",
                )
            )
        # The rows of `kv_b_proj` that make values could take up a rescaling; those that make keys are between them.
        output = LayerInput(
            name="attention_output", channels=self.output_size, linears=("self_attn.o_proj",), source=None
        )
        return (*found, output)


Attention = GroupedQueryAttention | LatentAttention
