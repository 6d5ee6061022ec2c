"""Products of int8 matrices: one kernel on an Ascend card, written out in float64 elsewhere.

The formula is that of CANN's aclnnQuantMatmulV4 (CANN API reference): (x w^T + correction) * scale, times the
scale of each token where activations are dynamic.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import ops
from mindspore.ops.auto_generate import QuantBatchMatmul

__all__ = ["int8_kernel", "scale_bits", "written_out"]


def int8_kernel(dtype: Any) -> Any:
    """The device's product of int8 matrices with outputs of that dtype, None where it has none.

    Called as (x, weight, scale, None, correction, token_scale), see `written_out`.
    """
    if ms.get_context("device_target") != "Ascend" or dtype not in (ms.float16, ms.bfloat16):
        return None
    return QuantBatchMatmul(transpose_x1=False, transpose_x2=True, dtype=dtype)


def scale_bits(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Bits of float32 scales as int64, the form the kernel wants for float16 outputs of static activations.

    For bfloat16 outputs and dynamic activations it wants float32 (golden-stick
    `AllQuantMatmulHighPerformance`, `DynamicQuantMatmul`).
    """
    return scale.view(np.uint32).astype(np.int64)


def written_out(x: Any, weight: Any, scale: Any, correction: Any, token_scale: Any, dtype: Any) -> Any:
    """Product of codes x (tokens, in) and weight (out, in), both int8, as numbers (tokens, out) of `dtype`.

    Args:
        x: codes of the activation.
        weight: codes of the weight.
        scale: (out,) float32.
        correction: (out,) int32 added to the integer product, or None.
        token_scale: (tokens,) float32, or None.
        dtype: of the result.
    """
    product = ops.MatMul(transpose_b=True)(x.astype(ms.float64), weight.astype(ms.float64))
    if correction is not None:
        product = product + correction.astype(ms.float64)
    product = product * scale.astype(ms.float64)
    if token_scale is not None:
        product = product * token_scale.astype(ms.float64).reshape(-1, 1)
    return product.astype(dtype)
