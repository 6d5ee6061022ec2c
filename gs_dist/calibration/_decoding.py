"""One token through a dense layer that keeps keys and values, as a free function that `ms.jit` compiles."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from gs_dist.calibration._attention import GroupedQueryForm, mixed_in, projected
from gs_dist.calibration._forward import gated_mlp
from gs_dist.calibration._operations import columns, round_cache, rows_of

__all__ = ["decoding_step", "rounded_cache"]


@ms.jit
def decoding_step(
    hidden: Tensor,
    attention: Any,
    mlp: Any,
    norms: Any,
    rotary: Any,
    cached: Any,
    place: Tensor,
    unseen: Tensor,
    form: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """A decoder layer of grouped-query attention and a gated mlp, for one more token.

    Args:
        hidden: (1, h).
        attention: as of `dense_forward`.
        mlp: likewise.
        norms: likewise.
        rotary: its tables at the token's position, (1, 1, d) each.
        cached: keys and values of T positions, (T, K * d) each, as the cache holds them.
        place: (T, 1), 1 at the token's position and 0 elsewhere, in the compute dtype.
        unseen: (1, 1, T), 0 where the token looks and far below any score elsewhere.
        form: whether norms stand behind their blocks, and what blocks are multiplied by; epsilon of the norms; schemes
            of the mlp's inputs; fields of `GroupedQueryForm`.

    Returns:
        Hidden states (1, h) behind the layer, and keys and values with the token's own.
    """
    residual, epsilon, mlp_schemes, attention_form = form
    static = GroupedQueryForm(*attention_form)
    _, query, key, value = projected(hidden, attention, norms[0], rotary, residual, attention_form)
    cache = attention[3]
    keys = _with_row(cached[0], round_cache(key, static.kv_schemes[0], cache[0]), place)
    values = _with_row(cached[1], round_cache(value, static.kv_schemes[1], cache[1]), place)
    groups, size, positions = static.num_kv_heads, static.head_dim, keys.shape[0]
    repeat = static.num_heads // groups
    query = ops.reshape(query, (groups, repeat, size))
    by_head = ops.transpose(ops.reshape(keys, (positions, groups, size)), (1, 0, 2))
    scores = ops.BatchMatMul(transpose_b=True)(query, by_head) + ops.tile(unseen, (groups, repeat, 1))
    weights = ops.cast(ops.Softmax(-1)(ops.cast(scores, ms.float32)), hidden.dtype)
    by_head = ops.transpose(ops.reshape(values, (positions, groups, size)), (1, 0, 2))
    attended = ops.reshape(ops.BatchMatMul()(weights, by_head), (1, -1))
    hidden = mixed_in(hidden, attended, attention, norms[0], residual, attention_form)
    return gated_mlp(hidden, mlp, norms[1], residual, epsilon, mlp_schemes)[0], keys, values


def _with_row(table: Tensor, row: Tensor, place: Tensor) -> Tensor:
    chosen = columns(place, table.shape[1])
    return table * (1 - chosen) + rows_of(ops.reshape(row, (-1,)), table.shape[0]) * chosen


@ms.jit
def rounded_cache(cached: Tensor, scheme: str, scale: Tensor) -> Tensor:
    """Keys or values (T, K * d) as a cache of that scheme gives them back."""
    return round_cache(cached, scheme, scale)
