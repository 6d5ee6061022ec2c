"""The package's own decoder as a network of cells, for the PTQ class, and its network helper.

Checkpoints in Hugging Face form. Cells and parameters have the
checkpoint's names (`model.layers.0.self_attn.q_proj.weight`), so that patterns of `layer_policies` read the
same as in a recipe. It recomputes everything for each token it generates: made to calibrate and to try, not to serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import mint, nn, ops
from tokenizers import Tokenizer

from gs_dist.calibration.device import current_device
from gs_dist.calibration.network import rotary_tables  # one source of the frequencies
from gs_dist.checkpoint.dialects import published_dialect
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture, GatedMlp, GroupedQueryAttention, LayerSpec, Linear
from gs_dist.ptq.kv_cache import KVCache
from gs_dist.ptq.network_helper import NetworkHelper
from gs_dist.ptq.published import float_tensors
from gs_dist.results.quantized import QuantizedLayer

__all__ = ["CausalDecoder", "DecoderHelper", "DecoderLayer", "SolvedLayers"]

Array = npt.NDArray[Any]

_MASKED = -1e30  # far below any score, and finite


class _RmsNorm(nn.Cell):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in float32; plus a bias where there is one."""

    def __init__(self, weight: ms.Tensor, epsilon: float, bias: ms.Tensor | None = None) -> None:
        super().__init__()
        self.weight = ms.Parameter(weight, name="weight")
        self.bias = None if bias is None else ms.Parameter(bias, name="bias")
        self.epsilon = epsilon

    def construct(self, x: Any) -> Any:
        wide = x.astype(ms.float32)
        normed = wide * mint.rsqrt(mint.mean(wide * wide, -1, True) + self.epsilon)
        scaled = normed.astype(x.dtype) * self.weight
        return scaled if self.bias is None else scaled + self.bias


class _Attention(nn.Cell):
    """Causal grouped-query attention; keys and values pass a `KVCache` after the rotary embedding."""

    def __init__(self, prefix: str, attention: GroupedQueryAttention, source: _Source) -> None:
        super().__init__()
        self.form = attention
        for linear in attention.linears:
            setattr(self, linear.name.rpartition(".")[2], source.linear(prefix, linear))
        self.q_norm = self.k_norm = None
        if attention.qk_norm != "none":
            self.q_norm = source.norm(f"{prefix}self_attn.q_norm")
            self.k_norm = source.norm(f"{prefix}self_attn.k_norm")
        self.cache = KVCache(attention.num_kv_heads, attention.head_dim)

    def construct(self, x: Any, tables: Any, mask: Any) -> Any:
        batch, tokens, _ = x.shape
        query = self._heads(self.q_proj(x), self.q_norm, self.form.num_heads)
        key = self._heads(self.k_proj(x), self.k_norm, self.form.num_kv_heads)
        query, key = _rotate(query, *tables[:2]), _rotate(key, *tables[2:])
        key, value = self.cache(key.reshape(batch, tokens, -1), self.v_proj(x))
        key, value = self._repeated(key), self._repeated(value)
        scores = mint.matmul(query.swapaxes(1, 2), key.swapaxes(1, 2).swapaxes(2, 3)).astype(ms.float32) + mask
        weights = ops.softmax(scores, -1).astype(x.dtype)
        mixed = mint.matmul(weights, value.swapaxes(1, 2)).swapaxes(1, 2)
        return self.o_proj(mixed.reshape(batch, tokens, -1))

    def _heads(self, x: Any, norm: Any, heads: int) -> Any:
        if norm is not None and self.form.qk_norm == "all":
            x = norm(x)
        split = x.reshape(*x.shape[:2], heads, self.form.head_dim)
        return norm(split) if self.form.qk_norm == "head" else split

    def _repeated(self, x: Any) -> Any:
        """(b, t, K * d) to (b, t, H, d), each KV head once for every query head that reads it."""
        form = self.form
        split = x.reshape(*x.shape[:2], form.num_kv_heads, 1, form.head_dim)
        return ops.tile(split, (1, 1, 1, form.num_heads // form.num_kv_heads, 1)).reshape(
            *x.shape[:2], form.num_heads, -1
        )


class _Mlp(nn.Cell):
    """SiLU-gated feed-forward network."""

    def __init__(self, prefix: str, mlp: GatedMlp, source: _Source) -> None:
        super().__init__()
        for linear in mlp.linears:
            setattr(self, linear.name.rpartition(".")[2], source.linear(prefix, linear))

    def construct(self, x: Any) -> Any:
        gate = self.gate_proj(x)
        return self.down_proj(gate * ops.sigmoid(gate) * self.up_proj(x))


class DecoderLayer(nn.Cell):
    """One decoder layer; the type `PTQ` looks for in this package's networks."""

    def __init__(self, prefix: str, layer: LayerSpec, source: _Source) -> None:
        super().__init__()
        if not isinstance(layer.attention, GroupedQueryAttention):
            raise CheckpointError(
                f"{prefix}self_attn is latent attention, which CausalDecoder does not build: quantise it by a recipe "
                "(gs-dist quantize)"
            )
        if layer.attention.fused:
            raise CheckpointError(
                f"{prefix}self_attn makes queries, keys and values in one linear, which CausalDecoder does not build: "
                "quantise it by a recipe (gs-dist quantize)"
            )
        self.self_attn = _Attention(prefix, layer.attention, source)
        if not isinstance(layer.mlp, GatedMlp):
            raise CheckpointError(
                f"{prefix}mlp is a mixture of experts, which CausalDecoder does not build: quantise it by a recipe "
                "(gs-dist quantize)"
            )
        self.mlp = _Mlp(prefix, layer.mlp, source)
        for norm in layer.norms:
            setattr(self, norm, source.norm(prefix + norm))
        self.form = layer

    def construct(self, x: Any, tables: Any, mask: Any) -> Any:
        """Hidden states (b, t, h) after the layer."""
        first, second = (getattr(self, name) for name in self.form.norms)
        if self.form.norms_after:
            x = x + first(self.self_attn(x, tables, mask))
            return x + second(self.mlp(x))
        x = x + self.self_attn(first(x), tables, mask) * self.form.residual_multiplier
        return x + self.mlp(second(x)) * self.form.residual_multiplier


class _Embedding(nn.Cell):
    """Rows of a table."""

    def __init__(self, table: ms.Tensor) -> None:
        super().__init__()
        self.weight = ms.Parameter(table, name="weight")

    def construct(self, input_ids: Any) -> Any:
        return ops.gather(self.weight, input_ids, 0)


class _Model(nn.Cell):
    """Embedding, layers and final norm."""

    def __init__(self, source: _Source) -> None:
        super().__init__()
        architecture = source.architecture
        self.embed_tokens = _Embedding(source.tensor("model.embed_tokens.weight"))
        self.layers = nn.CellList(
            [DecoderLayer(architecture.layer_prefix(i), layer, source) for i, layer in enumerate(architecture.layers)]
        )
        self.norm = source.norm("model.norm")


@dataclass(frozen=True)
class SolvedLayers:
    """Decoder layers in quantised form by index, as `save_pretrained` writes them. Copies of a network share them."""

    layers: Mapping[int, QuantizedLayer] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> SolvedLayers:
        return self


class CausalDecoder(nn.Cell):
    """A decoder with the weights of a checkpoint; a tied head holds a copy of the embedding.

    Args:
        architecture: of the checkpoint.
        tensors: all its tensors by full name.

    Attributes:
        solved: what `PTQ.apply` made of its layers; empty before.
    """

    def __init__(self, architecture: DecoderArchitecture, tensors: Mapping[str, Array]) -> None:
        super().__init__()
        source = _Source(architecture, tensors)
        self.architecture = architecture
        self.solved = SolvedLayers()
        self.model = _Model(source)
        # A tied head gets a tensor of its own, so that exchanging the head leaves the embedding alone.
        tied = architecture.tie_word_embeddings
        self.lm_head = source.dense("model.embed_tokens" if tied else "lm_head", bias=False)

    @classmethod
    def from_checkpoint(cls, directory: Path | str) -> CausalDecoder:
        """Reads a Hugging Face directory, of floats or of what a job published.

        Weights that were published as integers are NaN: exchange those linears with `PTQ.apply` in DEPLOY
        mode, and let `PTQ.convert` load the directory's model.safetensors.index.json.

        Raises:
            CheckpointError: it is damaged, or of a model type that is not served.
        """
        reader = _reader(directory)
        return cls(reader.architecture, float_tensors(reader))

    def construct(self, input_ids: Any) -> Any:
        """Logits (b, t, vocabulary) float32 of token ids (b, t); every position sees those before it."""
        tokens = input_ids.shape[1]
        x = self.model.embed_tokens(input_ids) * self.architecture.embedding_multiplier
        for layer in self.model.layers:
            attention = layer.self_attn.form
            tables = [ms.Tensor(table) for table in rotary_tables(attention, tokens)]
            x = layer(x, tables, ms.Tensor(_causal_mask(tokens, attention.window)))
        return self.lm_head(self.model.norm(x)).astype(ms.float32) / self.architecture.logits_divisor


def _reader(directory: Path | str) -> CheckpointReader:
    return CheckpointReader(directory, quantized=published_dialect(Path(directory)) is not None)


class _Source:
    """Makes cells from a checkpoint's tensors, in the dtype the device computes in."""

    def __init__(self, architecture: DecoderArchitecture, tensors: Mapping[str, Array]) -> None:
        self.architecture = architecture
        self._tensors = tensors
        # Whatever device the caller chose for MindSpore: choosing one is not this network's business.
        self._device = current_device()
        self._dtype = self._device.compute_dtype(architecture.dtype)

    def tensor(self, name: str) -> ms.Tensor:
        """A tensor of its own: a parameter may be written to, and a mapped checkpoint file may not."""
        return self._device.to_tensor(self._tensors[name].copy(), self._dtype)

    def norm(self, name: str) -> _RmsNorm:
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self._tensors else None
        return _RmsNorm(self.tensor(f"{name}.weight"), self.architecture.rms_norm_eps, bias)

    def linear(self, prefix: str, linear: Linear) -> nn.Dense:
        """The `nn.Dense` of a layer's linear."""
        return self.dense(f"{prefix}{linear.name}", bias=linear.bias)

    def dense(self, name: str, *, bias: bool) -> nn.Dense:
        """An `nn.Dense` from the tensors stored under `name`."""
        weight = self.tensor(f"{name}.weight")
        bias_init = self.tensor(f"{name}.bias") if bias else None
        rows, columns = weight.shape
        return nn.Dense(columns, rows, weight_init=weight, bias_init=bias_init, has_bias=bias, dtype=self._dtype)


def _rotate(x: Any, cosine: Any, sine: Any) -> Any:
    """Rotary embedding of x (b, t, heads, d) by tables (t, 1, d), the sine with its sign."""
    half = x.shape[-1] // 2
    turned = ops.concat((x[..., half:], x[..., :half]), -1)
    return x * cosine.astype(x.dtype) + turned * sine.astype(x.dtype)


def _causal_mask(tokens: int, window: int | None) -> Array:
    row, column = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    seen = (column <= row) & (row - column < (window or tokens))
    return np.where(seen, 0.0, _MASKED).astype(np.float32)


def _sizes(architecture: DecoderArchitecture) -> dict[str, Any]:
    """What the architecture states of the whole model, by name."""
    stated = {found.name: getattr(architecture, found.name) for found in fields(architecture)}
    del stated["layers"]
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim")
    return stated | {name: getattr(architecture, name) for name in names}


class DecoderHelper(NetworkHelper):
    """Network helper for `CausalDecoder` and a Hugging Face directory.

    Args:
        directory: holds config.json and safetensors files, of floats or published by a job.
        batch_size, sequence_length: what `get_spec` says of them.
    """

    def __init__(self, directory: Path | str, *, batch_size: int = 1, sequence_length: int = 2048) -> None:
        self._directory = Path(directory)
        self._reader = _reader(directory)
        self._specs = {"batch_size": batch_size, "seq_length": sequence_length}

    def create_network(self) -> CausalDecoder:
        """The decoder with the directory's weights."""
        return CausalDecoder.from_checkpoint(self._directory)

    def get_spec(self, name: str) -> Any:
        """`batch_size`, `seq_length`, or a size of the architecture such as `num_layers` and `vocab_size`.

        Raises:
            TypeError: `name` is no str.
            KeyError: no such setting.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, but got {type(name).__name__}")
        specs = {**_sizes(self._reader.architecture), **self._specs}
        if name not in specs:
            raise KeyError(f"no setting {name!r}: known are {', '.join(specs)}")
        return specs[name]

    def create_tokenizer(self, **kwargs: Any) -> Tokenizer:
        """The directory's tokenizer.json, as a `tokenizers.Tokenizer`.

        Raises:
            CheckpointError: there is none.
        """
        path = self._reader.tokenizer_file
        if path is None:
            raise CheckpointError(f"{self._directory.name} holds no tokenizer.json")
        return Tokenizer.from_file(str(path))

    def generate(self, network: Any, input_ids: Array, max_new_tokens: int | None = None, **kwargs: Any) -> Array:
        """Appends the likeliest token again and again; (batch, sequence + max_new_tokens) int32.

        Without `max_new_tokens` the sequence is filled up to `seq_length`. `do_sample` must be False.
        """
        if kwargs.pop("do_sample", False) or kwargs:
            raise ValueError("generate takes the likeliest token: leave out do_sample and other settings")
        ids: Array = np.atleast_2d(np.asarray(input_ids)).astype(np.int32)
        if max_new_tokens is None:
            max_new_tokens = max(0, self._specs["seq_length"] - ids.shape[1])
        for _ in range(max_new_tokens):
            logits = network(*self.assemble_inputs(ids))[:, -1].asnumpy()
            ids = np.concatenate([ids, logits.argmax(axis=-1).astype(np.int32)[:, None]], axis=1)
        return ids

    def assemble_inputs(self, input_ids: Array, **kwargs: Any) -> tuple[ms.Tensor, ...]:
        """The arguments of `CausalDecoder.construct`."""
        return (ms.Tensor(np.asarray(input_ids).astype(np.int32)),)
