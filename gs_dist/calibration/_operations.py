"""What layers of every kind are made of, as free functions that `ms.jit` compiles: arrays in, arrays out, no state.

Shapes: b samples, t tokens, h hidden, H query heads, K key/value heads, g = H / K, d head size; activations
are (b * t, channels) inside a layer. Two habits come from measuring on CPUs: a factor is tiled to full
size before an elementwise operation, because that is several times faster there than broadcasting, and
attention works on the blocks under the diagonal only.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

__all__ = [
    "add_block",
    "attend",
    "columns",
    "interleaved_to_halves",
    "linear",
    "norm_of",
    "normalize",
    "rotate",
    "round_cache",
    "round_input",
    "rows_of",
]


def columns(factor: Tensor, width: int) -> Tensor:
    """A row factor (n, 1) repeated to (n, width)."""
    return ops.tile(factor, (1, width))


def rows_of(factor: Tensor, height: int) -> Tensor:
    """A channel factor (c,) repeated to (height, c)."""
    return ops.tile(factor, (height, 1))


def norm_of(x: Tensor, norm: tuple[Tensor, ...], epsilon: float) -> Tensor:
    """RMSNorm of the rows of x (n, c) by norm[0] (c,), plus the bias norm[1] (c,) if there is one."""
    normed = normalize(x, norm[0], epsilon)
    return normed if len(norm) == 1 else normed + rows_of(norm[1], x.shape[0])


def normalize(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of the rows of x (n, c), in float32 as transformers does it."""
    wide = ops.cast(x, ms.float32)
    mean = ops.ReduceMean(True)(ops.square(wide), -1)
    normed = wide * columns(ops.rsqrt(mean + epsilon), x.shape[1])
    return ops.cast(normed, x.dtype) * rows_of(weight, x.shape[0])


def add_block(hidden: Tensor, added: Tensor, norm: tuple[Tensor, ...], epsilon: float, residual: Any) -> Tensor:
    """Hidden states (n, c) with what a block adds; `residual` is whether it passes the norm, and its multiplier."""
    norm_after, multiplier = residual
    if norm_after:
        added = norm_of(added, norm, epsilon)
    if multiplier != 1.0:
        added = added * multiplier
    return hidden + added


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


def round_cache(x: Tensor, scheme: str, scale: Tensor) -> Tensor:
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


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, head_dim: int, turning: int) -> Tensor:
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


def interleaved_to_halves(x: Tensor, turning: int) -> Tensor:
    """Heads (n, turning) whose pairs are neighbours, with the pairs' first members before their second ones."""
    pairs = ops.reshape(x, (x.shape[0], turning // 2, 2))
    return ops.reshape(ops.transpose(pairs, (0, 2, 1)), x.shape)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, tokens: int, groups: int, block: int, window: int
) -> Tensor:
    """Causal softmax attention.

    Args:
        query: scaled already, (b * t, H * d).
        key: (b * t, K * d).
        value: (b * t, K * e).
        mask: see `_forward.dense_forward`.
        tokens: t.
        groups: K.
        block: queries of which scores exist at a time.
        window: keys that a query sees, 0 for all before it.

    Returns:
        (b * t, H * e).
    """
    size, width = key.shape[1] // groups, value.shape[1] // groups
    repeat = query.shape[1] // size // groups
    batch = query.shape[0] // tokens
    query = ops.reshape(query, (batch, tokens, groups, repeat, size))
    key = ops.transpose(ops.reshape(key, (batch, tokens, groups, size)), (0, 2, 1, 3))
    value = ops.transpose(ops.reshape(value, (batch, tokens, groups, width)), (0, 2, 1, 3))
    key = ops.reshape(key, (batch * groups, tokens, size))
    value = ops.reshape(value, (batch * groups, tokens, width))
    scores_of = ops.BatchMatMul(transpose_b=True)
    weighted = ops.BatchMatMul()
    softmax = ops.Softmax(-1)
    outputs: list[Tensor] = []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        rows = stop - start
        part = ops.transpose(query[:, start:stop], (0, 2, 3, 1, 4))
        part = ops.reshape(part, (batch * groups, repeat * rows, size))
        if start > 0:
            part = ops.depend(
                part, outputs[-1]
            )  # one block after the other, so that one block's scores exist at a time
        first = max(0, start - window + 1) if window else 0
        if window:
            # One band mask serves every block: column j stands for the key window - 1 before the block's first, plus j.
            offset = window - 1 - start
            band = mask[:rows, first + offset : stop + offset]
            scores = scores_of(part, key[:, first:stop]) + ops.tile(band, (batch * groups, repeat, 1))
        else:
            scores = scores_of(part, key[:, start:stop]) + ops.tile(mask[:rows, :rows], (batch * groups, repeat, 1))
            if start > 0:
                scores = ops.concat((scores_of(part, key[:, :start]), scores), -1)
        weights = softmax(ops.cast(scores, ms.float32))
        output = weighted(ops.cast(weights, part.dtype), value[:, first:stop])
        output = ops.reshape(output, (batch, groups, repeat, rows, width))
        outputs.append(ops.reshape(ops.transpose(output, (0, 3, 1, 2, 4)), (batch, rows, groups * repeat * width)))
    return ops.reshape(ops.concat(outputs, 1), (batch * tokens, groups * repeat * width))
