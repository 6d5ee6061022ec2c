"""A decoder in operations that both CPU and Ascend have.

Every layer runs through one compiled function that takes its weights as arguments, so that a form (shape
of the micro-batch, sizes, quantisation scheme) is compiled once a process and serves all layers.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor, ops

from gs_dist.calibration._attention import GroupedQueryForm, LatentForm
from gs_dist.calibration._experts import ROWS, Dispatch, RoutingForm, dispatch, expert_forward, routed_forward
from gs_dist.calibration._forward import dense_forward, divergence, head_logits, negative_log_likelihood
from gs_dist.calibration.device import Device
from gs_dist.model.decoder import (
    Attention,
    DecoderArchitecture,
    LatentAttention,
    LayerSpec,
    Linear,
    MixtureOfExperts,
    Routing,
)
from gs_dist.model.mlp import SHARED, expert_input
from gs_dist.model.rotary import Rotary
from gs_dist.numbers.token_step import TokenStep
from gs_dist.results.quantized import QuantizedLayer, QuantizedLinear

__all__ = ["DecoderNetwork", "LayerWeights", "OuterWeights", "RoutedActivation", "attention_form", "rotary_tables"]

Array = npt.NDArray[Any]

_MASKED = -1e30  # far below any score, and finite in bfloat16 and float32
_LOGITS_BYTES = 64 << 20  # of one chunk of logits
_TOKEN_SCHEMES = {
    TokenStep.OVER_127_5: "per_token",
    TokenStep.OVER_127: "per_token_127",
}  # as `_operations` spells them


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """A decoder layer on the device, ready for `DecoderNetwork.forward_layer`.

    `attention`, `mlp` and `norms` are the arguments of the functions in `_forward` and `_experts` that run a layer
    of this kind; `attention_schemes`, `mlp_schemes` and `kv_schemes` the static part of a fake-quantised one.
    """

    spec: LayerSpec
    attention: Any
    mlp: Any  # of a mixture, an `_ExpertWeights`
    norms: Any
    attention_schemes: tuple[str, ...]
    mlp_schemes: tuple[str, ...]  # of a mixture, none
    kv_schemes: tuple[str, ...]


@dataclass(frozen=True)
class _GatedWeights:
    """Gate, up and down of an expert with the scales and schemes of their inputs: arguments of `expert_forward`."""

    linears: Any
    inputs: Tensor
    schemes: tuple[str, ...]


@dataclass(frozen=True)
class _ExpertWeights:
    """A mixture of experts on the device: router and gate of the shared expert, correction, experts, the shared one."""

    outer: Any
    correction: Any
    experts: tuple[_GatedWeights, ...]
    shared: _GatedWeights | None


@dataclass(frozen=True)
class RoutedActivation:
    """What an expert's last linear reads.

    `values` (r, channels) are those of `tokens` (r,), numbers among the micro-batch's; -1 stands for none. The first
    `num_routed` were given to the expert; the others came closest, in descending order of score.
    """

    values: Tensor
    tokens: npt.NDArray[np.int32]
    num_routed: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return tuple(self.values.shape)


@dataclass(frozen=True, kw_only=True)
class OuterWeights:
    """Embedding (host array in the checkpoint's dtype), final norm and head; None where a stage lacks them."""

    embedding: Array | None
    norm: Tensor | None
    head: Tensor | None


class DecoderNetwork:
    """Runs the parts of a decoder; holds tables of positions and masks, and no weights.

    Attention is causal without a padding mask: padding stands at the end of a sample, where no token
    before it sees it. Results are the same to the last bit for the same micro-batch in any process.
    Tokens that a quantised layer rounds have steps as `token_step` says.
    """

    def __init__(
        self, architecture: DecoderArchitecture, device: Device, token_step: TokenStep = TokenStep.OVER_127_5
    ) -> None:
        self._token_scheme = _TOKEN_SCHEMES[token_step]
        self.architecture = architecture
        self.device = device
        self.dtype = device.compute_dtype(architecture.dtype)
        self._tables: dict[tuple[int, int, float, Rotary], tuple[Any, Tensor, int, int]] = {}

    def outer_weights(self, tensors: Mapping[str, Array]) -> OuterWeights:
        """Weights outside the layers from their full names; absent ones are left out.

        A tied head is made of the embedding, and only where the final norm is present, so that a first
        stage does not pay for it.
        """
        embedding = tensors.get("model.embed_tokens.weight")
        norm = tensors.get("model.norm.weight")
        head = embedding if self.architecture.tie_word_embeddings else tensors.get("lm_head.weight")
        return OuterWeights(
            embedding=embedding,
            norm=None if norm is None else self._last_norm(norm),
            head=None if norm is None or head is None else self._tensor(head),
        )

    def _last_norm(self, weight: Array) -> Tensor:
        """The final norm with what logits are divided by in its weight."""
        divisor = self.architecture.logits_divisor
        return self._tensor(weight if divisor == 1.0 else weight.astype(np.float32) / np.float32(divisor))

    def layer_weights(
        self, layer: int, tensors: Mapping[str, Array], quantized: QuantizedLayer | None = None
    ) -> LayerWeights:
        """A layer's weights from its tensors by name within the layer (checkpoint dtype).

        With `quantized`, its linears and tensors take the place of those in `tensors`, and the layer
        computes what the integers would: dequantised weights, and inputs, keys and values rounded to
        int8 where the policy of the linear, or the layer's `kv_cache`, says so.

        Raises:
            KeyError: a tensor of the architecture is missing.
        """
        spec = self.architecture.layers[layer]
        # Not as one dictionary: a tensor may be decoded when it is asked for.
        present = tensors if quantized is None else ChainMap(dict(quantized.tensors), dict(tensors))
        integer = {} if quantized is None else quantized.linears
        own_norms = tuple((self._tensor(present[name]),) for name in spec.attention.norms)
        attention_inputs, attention_schemes = self._input_schemes(spec.attention.linears, integer)
        cache, kv_schemes = self._cache_schemes(quantized)
        linears = tuple(self._linear(linear.name, present, integer) for linear in spec.attention.linears)
        mlp: Any
        mlp_schemes: tuple[str, ...]
        if isinstance(spec.mlp, MixtureOfExperts):
            mlp, mlp_schemes = self._expert_weights(spec.mlp, present, integer), ()
        else:
            gated = self._gated_weights(spec.mlp.linears, present, integer)
            mlp, mlp_schemes = ms.mutable((gated.linears, gated.inputs)), gated.schemes
        return LayerWeights(
            spec=spec,
            attention=ms.mutable((linears, own_norms, attention_inputs, cache)),
            mlp=mlp,
            norms=ms.mutable(tuple(self._with_bias(name, present) for name in spec.norms)),
            attention_schemes=attention_schemes,
            mlp_schemes=mlp_schemes,
            kv_schemes=kv_schemes,
        )

    def embed(self, outer: OuterWeights, input_ids: npt.NDArray[np.int32]) -> Tensor:
        """Hidden states (b, t, h) of token ids (b, t); reads the rows it needs from the host."""
        assert outer.embedding is not None, "this stage has no embedding"
        rows = self._tensor(outer.embedding[input_ids])
        multiplier = self.architecture.embedding_multiplier
        return rows if multiplier == 1.0 else rows * multiplier

    def forward_layer(
        self,
        weights: LayerWeights,
        hidden: Tensor,
        *,
        capture: bool = True,
        seen: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """One layer on hidden states (b, t, h); `seen` (b, t) is False for padding, None where there is none.

        Returns:
            The output (b, t, h), and by name the activations (b, t, channels) that the linears read (before
            any rounding), keys after the rotary embedding and values; empty without `capture`. What an expert's
            own linear reads is a `RoutedActivation`.
        """
        spec = weights.spec
        rotary, mask, block, window = self._table(hidden.shape[1], spec.attention)
        epsilon = self.architecture.rms_norm_eps
        attention = attention_form(weights, epsilon, block, window)
        if isinstance(spec.mlp, MixtureOfExperts):
            routed = (_routing_form(spec.mlp.routing), epsilon, spec.attention.kind, attention)
            return self._forward_experts(weights, hidden, (rotary, mask, routed), capture, seen)
        residual = (spec.norms_after, spec.residual_multiplier)
        form = (capture, residual, epsilon, weights.mlp_schemes, spec.attention.kind, attention)
        results = dense_forward(hidden, weights.attention, weights.mlp, weights.norms, rotary, mask, form)
        if not capture:
            return results, {}
        return results[0], dict(zip(spec.captured, results[1:], strict=True))

    def _forward_experts(
        self,
        weights: LayerWeights,
        hidden: Tensor,
        arguments: tuple[Any, ...],
        capture: bool,
        seen: npt.NDArray[np.bool_] | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        mlp: _ExpertWeights = weights.mlp
        results = routed_forward(hidden, weights.attention, mlp.outer, mlp.correction, weights.norms, *arguments)
        total, tokens, scores, shares, chosen, share, *attended = results
        everyone = np.ones(tokens.shape[0], bool) if seen is None else seen.reshape(-1)
        scores, shares, chosen = (self.device.to_numpy(tensor) for tensor in (scores, shares, chosen))
        products, places = dispatch(scores, shares, chosen, everyone, every=capture)
        captured: dict[str, Any] = {}
        outputs = []
        for product in products:
            values, made = self._run_expert(mlp.experts[product.expert], tokens, product)
            outputs += made
            if capture:
                name = expert_input(product.expert)
                captured[name] = RoutedActivation(values, product.rows, product.num_routed)
        gathered = ops.concat(outputs, 0)
        for rank in range(places.shape[1]):
            place = self.device.to_tensor(np.ascontiguousarray(places[:, rank]))
            total = total + ops.gather(gathered, place, 0)
        if mlp.shared is not None:
            everything = self.device.to_tensor(np.arange(tokens.shape[0], dtype=np.int32))
            shared = mlp.shared
            activation, output = expert_forward(
                tokens, everything, share, shared.linears, shared.inputs, shared.schemes
            )
            total = total + output
            captured[SHARED] = activation.reshape((*hidden.shape[:2], -1))
        if not capture:
            return total.reshape(hidden.shape), {}
        captured |= dict(zip(weights.spec.attention.captured, attended, strict=True))
        captured["mlp_input"] = tokens.reshape(hidden.shape)
        return total.reshape(hidden.shape), captured

    def _run_expert(self, weights: _GatedWeights, tokens: Tensor, product: Dispatch) -> tuple[Tensor, list[Tensor]]:
        """What the expert's last linear reads, (r, m), and its weighted outputs, product by product."""
        activations, outputs = [], []
        for first in range(0, product.rows.size, ROWS):
            part = slice(first, first + ROWS)
            rows = self.device.to_tensor(np.maximum(product.rows[part], 0))
            share = self.device.to_tensor(product.share[part], self.dtype)
            made = expert_forward(tokens, rows, share, weights.linears, weights.inputs, weights.schemes)
            activations.append(made[0])
            outputs.append(made[1])
        return activations[0] if len(activations) == 1 else ops.concat(activations, 0), outputs

    def logits(self, outer: OuterWeights, hidden: Tensor) -> Tensor:
        """Logits (b, t, vocabulary) of hidden states (b, t, h) behind the last layer."""
        batch, tokens, channels = hidden.shape
        flat = hidden.reshape((batch * tokens, channels))
        norm, head = self._head(outer)
        return head_logits(flat, norm, head, self.architecture.rms_norm_eps).reshape((batch, tokens, -1))

    def token_losses(
        self, outer: OuterWeights, hidden: Tensor, input_ids: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Negative log likelihood of each sample's tokens given those before them.

        Position p predicts token p + 1; it counts where `mask` (b, t) is True at both. Logits exist for
        a chunk of positions at a time.

        Returns:
            Sum in nats (b,) float64 and number of predicted tokens (b,).
        """
        norm, head = self._head(outer)
        counted = _predicting(mask)
        targets = np.zeros(mask.shape, np.int32)
        targets[:, :-1] = input_ids[:, 1:]
        losses = np.zeros(mask.size, np.float64)
        flat = hidden.reshape((mask.size, -1))
        for part in self._chunks(counted):
            target = self.device.to_tensor(np.ascontiguousarray(targets.reshape(-1, 1)[part]))
            losses[part] = self.device.to_numpy(
                negative_log_likelihood(flat[part], norm, head, target, self.architecture.rms_norm_eps)
            )[:, 0]
        sums = np.where(counted, losses.reshape(mask.shape), 0.0).sum(axis=1)
        return sums, counted.sum(axis=1, dtype=np.int64)

    def token_divergences(
        self,
        outer: OuterWeights,
        hidden: Tensor,
        reference_outer: OuterWeights,
        reference: Tensor,
        mask: npt.NDArray[np.bool_],
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """How far the next token's distribution is from that of a reference, at the places of `token_losses`.

        Args:
            outer: norm and head of this model.
            hidden: (b, t, h) behind its last layer.
            reference_outer: norm and head of the model that it is compared with.
            reference: hidden states of that one.
            mask: (b, t), False for padding.

        Returns:
            KL(reference || this) in nats, float32, and whether the most likely tokens are equal; one each a predicted
            token, sample by sample.
        """
        counted = _predicting(mask)
        lost, equal = np.zeros(mask.size, np.float32), np.zeros(mask.size, bool)
        flat, other = (states.reshape((mask.size, -1)) for states in (hidden, reference))
        heads = ms.mutable(self._head(outer)), ms.mutable(self._head(reference_outer))
        for part in self._chunks(counted):
            found = divergence(flat[part], heads[0], other[part], heads[1], self.architecture.rms_norm_eps)
            lost[part], equal[part] = self.device.to_numpy(found[0])[:, 0], self.device.to_numpy(found[1])
        chosen = counted.reshape(-1)
        return np.maximum(lost[chosen], 0), equal[chosen]  # rounding leaves equal distributions a hair below 0

    def _chunks(self, counted: npt.NDArray[np.bool_]) -> Iterator[slice]:
        """Positions whose logits exist at a time, of one length; those without any that counts are left out."""
        rows = counted.size
        chunk = min(rows, max(16, _LOGITS_BYTES // (4 * self.architecture.vocab_size)))
        for start in range(0, rows, chunk):
            # The last chunk reaches back over rows already done: one shape, and nothing to pad.
            first = min(start, rows - chunk)
            if counted.reshape(-1)[first : first + chunk].any():
                yield slice(first, first + chunk)

    def _tensor(self, array: Array) -> Tensor:
        return self.device.to_tensor(array, self.dtype)

    def _head(self, outer: OuterWeights) -> tuple[Tensor, Tensor]:
        assert outer.norm is not None, "this stage has no final norm"
        assert outer.head is not None, "this stage has no head"
        return outer.norm, outer.head

    def _with_bias(self, name: str, tensors: Mapping[str, Array]) -> tuple[Tensor, ...]:
        weight, bias = self._tensor(tensors[f"{name}.weight"]), tensors.get(f"{name}.bias")
        return (weight,) if bias is None else (weight, self._tensor(bias))

    def _linear(
        self, name: str, tensors: Mapping[str, Array], quantized: Mapping[str, QuantizedLinear]
    ) -> tuple[Tensor, ...]:
        linear = quantized.get(name)
        if linear is None:
            return self._with_bias(name, tensors)
        weight, bias = linear.dequantized(), linear.bias
        return (self._tensor(weight),) if bias is None else (self._tensor(weight), self._tensor(bias))

    def _gated_weights(
        self, linears: Sequence[Linear], tensors: Mapping[str, Array], quantized: Mapping[str, QuantizedLinear]
    ) -> _GatedWeights:
        inputs, schemes = self._input_schemes(linears, quantized)
        made = tuple(self._linear(linear.name, tensors, quantized) for linear in linears)
        return _GatedWeights(ms.mutable(made), inputs, schemes)

    def _expert_weights(
        self, mlp: MixtureOfExperts, tensors: Mapping[str, Array], quantized: Mapping[str, QuantizedLinear]
    ) -> _ExpertWeights:
        outer = tuple(self._with_bias(linear.name, tensors) for linear in mlp.outer_linears)
        correction = tuple(self.device.to_tensor(tensors[name], ms.float32) for name in mlp.buffers)
        experts = (mlp.expert(number) for number in range(mlp.num_experts))
        return _ExpertWeights(
            outer=ms.mutable(outer),
            correction=ms.mutable(correction) if correction else (),
            experts=tuple(self._gated_weights(expert, tensors, quantized) for expert in experts),
            shared=self._gated_weights(mlp.shared_linears, tensors, quantized) if mlp.shared_size else None,
        )

    def _input_schemes(
        self, linears: Sequence[Linear], quantized: Mapping[str, QuantizedLinear]
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Scales and zero points of what linears read, (n, 2) float32, and the schemes that say how they are used."""
        inputs = np.zeros((len(linears), 2), np.float32)
        schemes = []
        for row, linear in zip(inputs, linears, strict=True):
            found = quantized.get(linear.name)
            if found is None or found.policy.act_quant_dtype is None:
                schemes.append("none")
            elif found.policy.is_static:
                assert found.input_scale is not None, f"{linear.name} is static and has no input scale"
                row[:] = found.input_scale, found.input_zero_point or 0
                schemes.append("per_tensor")
            else:
                schemes.append(self._token_scheme)
        return self.device.to_tensor(inputs, ms.float32), tuple(schemes)

    def _cache_schemes(self, quantized: QuantizedLayer | None) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
        """Scales of keys and values, and the schemes that say how they are used."""
        cache = None if quantized is None else quantized.kv_cache
        scales = (None, None) if cache is None else (cache.key_scale, cache.value_scale)
        schemes = tuple(
            "none" if cache is None else self._token_scheme if scale is None else "per_channel" for scale in scales
        )
        arrays = [np.ones(1, np.float32) if scale is None else scale for scale in scales]
        return tuple(self.device.to_tensor(array, ms.float32) for array in arrays), schemes

    def _table(self, tokens: int, attention: Attention) -> tuple[Any, Tensor, int, int]:
        """Rotary tables, mask, block and the window where it matters, for that sequence length."""
        limit = attention.window
        window = limit if limit is not None and tokens > limit else 0
        key = (tokens, window, attention.score_scale, attention.rotary)
        if key not in self._tables:
            block = min(tokens, max(128, -(-tokens // 8)))
            mask = _mask(block, window)
            rotary = ms.mutable(tuple(self._tensor(table) for table in rotary_tables(attention, tokens)))
            self._tables[key] = (rotary, self._tensor(mask), block, window)
        return self._tables[key]


def _predicting(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Where a token predicts the next one: `mask` (b, t) is True at both."""
    counted = np.zeros(mask.shape, bool)
    counted[:, :-1] = mask[:, :-1] & mask[:, 1:]
    return counted


def attention_form(weights: LayerWeights, epsilon: float, block: int, window: int) -> tuple[Any, ...]:
    """The fields of the form of the layer's kind of attention."""
    attention = weights.spec.attention
    if isinstance(attention, LatentAttention):
        return tuple(
            LatentForm(
                num_heads=attention.num_heads,
                has_query_latent=attention.query_rank is not None,
                kv_rank=attention.kv_rank,
                nope_dim=attention.nope_dim,
                turning=attention.rotary.channels,
                interleaved=attention.rotary.interleaved,
                score_scale=attention.score_scale,
                epsilon=epsilon,
                latent_epsilon=attention.latent_epsilon,
                block=block,
                schemes=weights.attention_schemes,
            )
        )
    return tuple(
        GroupedQueryForm(
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            qk_norm=attention.qk_norm,
            epsilon=epsilon,
            block=block,
            window=window,
            turning=attention.rotary.channels,
            fused=attention.fused,
            schemes=weights.attention_schemes,
            kv_schemes=weights.kv_schemes,
        )
    )


def _routing_form(routing: Routing) -> tuple[Any, ...]:
    return tuple(getattr(routing, name) for name in RoutingForm._fields)


def _mask(block: int, window: int) -> npt.NDArray[np.float32]:
    """What is added to the scores of a block of queries, see `_operations.attend`.

    Without a window (0) the keys are the block's own, (block, block); with one they begin window - 1
    before the block's first query, (block, window - 1 + block).
    """
    row = np.arange(block)[:, None]
    column = np.arange(block + max(window, 1) - 1)[None, :]
    seen = (row <= column) & (column < row + window) if window else column <= row
    return np.where(seen, 0.0, _MASKED).astype(np.float32)


def rotary_tables(attention: Attention, tokens: int) -> list[npt.NDArray[np.float32]]:
    """Cosine and sine for queries, times the factor of the scores, then for keys; (tokens, 1, channels) float32.

    Channels are `attention.table_channels`. The sine's first half carries the minus sign of transformers'
    `rotate_half`.
    """
    cosine, sine = attention.rotary.waves(tokens)
    still = np.zeros((tokens, attention.table_channels - attention.rotary.channels))
    full = (
        np.concatenate([cosine, cosine, still + 1], axis=1)[:, None],
        np.concatenate([-sine, sine, still], axis=1)[:, None],
    )
    scale = attention.score_scale * attention.rotary.query_factor(tokens)[:, None, None]
    return [np.asarray(table, dtype=np.float32) for table in (full[0] * scale, full[1] * scale, *full)]
