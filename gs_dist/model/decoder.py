"""What a decoder is made of, as its config.json says: sizes, tensor names, linears and what feeds them.

Names are those of Hugging Face checkpoints (`model.layers.<i>.self_attn.q_proj.weight` ...).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gs_dist.errors import CheckpointError

__all__ = ["DecoderArchitecture", "LayerInput", "Linear", "RopeScaling"]

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = ("float32", "float16", "bfloat16")
_MAX_LAYERS = 4096  # bounds what a damaged config.json can make us enumerate
_MAX_SIZE = 2**31 - 1
_ATTENTION_TYPES = ("full_attention", "sliding_attention")
_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}


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

        Defaults of absent keys are those of the model type's configuration class in transformers. Both
        spellings are understood: `torch_dtype`, `rope_theta` and `rope_scaling` of transformers 4, `dtype`
        and `rope_parameters` of transformers 5.

        Raises:
            CheckpointError: a model type that is not served, a missing or ill-typed key, sizes that
                contradict each other, a checkpoint that is quantised already. The message names the key.
        """
        keys = _ConfigKeys(config)
        model_type = keys.choice("model_type", _MODEL_TYPES)
        if config.get("quantization_config") is not None:
            raise CheckpointError(
                "config.json: the key quantization_config is present, so this checkpoint is quantised already; "
                "set model to the directory of the float checkpoint it was made from"
            )
        keys.choice("hidden_act", ("silu",), default="silu")
        num_layers = keys.size("num_hidden_layers", maximum=_MAX_LAYERS)
        num_heads = keys.size("num_attention_heads")
        num_kv_heads = keys.size("num_key_value_heads", default=num_heads)
        hidden_size = keys.size("hidden_size")
        head_dim = _head_dim(keys, model_type, hidden_size, num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads is {num_heads} and num_key_value_heads is {num_kv_heads}; "
                "the first must be a multiple of the second"
            )
        attention_bias = model_type in ("llama", "qwen3") and keys.flag("attention_bias")
        rope_theta, rope_scaling = _rope(keys)
        return cls(
            model_type=model_type,
            vocab_size=keys.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=keys.positive("rms_norm_eps", default=1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=attention_bias or model_type == "qwen2",
            o_bias=attention_bias,
            mlp_bias=model_type == "llama" and keys.flag("mlp_bias"),
            qk_norm=model_type == "qwen3",
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            sliding_window=_sliding_window(keys, model_type, num_layers),
            max_position_embeddings=keys.size("max_position_embeddings", default=_MAX_POSITIONS[model_type]),
            dtype=_dtype(keys),
            eos_token_ids=keys.token_ids("eos_token_id"),
        )

    @property
    def end_of_text_id(self) -> int | None:
        """The token that ends a text, None where the model names none."""
        return next(iter(self.eos_token_ids), None)

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


_MISSING: Any = object()


class _ConfigKeys:
    """Typed reads from one (part of a) config.json; `where` prefixes the key in messages."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self.where = where

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The value, or `default` where it is absent or null; a key without default is required."""
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise CheckpointError(f"config.json: the key {self.where}{key} is missing; every decoder config has it")
        return default

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"config.json: {self.where}{key} is {self.values.get(key)!r:.200}; it must be {wanted}")

    def size(self, key: str, default: Any = _MISSING, maximum: int = _MAX_SIZE) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= maximum:
            raise self.wrong(key, f"a whole number from 1 to {maximum}")
        return value

    def positive(self, key: str, default: Any = _MISSING) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise self.wrong(key, "a finite number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, served: tuple[str, ...], default: Any = _MISSING) -> str:
        value = self.get(key, default)
        if value not in served:
            raise CheckpointError(
                f"config.json: {self.where}{key} is {value!r:.200}, which is not served; served are {', '.join(served)}"
            )
        return str(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key, ())
        ids = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def table(self, key: str) -> _ConfigKeys | None:
        value = self.get(key, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "a table of keys, or null")
        return _ConfigKeys(value, f"{self.where}{key}.")


def _head_dim(keys: _ConfigKeys, model_type: str, hidden_size: int, num_heads: int) -> int:
    if keys.get("head_dim", None) is None and model_type != "qwen3" and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size is {hidden_size} and num_attention_heads is {num_heads}; the first must be a "
            "multiple of the second where head_dim is not given"
        )
    head_dim = keys.size("head_dim", default=128 if model_type == "qwen3" else hidden_size // num_heads)
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim is {head_dim}; rotary embedding needs an even one")
    return head_dim


def _dtype(keys: _ConfigKeys) -> str:
    key = "dtype" if keys.get("dtype", None) is not None else "torch_dtype"
    value = keys.get(key, "float32")
    if isinstance(value, str):
        value = value.removeprefix("torch.")
    if value not in _DTYPES:
        raise keys.wrong(key, " or ".join(_DTYPES))
    return str(value)


def _rope(keys: _ConfigKeys) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding; transformers 5 keeps both in `rope_parameters`."""
    table = keys.table("rope_parameters") or keys.table("rope_scaling")
    theta_keys = table if table is not None and table.get("rope_theta", None) is not None else keys
    theta = theta_keys.positive("rope_theta", default=10000.0)
    for place in (keys, table):
        if place is not None and place.get("partial_rotary_factor", 1.0) != 1.0:
            raise place.wrong("partial_rotary_factor", "1.0 or absent: partial rotary embedding is not served")
    if table is None:
        return theta, None
    nested = [key for key, value in table.values.items() if isinstance(value, Mapping)]
    if nested:
        raise CheckpointError(
            f"config.json: {table.where}{nested[0]} is a table of its own; "
            "served is one rotary embedding for all layers"
        )
    spelling = "rope_type" if table.get("rope_type", None) is not None else "type"  # `type` is the older spelling
    rope_type = table.choice(spelling, ("default", "linear", "llama3"), default="default")
    if rope_type == "default":
        return theta, None
    factor = table.positive("factor")
    if rope_type == "linear":
        return theta, RopeScaling(rope_type=rope_type, factor=factor)
    low, high = table.positive("low_freq_factor"), table.positive("high_freq_factor")
    if low >= high:
        raise table.wrong("low_freq_factor", f"below high_freq_factor, which is {high}")
    return theta, RopeScaling(
        rope_type=rope_type,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=table.size("original_max_position_embeddings"),
    )


def _sliding_window(keys: _ConfigKeys, model_type: str, num_layers: int) -> int | None:
    """Tokens a query sees back, the same in every layer, or None for all of them."""
    if model_type == "llama":
        return None
    # Null means no window; an absent key means the configuration class's 4096.
    unlimited = keys.values.get("sliding_window", 4096) is None
    if model_type == "mistral":
        return None if unlimited else keys.size("sliding_window", default=4096)
    if unlimited or not keys.flag("use_sliding_window"):
        return None
    first = keys.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise keys.wrong("max_window_layers", "a whole number, 0 or more")
    num_full = min(first, num_layers)
    kinds = keys.get("layer_types", ["full_attention"] * num_full + ["sliding_attention"] * (num_layers - num_full))
    if not isinstance(kinds, list) or len(kinds) < num_layers or any(kind not in _ATTENTION_TYPES for kind in kinds):
        raise keys.wrong("layer_types", f"{num_layers} entries of {', '.join(_ATTENTION_TYPES)}")
    used = set(kinds[:num_layers])
    if len(used) > 1:
        raise CheckpointError(
            "config.json: use_sliding_window is true for some layers only (max_window_layers "
            f"{first}, {num_layers} layers); served is one kind of attention for all layers"
        )
    return keys.size("sliding_window", default=4096) if used == {"sliding_attention"} else None
