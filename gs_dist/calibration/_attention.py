"""The kinds of attention as free functions that `ms.jit` compiles: hidden states in, hidden states and inputs out."""

from __future__ import annotations

from typing import Any, NamedTuple

from mindspore import Tensor, ops

from gs_dist.calibration._operations import (
    add_block,
    attend,
    interleaved_to_halves,
    linear,
    norm_of,
    rotate,
    round_cache,
    round_input,
)

__all__ = ["GroupedQueryForm", "LatentForm", "attention_block", "mixed_in", "projected"]


class GroupedQueryForm(NamedTuple):
    """What a compiled grouped-query attention depends on besides the shapes of its arguments.

    `schemes` is the fake quantisation of the inputs of its linears: "none", "per_tensor", "per_token" or
    "per_token_127"; `kv_schemes` that of keys and values, with "per_channel" for "per_tensor". `qk_norm` is
    `GroupedQueryAttention.qk_norm`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: str
    epsilon: float
    block: int
    window: int  # 0 where it does not matter
    turning: int  # channels of a head that the rotary embedding turns
    fused: bool  # whether one linear makes queries, keys and values
    schemes: tuple[str, ...]
    kv_schemes: tuple[str, ...]


class LatentForm(NamedTuple):
    """What a compiled latent attention depends on; the sizes are those of `LatentAttention`."""

    num_heads: int
    has_query_latent: bool
    kv_rank: int
    nope_dim: int
    turning: int
    interleaved: bool
    score_scale: float
    epsilon: float
    latent_epsilon: float
    block: int
    schemes: tuple[str, ...]


def attention_block(
    hidden: Tensor,
    weights: Any,
    norm: Any,
    rotary: Any,
    mask: Tensor,
    tokens: int,
    residual: Any,
    kind: str,
    form: Any,
) -> Any:
    """An attention on the hidden states (b * t, h).

    Args:
        hidden: of the layers before.
        weights: its linears, each (weight,) or (weight, bias); its own norms; (n, 2) float32 scale and zero point of
            the linears' inputs; scales (K * d,) of keys and values.
        norm: the norm before or behind it, (weight,) or (weight, bias).
        rotary: cosine and sine for queries (with the factor of the scores), then for keys, (t, 1, channels) each.
        mask: added to scores: (block, block) causal, or the band of a sliding window.
        tokens: t.
        residual: whether the norm is over what is added, and what that is multiplied by.
        kind: of the attention.
        form: the fields of that kind's form.

    Returns:
        The hidden states after it, then its captured activations (b * t, channels) as `LayerSpec.channels` lists them.
    """
    if kind == "latent":
        return _latent(hidden, weights, norm, rotary, mask, tokens, residual, form)
    return _grouped_query(hidden, weights, norm, rotary, mask, tokens, residual, form)


def _grouped_query(
    hidden: Tensor, weights: Any, norm: Any, rotary: Any, mask: Tensor, tokens: int, residual: Any, form: Any
) -> Any:
    static = GroupedQueryForm(*form)
    cache = weights[3]
    attention_input, query, key, value = projected(hidden, weights, norm, rotary, residual, form)
    cached_key = round_cache(key, static.kv_schemes[0], cache[0])
    cached_value = round_cache(value, static.kv_schemes[1], cache[1])
    attention_output = attend(
        query, cached_key, cached_value, mask, tokens, static.num_kv_heads, static.block, static.window
    )
    hidden = mixed_in(hidden, attention_output, weights, norm, residual, form)
    return hidden, attention_input, attention_output, key, value


def projected(hidden: Tensor, weights: Any, norm: Any, rotary: Any, residual: Any, form: Any) -> Any:
    """Input of a grouped-query attention, and its queries, keys (both turned) and values, before the cache rounds."""
    static = GroupedQueryForm(*form)
    size, epsilon, schemes = static.head_dim, static.epsilon, static.schemes
    linears, own_norms, inputs, _ = weights
    attention_input = hidden if residual[0] else norm_of(hidden, norm, epsilon)
    query = linear(round_input(attention_input, schemes[0], inputs, 0), linears[0])
    if static.fused:
        first, second = static.num_heads * size, (static.num_heads + static.num_kv_heads) * size
        key, value = query[:, first:second], query[:, second:]
        query = query[:, :first]
    else:
        key = linear(round_input(attention_input, schemes[1], inputs, 1), linears[1])
        value = linear(round_input(attention_input, schemes[2], inputs, 2), linears[2])
    if static.qk_norm == "head":
        query = ops.reshape(norm_of(ops.reshape(query, (-1, size)), own_norms[0], epsilon), query.shape)
        key = ops.reshape(norm_of(ops.reshape(key, (-1, size)), own_norms[1], epsilon), key.shape)
    if static.qk_norm == "all":
        query = norm_of(query, own_norms[0], epsilon)
        key = norm_of(key, own_norms[1], epsilon)
    query = rotate(query, rotary[0], rotary[1], size, static.turning)
    key = rotate(key, rotary[2], rotary[3], size, static.turning)
    return attention_input, query, key, value


def mixed_in(hidden: Tensor, attended: Tensor, weights: Any, norm: Any, residual: Any, form: Any) -> Any:
    """Hidden states after the output linear of a grouped-query attention that gave `attended`."""
    static = GroupedQueryForm(*form)
    linears, _, inputs, _ = weights
    last = 1 if static.fused else 3
    added = linear(round_input(attended, static.schemes[last], inputs, last), linears[last])
    return add_block(hidden, added, norm, static.epsilon, residual)


def _latent(
    hidden: Tensor, weights: Any, norm: Any, rotary: Any, mask: Tensor, tokens: int, residual: Any, form: Any
) -> Any:
    static = LatentForm(*form)
    heads, nope, turning, epsilon, schemes = (
        static.num_heads,
        static.nope_dim,
        static.turning,
        static.epsilon,
        static.schemes,
    )
    linears, own_norms, inputs, _ = weights
    attention_input = hidden if residual[0] else norm_of(hidden, norm, epsilon)
    rows = hidden.shape[0]
    # Linears stand in checkpoint order: one or two of the queries, then those of the latent, its expansion, the output.
    first = 2 if static.has_query_latent else 1
    query = linear(round_input(attention_input, schemes[0], inputs, 0), linears[0])
    query_latent = query
    if static.has_query_latent:
        query_latent = norm_of(query, own_norms[0], static.latent_epsilon)
        query = linear(round_input(query_latent, schemes[1], inputs, 1), linears[1])
    compressed = linear(round_input(attention_input, schemes[first], inputs, first), linears[first])
    kv_latent = norm_of(compressed[:, : static.kv_rank], own_norms[first - 1], static.latent_epsilon)
    key_turning = compressed[:, static.kv_rank :]

    query = ops.reshape(query, (rows * heads, nope + turning))
    query_turning = query[:, nope:]
    if static.interleaved:
        query_turning = interleaved_to_halves(query_turning, turning)
        key_turning = interleaved_to_halves(key_turning, turning)
    query_turning = ops.reshape(query_turning, (rows, heads * turning))
    query_turning = rotate(query_turning, rotary[0], rotary[1], turning, turning)
    key_turning = rotate(key_turning, rotary[2], rotary[3], turning, turning)
    # Tables of the queries have the factor of the scores; channels without position get it here.
    still = query[:, :nope] * static.score_scale
    query = ops.concat((still, ops.reshape(query_turning, (rows * heads, turning))), 1)

    expanded = ops.reshape(linear(kv_latent, linears[first + 1]), (rows * heads, -1))
    shared = ops.reshape(ops.tile(key_turning, (1, heads)), (rows * heads, turning))
    key = ops.concat((expanded[:, :nope], shared), 1)
    value = expanded[:, nope:]
    attention_output = attend(
        ops.reshape(query, (rows, -1)),
        ops.reshape(key, (rows, -1)),
        ops.reshape(value, (rows, -1)),
        mask,
        tokens,
        heads,
        static.block,
        0,
    )
    last = first + 2
    added = linear(round_input(attention_output, schemes[last], inputs, last), linears[last])
    hidden = add_block(hidden, added, norm, epsilon, residual)
    if static.has_query_latent:
        return hidden, attention_input, query_latent, attention_output
    return hidden, attention_input, attention_output
