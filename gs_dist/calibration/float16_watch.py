"""Numbers that float16 cannot hold, found where no statistics are taken of them.

Calibration computes in more than float16, so that it sees what a server of a float16 checkpoint turns into infinity:
hidden states between blocks, what a block adds to them, what linears put out (a gate that became -inf makes its product
with the up NaN, not 0), products of queries and keys, keys and values themselves, the last norm's output and logits.
(What linears read, the product of gate and up among it, is observed, and has a gate of its own.) Most of these are
bounded by norms of what was captured anyway; what a bound cannot rule out is computed for the tokens, rows and heads in
question. Linears of a routed expert are looked at for the tokens that were given to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.calibration.network import rotary_tables
from gs_dist.errors import LayerError
from gs_dist.model.decoder import GroupedQueryAttention, LayerSpec
from gs_dist.model.mlp import expert_input

__all__ = ["FLOAT16_MAX", "Float16Watch"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

FLOAT16_MAX = float(np.finfo(np.float16).max)

_ELEMENTS = 1 << 22  # of a weight made float32 at a time


class Float16Watch:
    """Watches one decoder layer.

    Args:
        prefix: of the layer's tensors.
        spec: the layer.
        tensors: by name within the layer, in the checkpoint's dtype.
        epsilon: of its norms.
        final_norm: weight of the norm behind the last layer, for that layer.
        head: (vocabulary, h) weight that makes the logits, for that layer.
    """

    def __init__(
        self,
        prefix: str,
        spec: LayerSpec,
        tensors: Mapping[str, Array],
        *,
        epsilon: float,
        final_norm: Array | None = None,
        head: Array | None = None,
    ) -> None:
        self._prefix = prefix.rstrip(".")
        self._spec = spec
        self._tensors = tensors
        self._epsilon = epsilon
        self._final_norm = final_norm
        self._head = head
        self._row_norms: dict[str, float] = {}
        self._stretches: dict[tuple[int, str], tuple[float, float]] = {}

    def look(
        self,
        micro_batch: int,
        before: Array,
        after: Array,
        captured: Mapping[str, Array],
        mask: npt.NDArray[np.bool_] | None = None,
        routed: Mapping[str, tuple[Array, Array]] | None = None,
    ) -> None:
        """Looks at one micro-batch.

        Args:
            micro_batch: its index, for the message.
            before: hidden states (b, t, h) that the layer took.
            after: what it gave.
            captured: what its linears read, keys and values, (b, t, channels) by name.
            mask: (b, t) False for padding.
            routed: by name what an expert's last linear reads, (r, channels), and of which tokens, (r,) numbers among
                the b * t.

        Raises:
            LayerError: something is beyond float16; the message says what, how far, and what to do.
        """

        def real(array: Array) -> Float32:
            wide = np.asarray(array).astype(np.float32, copy=False)
            return wide.reshape(-1, wide.shape[-1]) if mask is None else wide[mask]

        states = real(after)
        found = {
            "the hidden states behind it reach": _largest(states),
            "keys reach": _largest(real(captured["key"])) if "key" in captured else 0.0,
            "values reach": _largest(real(captured["value"])) if "value" in captured else 0.0,
            "what a block adds to the hidden states, or their sum, reaches": self._sums(real, before, states, captured),
            "the product of a query and a key reaches": self._scores(captured, mask),
            "the output of the model's last norm reaches": self._last_norm(states),
            **{f"the output of {name} reaches": most for name, most in self._outputs(real, captured)},
            **{
                f"the output of {name} reaches": most
                for name, most in self._outputs_of_experts(captured, routed or {}, mask)
            },
            "the largest logit reaches": self._logits(states),
        }
        for what, largest in found.items():
            if not largest <= FLOAT16_MAX:
                raise LayerError(
                    f"{self._prefix}: {what} {largest:.3g} in micro-batch {micro_batch}, beyond float16's "
                    f"{FLOAT16_MAX:.0f}, in which this checkpoint is stored and would be served: convert it to "
                    "bfloat16 first (model.to(torch.bfloat16).save_pretrained(new)), or leave those samples out"
                )

    def _sums(self, real: Any, before: Array, after: Float32, captured: Mapping[str, Array]) -> float:
        """What attention and mlp add, and the hidden states between them, where norms cannot rule it out."""
        if self._spec.norms_after:
            return self._normed_sum(real, before, captured)
        reads = {
            "self_attn.o_proj.weight": captured.get("attention_output"),
            "mlp.down_proj.weight": captured.get("mlp_activation"),
        }
        largest = 0.0
        for name, activation in reads.items():
            if activation is None or name not in self._tensors:
                continue
            x = real(activation)
            start = _token_max(real(before)) if name.startswith("self_attn") else _token_max(after)
            tokens = self._unbounded(name, self._tensors[name], x, start)
            if not tokens.size:
                continue
            states = (real(before) if name.startswith("self_attn") else -after)[tokens]
            for rows, added in self._products(name, x[tokens]):
                largest = max(largest, _largest(added), _largest(states[:, rows] + added))
        return largest

    def _normed_sum(self, real: Any, before: Array, captured: Mapping[str, Array]) -> float:
        """The hidden states between attention and mlp, where a norm stands behind the attention."""
        name = "self_attn.o_proj.weight"
        if "attention_output" not in captured or name not in self._tensors:
            return 0.0
        weight = self._tensors[f"{self._spec.norms[0]}.weight"].astype(np.float32)
        states = real(before)
        # No channel of a normed token is above sqrt(h) times its weight.
        most = _token_max(states) + np.sqrt(weight.size) * np.abs(weight).max()
        tokens = np.flatnonzero(~(most <= FLOAT16_MAX))
        if not tokens.size:
            return 0.0
        x = real(captured["attention_output"])[tokens]
        added = np.concatenate([part for _, part in self._products(name, x)], axis=1)
        return _largest(states[tokens] + self._normed(added, weight))

    def _outputs(self, real: Any, captured: Mapping[str, Array]) -> Iterator[tuple[str, float]]:
        """Each linear that every token passes, and its largest output where norms cannot rule it out, else 0."""
        left_out = {linear.name for expert in self._spec.mlp.experts for linear in expert}
        if not self._spec.norms_after:
            left_out |= {"self_attn.o_proj", "mlp.down_proj"}  # `_sums` looks at these
        for layer_input in self._spec.inputs:
            names = [name for name in layer_input.linears if name not in left_out]
            if not names or layer_input.name not in captured:
                continue
            x = real(captured[layer_input.name])
            for name in names:
                yield name, self._largest_output(f"{name}.weight", x)

    def _outputs_of_experts(
        self,
        captured: Mapping[str, Array],
        routed: Mapping[str, tuple[Array, Array]],
        mask: npt.NDArray[np.bool_] | None,
    ) -> Iterator[tuple[str, float]]:
        """The same of routed experts, for the tokens given to each: engines weight an output behind the linear."""
        if not routed:
            return
        everything = np.asarray(captured["mlp_input"])
        everything = everything.reshape(-1, everything.shape[-1])
        for number, (gate, up, down) in enumerate(self._spec.mlp.experts):
            if expert_input(number) not in routed:
                continue
            activation, tokens = routed[expert_input(number)]
            counted = tokens >= 0 if mask is None else (tokens >= 0) & mask.reshape(-1)[tokens]
            x = everything[tokens[counted]].astype(np.float32, copy=False)
            for linear in (gate, up):
                yield linear.name, self._largest_output(f"{linear.name}.weight", x)
            read = np.asarray(activation)[counted].astype(np.float32, copy=False)
            yield down.name, self._largest_output(f"{down.name}.weight", read)

    def _largest_output(self, name: str, x: Float32) -> float:
        bias = self._tensors.get(_bias_of(name))
        start = 0.0 if bias is None else _largest(bias.astype(np.float32))
        tokens = self._unbounded(name, self._tensors[name], x, start)
        return max((_largest(part) for _, part in self._products(name, x[tokens])), default=0.0) if tokens.size else 0.0

    def _unbounded(self, name: str, weight: Array, x: Float32, start: Float32 | float) -> npt.NDArray[np.intp]:
        """Tokens (n,) of x (t, channels) whose products with the weight's rows may be beyond float16, with `start`."""
        if name not in self._row_norms:
            blocks = (weight[rows].astype(np.float32) for rows in _row_blocks(weight))
            self._row_norms[name] = max(float(_norms(block).max()) for block in blocks)
        return np.flatnonzero(~(_norms(x) * self._row_norms[name] + start <= FLOAT16_MAX))

    def _products(self, name: str, x: Float32) -> Iterator[tuple[slice, Float32]]:
        """A linear's outputs for x (n, channels), a block of rows at a time."""
        weight, bias = self._tensors[name], self._tensors.get(_bias_of(name))
        for rows in _row_blocks(weight):
            made = x @ weight[rows].astype(np.float32).T
            yield rows, made if bias is None else made + bias[rows].astype(np.float32)

    def _scores(self, captured: Mapping[str, Array], mask: npt.NDArray[np.bool_] | None) -> float:
        """The largest product of a query and a key that it sees, before it is divided by sqrt(d)."""
        attention = self._spec.attention
        if not {"attention_input", "key"} <= captured.keys() or not isinstance(attention, GroupedQueryAttention):
            return 0.0
        if attention.rotary.channels != attention.head_dim:
            return 0.0  # another form of queries than `_queries` computes
        x = np.asarray(captured["attention_input"]).astype(np.float32, copy=False)
        keys = np.asarray(captured["key"]).astype(np.float32, copy=False)
        batch, tokens, _ = keys.shape
        keys = keys.reshape(batch, tokens, attention.num_kv_heads, attention.head_dim)
        if mask is not None:
            keys = np.where(mask[:, :, None, None], keys, np.float32(0))
            x = np.where(mask[:, :, None], x, np.float32(0))
        longest = _norms(keys).max(axis=(0, 1))  # of each key/value head
        repeat = attention.num_heads // attention.num_kv_heads
        widest = float(_norms(x).max())
        largest = 0.0
        for head in range(attention.num_heads):
            key_norm = float(longest[head // repeat])
            if any(bound * key_norm <= FLOAT16_MAX for bound in self._query_bounds(head, widest)):
                continue
            queries = self._queries(head, x)
            if float(_norms(queries).max()) * key_norm <= FLOAT16_MAX:
                continue
            for query, key in zip(queries, keys[:, :, head // repeat], strict=True):
                largest = max(largest, self._largest_product(query, key))
        return largest

    def _largest_product(self, query: Float32, key: Float32) -> float:
        """Of queries (t, d) with the keys (t, d) that each sees."""
        products = np.abs(query @ key.T)
        place = np.arange(query.shape[0])
        distance = place[:, None] - place[None, :]
        window = self._spec.attention.window
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return _largest(products[seen])

    def _query_bounds(self, head: int, widest: float) -> Iterator[float]:
        """Upper bounds of a query's norm for inputs of at most that norm, one tighter and dearer than the other."""
        if self._spec.attention.qk_norm != "none":
            weight = self._tensors["self_attn.q_norm.weight"].astype(np.float32)
            yield float(np.sqrt(weight.size) * np.abs(weight).max())
            return
        for measure in ("fro", "spectral"):
            stretch, bias = self._stretch(head, measure)
            yield stretch * widest + bias

    def _stretch(self, head: int, measure: str) -> tuple[float, float]:
        """A norm of a head's query weight, and that of its bias; each is found once."""
        if (head, measure) not in self._stretches:
            weight, bias = self._query_weight(head)
            if measure == "fro":
                norm = float(np.linalg.norm(weight))
            else:
                norm = float(np.sqrt(max(0.0, np.linalg.eigvalsh(weight @ weight.T)[-1])))
            self._stretches[head, measure] = (norm, 0.0 if bias is None else float(np.linalg.norm(bias)))
        return self._stretches[head, measure]

    def _query_weight(self, head: int) -> tuple[Float32, Float32 | None]:
        size = self._spec.attention.head_dim
        rows = slice(head * size, (head + 1) * size)
        bias = self._tensors.get("self_attn.q_proj.bias")
        return (
            self._tensors["self_attn.q_proj.weight"][rows].astype(np.float32),
            None if bias is None else bias[rows].astype(np.float32),
        )

    def _queries(self, head: int, x: Float32) -> Float32:
        """A head's queries (b, t, d) behind the rotary embedding, not divided by sqrt(d)."""
        attention = self._spec.attention
        weight, bias = self._query_weight(head)
        queries = x @ weight.T
        if bias is not None:
            queries += bias
        if attention.qk_norm == "head":
            mean = np.square(queries).mean(axis=-1, keepdims=True)
            norm = self._tensors["self_attn.q_norm.weight"].astype(np.float32)
            queries = queries / np.sqrt(mean + self._epsilon) * norm
        elif attention.qk_norm == "all":
            whole = x @ self._tensors["self_attn.q_proj.weight"].astype(np.float32).T
            mean = np.square(whole).mean(axis=-1, keepdims=True)
            size = attention.head_dim
            norm = self._tensors["self_attn.q_norm.weight"][head * size : (head + 1) * size].astype(np.float32)
            queries = queries / np.sqrt(mean + self._epsilon) * norm
        _, _, cosine, sine = (table[:, 0] for table in rotary_tables(attention, x.shape[1]))
        half = attention.head_dim // 2
        turned = np.concatenate([queries[..., half:], queries[..., :half]], axis=-1)
        return np.asarray(queries * cosine + turned * sine, dtype=np.float32)

    def _last_norm(self, states: Float32) -> float:
        if self._final_norm is None:
            return 0.0
        weight = np.abs(self._final_norm.astype(np.float32))
        if np.sqrt(weight.size) * weight.max() <= FLOAT16_MAX:  # no channel of a normed token is above sqrt(h)
            return 0.0
        return _largest(self._normed(states, weight))

    def _logits(self, states: Float32) -> float:
        """The largest logit in magnitude where norms cannot rule it out, else 0."""
        if self._final_norm is None or self._head is None:
            return 0.0
        x = self._normed(states, self._final_norm.astype(np.float32))
        tokens = self._unbounded("head", self._head, x, 0.0)
        if not tokens.size:
            return 0.0
        blocks = (self._head[rows].astype(np.float32) for rows in _row_blocks(self._head))
        return max(_largest(x[tokens] @ block.T) for block in blocks)

    def _normed(self, states: Float32, weight: Float32) -> Float32:
        """RMSNorm of (t, h)."""
        mean = np.square(states.astype(np.float64)).mean(axis=-1, keepdims=True)
        return np.asarray(states / np.sqrt(mean + self._epsilon) * weight, dtype=np.float32)


def _largest(values: Array) -> float:
    """The largest magnitude; NaN where there is one."""
    if not values.size:
        return 0.0
    return float(np.maximum(values.max(), -values.min()))


def _bias_of(name: str) -> str:
    return f"{name.removesuffix('.weight')}.bias"


def _token_max(values: Float32) -> Float32:
    return np.asarray(np.maximum(values.max(axis=1), -values.min(axis=1)))


def _norms(values: Float32) -> Float32:
    """Euclidean norms along the last axis, without a copy of the squares."""
    return np.asarray(np.sqrt(np.einsum("...i,...i->...", values, values)))


def _row_blocks(weight: Array) -> list[slice]:
    step = max(1, _ELEMENTS // weight.shape[1])
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]
