"""A decoder as data: what each layer is made of, what its linears read, and the names and shapes of its tensors.

A layer is an attention and an mlp of some kind, each of which states its linears, the activations they read and
the tensors it has. Layers of one model may differ. What a config.json says is read in `families`, one file a
family; nothing here, and nothing outside of `families`, knows one by name. Names are those of Hugging Face
checkpoints (`model.layers.<i>.self_attn.q_proj.weight` ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from gs_dist.model.attention import Attention, GroupedQueryAttention, LatentAttention
from gs_dist.model.linear import LayerInput, Linear
from gs_dist.model.mlp import GatedMlp, MixtureOfExperts, Mlp, Routing

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")

__all__ = [
    "Attention",
    "DecoderArchitecture",
    "GatedMlp",
    "GroupedQueryAttention",
    "LatentAttention",
    "LayerInput",
    "LayerSpec",
    "Linear",
    "MixtureOfExperts",
    "Mlp",
    "Routing",
]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer: an attention, then an mlp, each added to the hidden states.

    `norms` names the layer's two norms, the attention's and the mlp's. Each stands before its block, or, where
    `norms_after`, behind it, over what is added; then nothing can take up a rescaling of the block's input.
    What a block adds is multiplied by `residual_multiplier`, which is 1 beside a mixture of experts.
    """

    attention: Attention
    mlp: Mlp
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    norms_after: bool = False
    residual_multiplier: float = 1.0

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
    def captured(self) -> tuple[str, ...]:
        """Names of what a forward pass shows of a dense layer, in its order."""
        return (*self.attention.captured, *(layer_input.name for layer_input in self.mlp.inputs(None)))

    def share_of_tokens(self, name: str) -> float:
        """Share of the tokens that an observed activation is made of, where a router deals them out evenly."""
        return self.mlp.share_of_tokens if name in self._routed else 1.0

    @cached_property
    def _routed(self) -> frozenset[str]:
        return frozenset(layer_input.name for layer_input in self.inputs if layer_input.routed)

    @cached_property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Name within the layer to shape, for every tensor of the layer."""
        shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (self.hidden_size,) for norm in self.norms}
        shapes.update(self.attention.norms)
        for linear in self.linears:
            shapes.update(linear.tensors())
        return shapes | self.mlp.buffers


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
    num_further_layers: int = 0  # behind the last, of multi-token prediction: no decoder runs them
    embedding_multiplier: float = 1.0  # of the embedding's rows
    logits_divisor: float = 1.0
    carried: tuple[tuple[str, tuple[int, ...]], ...] = ()  # full name and shape of tensors that none of this reads

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

    def further_layer(self, name: str) -> int | None:
        """The layer behind the last that a tensor belongs to, None for any other tensor."""
        match = _LAYER.match(name)
        number = -1 if match is None else int(match.group(1))
        return number if 0 <= number - self.num_layers < self.num_further_layers else None

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
