"""What a decoder is made of, as its config.json says: sizes, tensor names, linears and what feeds them.

Names are those of Hugging Face checkpoints (`model.layers.<i>.self_attn.q_proj.weight` ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DecoderArchitecture", "LayerInput", "Linear", "RopeScaling"]

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear of a decoder layer: `name` within the layer, weight (out_features, in_features)."""

    name: str
    out_features: int
    in_features: int
    bias: bool


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
class RopeScaling:
    """`rope_scaling` of type llama3 (transformers `_compute_llama3_parameters`) or linear."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class DecoderArchitecture:
    """Sizes of a Llama-like decoder; every derived name and shape comes from here."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    sliding_window: int | None
    max_position_embeddings: int
    dtype: str  # "float32", "float16" or "bfloat16", as config.json states
    eos_token_ids: tuple[int, ...] = field(default=())

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderArchitecture:
        """Reads a Hugging Face config.json's content.

        Raises:
            CheckpointError: a model type that is not served, a missing or ill-typed key, sizes that
                contradict each other. The message names the key.
        """
        raise NotImplementedError

    @property
    def query_size(self) -> int:
        """Channels of the attention output: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of a layer's keys, and of its values: num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    def layer_prefix(self, layer: int) -> str:
        """Dotted prefix of a layer's tensors, ending in a dot."""
        return f"model.layers.{layer}."

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears of a decoder layer, in checkpoint order."""
        h, q, kv, m = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        rows = (
            ("self_attn.q_proj", q, h, self.qkv_bias),
            ("self_attn.k_proj", kv, h, self.qkv_bias),
            ("self_attn.v_proj", kv, h, self.qkv_bias),
            ("self_attn.o_proj", h, q, self.o_bias),
            ("mlp.gate_proj", m, h, self.mlp_bias),
            ("mlp.up_proj", m, h, self.mlp_bias),
            ("mlp.down_proj", h, m, self.mlp_bias),
        )
        return tuple(Linear(name=n, out_features=o, in_features=i, bias=b) for n, o, i, b in rows)

    @property
    def inputs(self) -> tuple[LayerInput, ...]:
        """The activations that the linears of a layer read, in forward order."""
        return (
            LayerInput(
                name="attention_input",
                channels=self.hidden_size,
                linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                source="input_layernorm",
            ),
            LayerInput(
                name="attention_output",
                channels=self.query_size,
                linears=("self_attn.o_proj",),
                source="self_attn.v_proj",
                repeat=self.num_heads // self.num_kv_heads,
                head_dim=self.head_dim,
            ),
            LayerInput(
                name="mlp_input",
                channels=self.hidden_size,
                linears=("mlp.gate_proj", "mlp.up_proj"),
                source="post_attention_layernorm",
            ),
            LayerInput(
                name="mlp_activation",
                channels=self.intermediate_size,
                linears=("mlp.down_proj",),
                source="mlp.up_proj",
            ),
        )

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name within a layer to shape, for every tensor of a decoder layer."""
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden_size,),
            "post_attention_layernorm.weight": (self.hidden_size,),
        }
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        for linear in self.linears:
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                shapes[f"{linear.name}.bias"] = (linear.out_features,)
        return shapes

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
        names = [self.layer_prefix(i) + linear.name for i in range(self.num_layers) for linear in self.linears]
        return [*names, "lm_head"]
