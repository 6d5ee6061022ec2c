"""The decoder's arithmetic as free functions that `ms.jit` compiles: arrays in, arrays out, no state.

Shapes: b samples, t tokens, h hidden, H query heads, K key/value heads, g = H / K, d head size; activations
are (b * t, channels) inside a layer. Two habits come from measuring on CPUs: a factor is tiled to full
size before an elementwise operation, because that is several times faster there than broadcasting, and
attention works on the blocks under the diagonal only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mindspore as ms
from mindspore import Tensor, ops

__all__ = [
    "AttentionForm",
    "attention_block",
    "columns",
    "dense_forward",
    "divergence",
    "head_logits",
    "linear",
    "negative_log_likelihood",
    "norm_of",
    "normalise",
    "round_input",
    "rows_of",
]


class AttentionForm(NamedTuple):
    """What a compiled attention depends on besides the shapes of its arguments.

    `schemes` is the fake quantisation of the inputs of queries, keys, values and output: "none", "per_tensor",
    "per_token" or "per_token_127"; `kv_schemes` that of keys and values, with "per_channel" for "per_tensor". `qk_norm`
    is `GroupedQueryAttention.qk_norm`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: str
    epsilon: float
    block: int
    window: int  # 0 where it does not matter
    turning: int  # channels of a head that the rotary embedding turns
    schemes: tuple[str, ...] = ("none",) * 4
    kv_schemes: tuple[str, ...] = ("none", "none")


def columns(factor: Tensor, width: int) -> Tensor:
    """A row factor (n, 1) repeated to (n, width)."""
    return ops.tile(factor, (1, width))


def rows_of(factor: Tensor, height: int) -> Tensor:
    """A channel factor (c,) repeated to (height, c)."""
    return ops.tile(factor, (height, 1))


def norm_of(x: Tensor, norm: tuple[Tensor, ...], epsilon: float) -> Tensor:
    """RMSNorm of the rows of x (n, c) by norm[0] (c,), plus the bias norm[1] (c,) if there is one."""
    normed = normalise(x, norm[0], epsilon)
    return normed if len(norm) == 1 else normed + rows_of(norm[1], x.shape[0])


def normalise(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of the rows of x (n, c), in float32 as transformers does it."""
    wide = ops.cast(x, ms.float32)
    mean = ops.ReduceMean(True)(ops.square(wide), -1)
    normed = wide * columns(ops.rsqrt(mean + epsilon), x.shape[1])
    return ops.cast(normed, x.dtype) * rows_of(weight, x.shape[0])


def _round_per_token(x: Tensor, divisor: float) -> Tensor:
    """Symmetric int8 with a scale a row, the largest magnitude over the divisor; see `TokenStep`."""
    scale = ops.ReduceMax(True)(ops.abs(x), -1) / divisor
    scale = ops.maximum(scale, 1e-30)  # a row of zeros stays one
    full = columns(scale, x.shape[1])
    return ops.clamp(ops.round(x / full), -128.0, 127.0) * full


def _round_per_channel(x: Tensor, scale: Tensor) -> Tensor:
    """Symmetric int8 with a scale a channel."""
    full = rows_of(scale, x.shape[0])
    return ops.clamp(ops.round(x / full), -128.0, 127.0) * full


def _round_per_tensor(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """int8 with one scale and zero point."""
    codes = ops.clamp(ops.round(x / scale + zero_point), -128.0, 127.0)
    return (codes - zero_point) * scale


def round_input(x: Tensor, scheme: str, scales: Tensor, index: int) -> Tensor:
    """What the linear of that number reads, rounded as its scheme says."""
    if scheme == "per_tensor":
        return _round_per_tensor(x, scales[index, 0], scales[index, 1])
    if scheme == "per_token":
        return _round_per_token(x, 127.5)
    if scheme == "per_token_127":
        return _round_per_token(x, 127.0)
    return x


def _round_cache(x: Tensor, scheme: str, scale: Tensor) -> Tensor:
    if scheme == "per_channel":
        return _round_per_channel(x, scale)
    if scheme == "per_token":
        return _round_per_token(x, 127.5)
    if scheme == "per_token_127":
        return _round_per_token(x, 127.0)
    return x


def linear(x: Tensor, weight: tuple[Tensor, ...]) -> Tensor:
    """Rows of x (n, in) through weight[0] (out, in), plus the bias weight[1] (out,) if there is one."""
    y = ops.MatMul(transpose_b=True)(x, weight[0])
    if len(weight) > 1:
        y = y + rows_of(weight[1], x.shape[0])
    return y


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, head_dim: int, turning: int) -> Tensor:
    """Rotary embedding of the first `turning` channels of each head, their halves as the two coordinates.

    Tables are (t, 1, d), the sine with its sign, and zero where nothing turns.
    """
    rows, channels = x.shape
    tokens = cosine.shape[0]
    heads = channels // head_dim
    half = turning // 2
    split = ops.reshape(x, (rows * heads, head_dim))
    if turning == head_dim:
        turned = ops.concat((split[:, half:], split[:, :half]), 1)
    else:
        turned = ops.concat((split[:, half:turning], split[:, :half], split[:, turning:]), 1)
    full_cosine = ops.reshape(ops.tile(cosine, (rows // tokens, heads, 1)), (rows * heads, head_dim))
    full_sine = ops.reshape(ops.tile(sine, (rows // tokens, heads, 1)), (rows * heads, head_dim))
    return ops.reshape(split * full_cosine + turned * full_sine, (rows, channels))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, tokens: int, form: AttentionForm) -> Tensor:
    """Causal softmax attention; query scaled already, (b * t, H * d), key and value (b * t, K * d)."""
    groups, size = form.num_kv_heads, form.head_dim
    repeat = form.num_heads // groups
    batch = query.shape[0] // tokens
    query = ops.reshape(query, (batch, tokens, groups, repeat, size))
    key = ops.transpose(ops.reshape(key, (batch, tokens, groups, size)), (0, 2, 1, 3))
    value = ops.transpose(ops.reshape(value, (batch, tokens, groups, size)), (0, 2, 1, 3))
    key = ops.reshape(key, (batch * groups, tokens, size))
    value = ops.reshape(value, (batch * groups, tokens, size))
    scores_of = ops.BatchMatMul(transpose_b=True)
    weighted = ops.BatchMatMul()
    softmax = ops.Softmax(-1)
    outputs: list[Tensor] = []
    for start in range(0, tokens, form.block):
        stop = min(start + form.block, tokens)
        rows = stop - start
        part = ops.transpose(query[:, start:stop], (0, 2, 3, 1, 4))
        part = ops.reshape(part, (batch * groups, repeat * rows, size))
        if start > 0:
            part = ops.depend(
                part, outputs[-1]
            )  # one block after the other, so that one block's scores exist at a time
        first = max(0, start - form.window + 1) if form.window else 0
        if form.window:
            # One band mask serves every block: column j stands for the key window - 1 before the block's first, plus j.
            offset = form.window - 1 - start
            band = mask[:rows, first + offset : stop + offset]
            scores = scores_of(part, key[:, first:stop]) + ops.tile(band, (batch * groups, repeat, 1))
        else:
            scores = scores_of(part, key[:, start:stop]) + ops.tile(mask[:rows, :rows], (batch * groups, repeat, 1))
            if start > 0:
                scores = ops.concat((scores_of(part, key[:, :start]), scores), -1)
        weights = softmax(ops.cast(scores, ms.float32))
        output = weighted(ops.cast(weights, part.dtype), value[:, first:stop])
        output = ops.reshape(output, (batch, groups, repeat, rows, size))
        outputs.append(ops.reshape(ops.transpose(output, (0, 3, 1, 2, 4)), (batch, rows, groups * repeat * size)))
    return ops.reshape(ops.concat(outputs, 1), (batch * tokens, groups * repeat * size))


def attention_block(
    hidden: Tensor, weights: Any, norm: Any, rotary: Any, mask: Tensor, tokens: int, norm_after: bool, form: Any
) -> Any:
    """Grouped-query attention on the hidden states (b * t, h).

    Args:
        hidden: of the layers before.
        weights: as `dense_forward` takes them.
        norm: the norm before or behind it, (weight,) or (weight, bias).
        rotary: cosine and sine for queries (times 1 / sqrt(d)), then for keys, (t, 1, d) each.
        mask: added to scores: (block, block) causal, or the band of a sliding window.
        tokens: t.
        norm_after: whether the norm is over what is added.
        form: the fields of an `AttentionForm`.

    Returns:
        The hidden states after it, and its input, the input of its output linear, keys and values.
    """
    static = AttentionForm(*form)
    size, epsilon, schemes, kv_schemes = static.head_dim, static.epsilon, static.schemes, static.kv_schemes
    linears, own_norms, inputs, cache = weights
    attention_input = hidden if norm_after else norm_of(hidden, norm, epsilon)
    query = linear(round_input(attention_input, schemes[0], inputs, 0), linears[0])
    key = linear(round_input(attention_input, schemes[1], inputs, 1), linears[1])
    value = linear(round_input(attention_input, schemes[2], inputs, 2), linears[2])
    if static.qk_norm == "head":
        query = ops.reshape(norm_of(ops.reshape(query, (-1, size)), own_norms[0], epsilon), query.shape)
        key = ops.reshape(norm_of(ops.reshape(key, (-1, size)), own_norms[1], epsilon), key.shape)
    if static.qk_norm == "all":
        query = norm_of(query, own_norms[0], epsilon)
        key = norm_of(key, own_norms[1], epsilon)
    query = _rotate(query, rotary[0], rotary[1], size, static.turning)
    key = _rotate(key, rotary[2], rotary[3], size, static.turning)
    cached_key = _round_cache(key, kv_schemes[0], cache[0])
    cached_value = _round_cache(value, kv_schemes[1], cache[1])
    attention_output = _attend(query, cached_key, cached_value, mask, tokens, static)
    added = linear(round_input(attention_output, schemes[3], inputs, 3), linears[3])
    hidden = hidden + (norm_of(added, norm, epsilon) if norm_after else added)
    return hidden, attention_input, attention_output, key, value


def _gated_mlp(hidden: Tensor, weights: Any, norm: Any, norm_after: bool, epsilon: float, schemes: Any) -> Any:
    """Gated mlp on the hidden states (b * t, h): those after it, its input, and that of its last linear."""
    linears, inputs = weights
    mlp_input = hidden if norm_after else norm_of(hidden, norm, epsilon)
    gate = linear(round_input(mlp_input, schemes[0], inputs, 0), linears[0])
    up = linear(round_input(mlp_input, schemes[1], inputs, 1), linears[1])
    mlp_activation = ops.silu(gate) * up
    added = linear(round_input(mlp_activation, schemes[2], inputs, 2), linears[2])
    hidden = hidden + (norm_of(added, norm, epsilon) if norm_after else added)
    return hidden, mlp_input, mlp_activation


@ms.jit
def dense_forward(
    hidden: Tensor, attention: Any, mlp: Any, norms: Any, rotary: Any, mask: Tensor, form: tuple[Any, ...]
) -> Any:
    """A decoder layer of grouped-query attention and a gated mlp.

    Args:
        hidden: (b, t, h) in the compute dtype.
        attention: its four linears, each (weight,) or (weight, bias); its own norms; (4, 2) float32 scale and zero
            point of the linears' inputs; scales (K * d,) of keys and values.
        mlp: gate, up and down likewise; (3, 2) float32.
        norms: the attention's and the mlp's, each (weight,) or (weight, bias).
        rotary: see `attention_block`.
        mask: likewise.
        form: whether to capture, whether norms stand behind their blocks, schemes of the mlp's inputs, and the
            fields of an `AttentionForm`, all as plain tuples (a named one would be compiled anew at every call).

    Returns:
        The layer's output, or with `capture` that and the inputs of the linears in forward order, keys and values.
    """
    capture, norm_after, mlp_schemes, attention_form = form
    samples = hidden.shape[:2]
    hidden = ops.reshape(hidden, (samples[0] * samples[1], hidden.shape[2]))
    attended = attention_block(hidden, attention, norms[0], rotary, mask, samples[1], norm_after, attention_form)
    ended = _gated_mlp(attended[0], mlp, norms[1], norm_after, attention_form[4], mlp_schemes)
    output = ops.reshape(ended[0], (*samples, -1))
    if capture:
        return (
            output,
            ops.reshape(attended[1], (*samples, -1)),
            ops.reshape(attended[2], (*samples, -1)),
            ops.reshape(ended[1], (*samples, -1)),
            ops.reshape(ended[2], (*samples, -1)),
            ops.reshape(attended[3], (*samples, -1)),
            ops.reshape(attended[4], (*samples, -1)),
        )
    return output


@ms.jit
def head_logits(hidden: Tensor, norm: Tensor, head: Tensor, epsilon: float) -> Tensor:
    """Logits (n, vocabulary) of hidden states (n, h) behind the last layer."""
    return ops.MatMul(transpose_b=True)(normalise(hidden, norm, epsilon), head)


@ms.jit
def negative_log_likelihood(hidden: Tensor, norm: Tensor, head: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """-log p(target) (n, 1) float32 of hidden states (n, h) behind the last layer; targets (n, 1) int32."""
    logits = ops.MatMul(transpose_b=True)(normalise(hidden, norm, epsilon), head)
    return -ops.gather_elements(ops.LogSoftmax(-1)(ops.cast(logits, ms.float32)), 1, targets)


@ms.jit
def divergence(hidden: Tensor, head: Any, reference: Tensor, reference_head: Any, epsilon: float) -> tuple[Any, Any]:
    """How far the next token's distribution is from a reference's; (n, h) hidden states of both behind the last layer.

    `head` and `reference_head` are the final norm's weight and the head of each.

    Returns:
        KL(reference || it) in nats, (n, 1) float32, and whether both have the same most likely token, (n,).
    """
    ours = ops.LogSoftmax(-1)(ops.cast(head_logits(hidden, head[0], head[1], epsilon), ms.float32))
    theirs = ops.LogSoftmax(-1)(
        ops.cast(head_logits(reference, reference_head[0], reference_head[1], epsilon), ms.float32)
    )
    lost = ops.ReduceSum(True)(ops.exp(theirs) * (theirs - ours), -1)
    return lost, ops.equal(ops.Argmax(-1)(ours), ops.Argmax(-1)(theirs))
