"""`W4A8_DYNAMIC`: int4 experts of a mixture, a scale a channel, as vLLM-Ascend's grouped matmul takes them.

Rules are those of vllm-ascend at 182b75e, `quantization/methods/w4a8.py`, and of msmodelslim 3de0a3c,
`core/quant_service/modelslim_v1/save/ascendv1.py`. Of an expert's linear (N, K): weight int8 (N / 2, K), the lower half
of a byte an even output and the upper the odd one after it; weight_scale, weight_offset (zero) float32 (N, 1);
scale_bias float32, 8 x the sum over the inputs of code x scale, (N, 1) for gate and up, and for down (N, 16), a
sixteenth of the inputs each, since a rank of tensor parallelism takes its share of the columns and adds them up. The
kernel halves an int8 activation into two signed halves, of which the lower is short of the truth by 8; scale_bias gives
that back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.results.integers import Float32, Int8, pair_outputs, unpair_outputs

__all__ = ["INT4_EXPERTS", "decode_expert", "encode_expert", "expert_misfit", "expert_tensors"]

INT4_EXPERTS = "W4A8_DYNAMIC"  # its label in description files
TENSOR_PARALLEL_SHARES = 16  # columns of scale_bias of a linear whose inputs are spread over ranks (w4a8.py)
_SPREAD_INPUTS = ("down_proj", "w2")


def _shares(name: str) -> int:
    return TENSOR_PARALLEL_SHARES if name.endswith(_SPREAD_INPUTS) else 1


def expert_misfit(name: str, rows: int, columns: int) -> str | None:
    """Why a linear (rows, columns) of that name cannot be stored so, and what to do; None if it can."""
    if rows % 2:
        return f"has {rows} output channels, which do not pack in pairs: give it W8A8_DYNAMIC"
    if columns % _shares(name):
        return (
            f"has {columns} input channels, which do not divide into {TENSOR_PARALLEL_SHARES} shares of "
            "scale_bias: give it W8A8_DYNAMIC"
        )
    return None


def expert_tensors(name: str, rows: int, columns: int) -> dict[str, StoredTensor]:
    """Last name to form of every tensor of a linear (rows, columns); `name` may be full, its last part counts."""
    scale = StoredTensor(dtype="float32", shape=(rows, 1))
    return {
        "weight": StoredTensor(dtype="int8", shape=(rows // 2, columns)),
        "weight_scale": scale,
        "weight_offset": scale,
        "scale_bias": StoredTensor(dtype="float32", shape=(rows, _shares(name))),
    }


def encode_expert(name: str, codes: Int8, scale: Float32) -> dict[str, npt.NDArray[Any]]:
    """Tensors by last name, of an even number of rows: `codes` (rows, columns) within [-8, 7], `scale` (rows, 1)."""
    shares = codes.reshape(len(codes), _shares(name), -1).sum(axis=2, dtype=np.int32)
    return {
        "weight": pair_outputs(codes),
        "weight_scale": scale,
        "weight_offset": np.zeros_like(scale),
        "scale_bias": 8 * shares.astype(np.float32) * scale,
    }


def decode_expert(weight: Int8, scale: npt.NDArray[Any]) -> tuple[Int8, Float32]:
    """Codes (rows, columns) and scale (rows, 1) float32 of what `encode_expert` made."""
    return unpair_outputs(weight), scale.astype(np.float32).reshape(-1, 1)
