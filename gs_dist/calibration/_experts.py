"""The arithmetic of mixtures of experts: who goes where, in products of one shape, and back.

Tokens are sorted by expert, and each expert's are padded to whole products of `ROWS` rows: a compiled function sees
one shape however many tokens an expert is given, and a row's bits do not depend on how many others there are. The rows
that padding would leave empty show what the expert makes of the tokens that came closest to being given to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor, ops

from gs_dist.calibration._attention import attention_block
from gs_dist.calibration._operations import columns, linear, norm_of, round_input, rows_of

__all__ = ["ROWS", "Dispatch", "RoutingForm", "dispatch", "expert_forward", "routed_forward"]

Array = npt.NDArray[Any]

ROWS = 64  # of one product
_LEFT_OUT = 1e30


class RoutingForm(NamedTuple):
    """What a compiled routing depends on; the fields are those of `gs_dist.model.mlp.Routing`."""

    top_k: int
    scoring: str
    normalized: bool
    scale: float
    num_groups: int
    top_groups: int
    pairs: bool
    wide: bool


def _route(logits: Tensor, correction: Any, form: Any) -> Any:
    """Scores (n, E) by which experts are chosen, weights (n, k) of the chosen, and their numbers (n, k); float32.

    Source: transformers `Qwen3MoeTopKRouter`, `DeepseekV3TopkRouter`.
    """
    static = RoutingForm(*form)
    wide = ops.cast(logits, ms.float32)
    scores = ops.Softmax(-1)(wide) if static.scoring == "softmax" else ops.sigmoid(wide)
    choice = scores
    if len(correction) > 0:
        choice = choice + rows_of(correction[0], scores.shape[0])
    if static.num_groups > 1:
        size = scores.shape[1] // static.num_groups
        grouped = ops.reshape(choice, (-1, size))
        best = ops.topk(grouped, 2 if static.pairs else 1)[0]
        best = ops.reshape(ops.ReduceSum(True)(best, -1), (-1, static.num_groups))
        kept = ops.topk(best, static.top_groups)[1]
        chosen_groups = ops.ReduceSum(False)(ops.one_hot(kept, static.num_groups, 1.0, 0.0), 1)
        # Nothing is added within a chosen group, and far more than any score is taken off elsewhere.
        left_out = (1.0 - columns(ops.reshape(chosen_groups, (-1, 1)), size)) * _LEFT_OUT
        choice = ops.reshape(grouped - left_out, scores.shape)
    chosen = ops.topk(choice, static.top_k)[1]
    weights = ops.gather_elements(scores, 1, chosen)
    if static.normalized:
        total = ops.ReduceSum(True)(weights, -1) + (1e-20 if static.scoring == "sigmoid" else 0.0)
        weights = weights / columns(total, static.top_k)
    return choice, weights * static.scale, chosen


@ms.jit
def routed_forward(
    hidden: Tensor,
    attention: Any,
    outer: Any,
    correction: Any,
    norms: Any,
    rotary: Any,
    mask: Tensor,
    form: tuple[Any, ...],
) -> Any:
    """A decoder layer up to its experts: attention, the norm before them, and who goes where.

    Args:
        hidden: (b, t, h) in the compute dtype.
        attention: see `attention_block`.
        outer: the router, and the shared expert's gate where there is one, each (weight,).
        correction: (E,) float32 added to scores for choosing, or nothing.
        norms: the attention's and the mlp's.
        rotary: see `attention_block`.
        mask: likewise.
        form: the fields of a `RoutingForm`, epsilon of the norms, kind of attention and the fields of its form, as
            plain tuples.

    Returns:
        Hidden states (n, h) after the attention; the norm's output (n, h); scores, weights and chosen experts, see
        `_route`; the shared expert's weight (n, 1), 1 without a gate; then what is captured of the attention.
    """
    routing, epsilon, kind, attention_form = form
    samples = hidden.shape[:2]
    hidden = ops.reshape(hidden, (samples[0] * samples[1], hidden.shape[2]))
    attended = attention_block(
        hidden, attention, norms[0], rotary, mask, samples[1], (False, 1.0), kind, attention_form
    )
    mlp_input = norm_of(attended[0], norms[1], epsilon)
    if routing[7]:
        logits = ops.MatMul(transpose_b=True)(ops.cast(mlp_input, ms.float32), ops.cast(outer[0][0], ms.float32))
    else:
        logits = linear(mlp_input, outer[0])
    routed = _route(logits, correction, routing)
    share = ops.ones((hidden.shape[0], 1), hidden.dtype)
    if len(outer) > 1:
        share = ops.sigmoid(linear(mlp_input, outer[1]))
    seen = []
    for activation in attended[1:]:
        seen.append(ops.reshape(activation, (*samples, -1)))
    return (attended[0], mlp_input, *routed, share, *seen)


@ms.jit
def expert_forward(
    tokens: Tensor, rows: Tensor, share: Tensor, weights: Any, inputs: Tensor, schemes: tuple[str, ...]
) -> Any:
    """One expert on some tokens.

    Args:
        tokens: what all experts read, (n, h).
        rows: which of them, (r,) int32.
        share: weights of its outputs, (r, 1).
        weights: gate, up and down, each (weight,) or (weight, bias).
        inputs: (3, 2) float32 scale and zero point of the linears' inputs.
        schemes: of the linears' inputs, see `GroupedQueryForm`.

    Returns:
        What its last linear reads, (r, m), and its weighted output (r, h).
    """
    x = ops.gather(tokens, rows, 0)
    gate = linear(round_input(x, schemes[0], inputs, 0), weights[0])
    up = linear(round_input(x, schemes[1], inputs, 1), weights[1])
    activation = ops.silu(gate) * up
    output = linear(round_input(activation, schemes[2], inputs, 2), weights[2])
    return activation, output * columns(share, output.shape[1])


class Dispatch(NamedTuple):
    """The products of one expert.

    `rows` (r,) int32 names tokens, `share` (r, 1) float32 weights their outputs. The first `num_routed` are given to
    it; the rest come closest, in descending order of score, and weigh nothing.
    """

    expert: int
    rows: Array
    share: Array
    num_routed: int


def dispatch(scores: Array, weights: Array, chosen: Array, seen: Array, *, every: bool) -> tuple[list[Dispatch], Array]:
    """Lays tokens out in whole products.

    Args:
        scores: (n, E) by which experts were chosen.
        weights: (n, k) float32 of the chosen experts' outputs.
        chosen: (n, k) their numbers.
        seen: (n,) False for padding, which stands in for nobody.
        every: also lay out experts to which no token goes, if only to see what they would make of some.

    Returns:
        Products in order of expert, and where the output of each token's choices stands among their rows, (n, k).
    """
    top_k, num_experts = chosen.shape[1], scores.shape[1]
    flat = chosen.reshape(-1)
    order = np.argsort(flat, kind="stable")
    ends = np.cumsum(np.bincount(flat, minlength=num_experts))
    places = np.empty(flat.size, np.int32)
    products, first, start = [], 0, 0
    for expert in range(num_experts):
        own = order[first : ends[expert]]
        first = int(ends[expert])
        room = -own.size % ROWS if own.size else ROWS
        if not own.size and not every:
            continue
        places[own] = start + np.arange(own.size, dtype=np.int32)
        tokens = own // top_k
        others = _closest(scores[:, expert], tokens, seen, room) if every else np.zeros(0, np.int64)
        rows = np.zeros(own.size + room, np.int32)
        rows[: own.size] = tokens
        rows[own.size : own.size + others.size] = others
        if others.size < room:
            rows[own.size + others.size :] = -1
        share = np.zeros((rows.size, 1), np.float32)
        share[: own.size, 0] = weights.reshape(-1)[own]
        products.append(Dispatch(expert, rows, share, int(own.size)))
        start += rows.size
    return products, places.reshape(chosen.shape)


def _closest(scores: Array, tokens: Array, seen: Array, most: int) -> Array:
    """The tokens of the highest scores that are not among `tokens`, at most so many."""
    others = seen.copy()
    others[tokens] = False
    found = np.flatnonzero(others)
    ranked = found[np.argsort(-scores[found], kind="stable")]
    return np.asarray(ranked[:most])
