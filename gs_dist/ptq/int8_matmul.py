"""Products of int8 matrices: one kernel on an Ascend card, written out in float64 elsewhere.

The formula is that of CANN's aclnnQuantMatmulV4 (CANN API reference): (x w^T + correction) * scale, times the
scale of each token where activations are dynamic.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import ops
from mindspore.ops.auto_generate import QuantBatchMatmul

__all__ = ["has_kernel", "matmul_int8"]


def has_kernel(dtype: Any) -> bool:
    """Whether this process's device multiplies int8 matrices and gives outputs of that dtype."""
    return bool(ms.get_context("device_target") == "Ascend" and dtype in (ms.float16, ms.bfloat16))


def matmul_int8(x: Any, weight: Any, scale: Any, correction: Any, token_scale: Any, dtype: Any) -> Any:
    """Product of codes x (tokens, in) and weight (out, in), both int8, as numbers (tokens, out) of `dtype`.

    Args:
        x: codes of the activation.
        weight: codes of the weight.
        scale: (out,) float32.
        correction: (out,) int32 added to the integer product, or None.
        token_scale: (tokens,) float32, or None.
        dtype: of the result.
    """
    if has_kernel(dtype):
        return _on_card(x, weight, scale, correction, token_scale, dtype)
    product = ops.MatMul(transpose_b=True)(x.astype(ms.float64), weight.astype(ms.float64))
    if correction is not None:
        product = product + correction.astype(ms.float64)
    product = product * scale.astype(ms.float64)
    if token_scale is not None:
        product = product * token_scale.astype(ms.float64).reshape(-1, 1)
    return product.astype(dtype)


def _on_card(x: Any, weight: Any, scale: Any, correction: Any, token_scale: Any, dtype: Any) -> Any:
    # The kernel wants float32 scales for bfloat16 outputs and for dynamic activations, and else the bits
    # of the float32 scale in an int64 (golden-stick `NumpyQuantOps.trans_fp32_to_i64`).
    if token_scale is None and dtype == ms.float16:
        bits = scale.asnumpy().view("uint32").astype("int64")
        scale = ms.Tensor(bits)
    kernel = QuantBatchMatmul(transpose_x1=False, transpose_x2=True, dtype=dtype)
    return kernel(x, weight, scale, None, correction, token_scale)
