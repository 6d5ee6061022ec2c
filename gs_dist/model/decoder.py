"""A decoder as data: what each layer is made of, what its linears read, and the names and shapes of its tensors.

A layer is an attention and an mlp of some kind, each of which states its linears, the activations they read and
the tensors it has. Layers of one model may differ. What a config.json says is read in `families`, one file a
family; nothing here, and nothing outside of `families`, knows one by name. Names are those of Hugging Face
checkpoints (`model.layers.<i>.self_attn.q_proj.weight` ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from gs_dist.model.rotary import Rotary

__all__ = [
    "DecoderArchitecture",
    "GatedMlp",
    "GroupedQueryAttention",
    "LayerInput",
    "LayerSpec",
    "Linear",
    "Mlp",
]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear of a decoder layer: `name` within the layer, weight (out_features, in_features)."""

    name: str
    out_features: int
    in_features: int
    bias: bool

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name within the layer to shape."""
        shapes: dict[str, tuple[int, ...]] = {f"{self.name}.weight": (self.out_features, self.in_features)}
        if self.bias:
            shapes[f"{self.name}.bias"] = (self.out_features,)
        return shapes


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """An activation that linears read, where statistics are taken.

    `linears` share it. `source` is what a per-channel rescaling folds into: a norm's name, or the linear
    whose rows are divided (`self_attn.v_proj` for the attention output, `mlp.up_proj` for the mlp
    activation), or None where nothing can absorb it. `repeat` is how many channel groups of `channels`
    share one row group of the source: the query heads of a KV head (grouped-query attention), else 1.
    """

    name: str
    channels: int
    linears: tuple[str, ...]
    source: str | None
    repeat: int = 1
    head_dim: int = 0  # channels of one head where repeat > 1


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


@dataclass(frozen=True, kw_only=True)
class GatedMlp:
    """down(silu(gate(x)) * up(x))."""

    kind: ClassVar[str] = "gated"

    hidden_size: int
    intermediate_size: int
    bias: bool = False

    @property
    def widest(self) -> int:
        """Channels of its widest activation."""
        return self.intermediate_size

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Gate, up and down, in checkpoint order."""
        h, m = self.hidden_size, self.intermediate_size
        rows = (("gate_proj", m, h), ("up_proj", m, h), ("down_proj", h, m))
        return tuple(
            Linear(name=f"mlp.{name}", out_features=out, in_features=channels, bias=self.bias)
            for name, out, channels in rows
        )

    def inputs(self, source: str | None) -> tuple[LayerInput, ...]:
        """What its linears read, where `source` is the norm before it."""
        return (
            LayerInput(
                name="mlp_input",
                channels=self.hidden_size,
                linears=("mlp.gate_proj", "mlp.up_proj"),
                source=source,
            ),
            LayerInput(
                name="mlp_activation",
                channels=self.intermediate_size,
                linears=("mlp.down_proj",),
                source="mlp.up_proj",
            ),
        )


Mlp = GatedMlp


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer: an attention, then an mlp, each added to the hidden states.

    `norms` names the layer's two norms, the attention's and the mlp's. Each stands before its block, or, where
    `norms_after`, behind it, over what is added; then nothing can take up a rescaling of the block's input.
    """

    attention: GroupedQueryAttention
    mlp: Mlp
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    norms_after: bool = False

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states."""
        return self.attention.hidden_size

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Its linears in checkpoint order."""
        return (*self.attention.linears, *self.mlp.linears)

    @cached_property
    def inputs(self) -> tuple[LayerInput, ...]:
        """The activations that its linears read, in forward order."""
        sources = (None, None) if self.norms_after else self.norms
        return (*self.attention.inputs(sources[0]), *self.mlp.inputs(sources[1]))

    @cached_property
    def channels(self) -> Mapping[str, int]:
        """Channels of each activation that can be observed: the inputs by name, and what the cache keeps."""
        found = {layer_input.name: layer_input.channels for layer_input in self.inputs}
        return found | dict.fromkeys(self.attention.cached, self.attention.kv_size)

    @cached_property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Name within the layer to shape, for every tensor of the layer."""
        shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (self.hidden_size,) for norm in self.norms}
        shapes.update(self.attention.norms)
        for linear in self.linears:
            shapes.update(linear.tensors())
        return shapes


@dataclass(frozen=True, kw_only=True)
class DecoderArchitecture:
    """A decoder: its layers, and what stands around them."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]  # alike ones are one object
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str  # "float32", "float16" or "bfloat16", as config.json states
    eos_token_ids: tuple[int, ...] = field(default=())

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self.layers[0].attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of a layer."""
        return self.layers[0].attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.layers[0].attention.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of a layer's keys, and of its values."""
        return self.layers[0].attention.kv_size

    @property
    def query_size(self) -> int:
        """Channels of a layer's attention output."""
        return self.layers[0].attention.query_size

    @property
    def end_of_text_id(self) -> int | None:
        """The token that ends a text, None where the model names none."""
        return next(iter(self.eos_token_ids), None)

    @cached_property
    def kinds(self) -> tuple[LayerSpec, ...]:
        """The layers that differ, in the order of their first use."""
        return tuple(dict.fromkeys(self.layers))

    def layer_prefix(self, layer: int) -> str:
        """Dotted prefix of a layer's tensors, ending in a dot."""
        return f"model.layers.{layer}."

    def linears(self, layer: int) -> tuple[Linear, ...]:
        """The linears of a layer, in checkpoint order."""
        return self.layers[layer].linears

    def inputs(self, layer: int) -> tuple[LayerInput, ...]:
        """The activations that the linears of a layer read, in forward order."""
        return self.layers[layer].inputs

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Name within a layer to shape, for every tensor of it; a table of the caller's own."""
        return dict(self.layers[layer].tensors)

    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Full name to shape for embedding, final norm and head (a tied head has no tensor of its own)."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def linear_names(self) -> list[str]:
        """Full dotted names of all linears of the model, layer by layer, `lm_head` last."""
        names = [self.layer_prefix(i) + linear.name for i in range(self.num_layers) for linear in self.linears(i)]
        return [*names, "lm_head"]
