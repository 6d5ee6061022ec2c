"""Whole dense layers and what stands around layers, as free functions that `ms.jit` compiles.

Shapes: b samples, t tokens, h hidden, H query heads, K key/value heads, d head size; activations are (b * t, channels)
inside a layer.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from gs_dist.calibration._attention import attention_block
from gs_dist.calibration._operations import add_block, linear, norm_of, normalize, round_input

__all__ = ["dense_forward", "divergence", "gated_mlp", "head_logits", "negative_log_likelihood"]


def gated_mlp(hidden: Tensor, weights: Any, norm: Any, residual: Any, epsilon: float, schemes: Any) -> Any:
    """Gated mlp on the hidden states (b * t, h): those after it, its input, and that of its last linear."""
    linears, inputs = weights
    mlp_input = hidden if residual[0] else norm_of(hidden, norm, epsilon)
    gate = linear(round_input(mlp_input, schemes[0], inputs, 0), linears[0])
    last = len(linears) - 1
    if last == 1:  # one linear makes both
        size = gate.shape[1] // 2
        up = gate[:, size:]
        gate = gate[:, :size]
    else:
        up = linear(round_input(mlp_input, schemes[1], inputs, 1), linears[1])
    mlp_activation = ops.silu(gate) * up
    added = linear(round_input(mlp_activation, schemes[last], inputs, last), linears[last])
    hidden = add_block(hidden, added, norm, epsilon, residual)
    return hidden, mlp_input, mlp_activation


@ms.jit
def dense_forward(
    hidden: Tensor, attention: Any, mlp: Any, norms: Any, rotary: Any, mask: Tensor, form: tuple[Any, ...]
) -> Any:
    """A decoder layer of an attention and a gated mlp.

    Args:
        hidden: (b, t, h) in the compute dtype.
        attention: see `attention_block`.
        mlp: gate and up, or one linear for both, and down, each (weight,) or (weight, bias); (n, 2) float32 scale and
            zero point of their inputs.
        norms: the attention's and the mlp's, each (weight,) or (weight, bias).
        rotary: see `attention_block`.
        mask: likewise.
        form: whether to capture; whether norms stand behind their blocks, and what blocks are multiplied by; epsilon
            of the norms; schemes of the mlp's inputs; kind of attention and the fields of its form. All are plain
            tuples (a named one would be compiled anew at every call).

    Returns:
        The layer's output, or with `capture` that and what is captured of attention and mlp, each in its order.
    """
    capture, residual, epsilon, mlp_schemes, kind, attention_form = form
    samples = hidden.shape[:2]
    hidden = ops.reshape(hidden, (samples[0] * samples[1], hidden.shape[2]))
    attended = attention_block(hidden, attention, norms[0], rotary, mask, samples[1], residual, kind, attention_form)
    ended = gated_mlp(attended[0], mlp, norms[1], residual, epsilon, mlp_schemes)
    output = ops.reshape(ended[0], (*samples, -1))
    if capture:
        seen = [output]
        for activation in (*attended[1:], *ended[1:]):
            seen.append(ops.reshape(activation, (*samples, -1)))
        return tuple(seen)
    return output


@ms.jit
def head_logits(hidden: Tensor, norm: Tensor, head: Tensor, epsilon: float) -> Tensor:
    """Logits (n, vocabulary) of hidden states (n, h) behind the last layer."""
    return ops.MatMul(transpose_b=True)(normalize(hidden, norm, epsilon), head)


@ms.jit
def negative_log_likelihood(hidden: Tensor, norm: Tensor, head: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """-log p(target) (n, 1) float32 of hidden states (n, h) behind the last layer; targets (n, 1) int32."""
    logits = ops.MatMul(transpose_b=True)(normalize(hidden, norm, epsilon), head)
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
