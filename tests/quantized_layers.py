"""Layers rounded plainly, for tests of what comes after the solvers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from checkpoints import DTYPES

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.results.quantized import QuantizedLayer, QuantizedLinear

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GROUP = {"weight_quant_granularity": "per_group", "group_size": 64}
GPTQ = {"precision_recovery": "gptq", "algo_args": AlgoArgs(desc_act=True, static_groups=True)}
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A16": {},
    "W8A16 asymmetric": {"weight_symmetric": False},
    "W4A16 per channel": {"weight_quant_dtype": "qint4x2"},
    "W4A16 per group": {"weight_quant_dtype": "qint4x2", **GROUP},
    "W4A16 per group asymmetric": {"weight_quant_dtype": "qint4x2", "weight_symmetric": False, **GROUP},
    "W4A16 ordered by activation": {"weight_quant_dtype": "qint4x2", **GROUP, **GPTQ},
    "W8A8 static": {"act_quant_dtype": "int8"},
    "W8A8 static asymmetric": {"act_quant_dtype": "int8", "act_symmetric": False},
    "W8A8 dynamic": {"act_quant_dtype": "int8", "act_quant_granularity": "per_token"},
    "W4A8 dynamic": {
        "weight_quant_dtype": "qint4x2",
        "act_quant_dtype": "int8",
        "act_quant_granularity": "per_token",
        **GROUP,
        **GPTQ,
    },
}


"""Fields of QuantPolicy by the name of the scheme."""


def round_linear(
    weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None, policy: QuantPolicy, dtype: str
) -> QuantizedLinear:
    """Rounds to nearest over each row's or group's range, as the policy says; arbitrary input scales."""
    rows, columns = weight.shape
    groups = columns // policy.group_size if policy.group_size else 1
    bottom, top = -(2 ** (policy.weight_format.bits - 1)), 2 ** (policy.weight_format.bits - 1) - 1
    blocks = weight.astype(np.float32).reshape(rows, groups, -1)
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    span = high - low if not policy.weight_symmetric else 2 * np.maximum(high, -low)
    scale = (span / (top - bottom)).astype(DTYPES[dtype]).astype(np.float32)
    zero = np.zeros_like(scale) if policy.weight_symmetric else np.clip(np.rint(bottom - low / scale), bottom, top)
    codes = np.clip(np.rint(blocks / scale[:, :, None] + zero[:, :, None]), bottom, top)
    return QuantizedLinear(
        policy=policy,
        codes=codes.reshape(rows, columns).astype(np.int8),
        scale=scale,
        zero_point=None if policy.weight_symmetric else zero.astype(np.int8),
        bias=None if bias is None else bias.astype(np.float32),
        input_scale=float(np.float32(0.03125)) if policy.is_static else None,
        input_zero_point=(0 if policy.act_symmetric else 5) if policy.is_static else None,
    )


def quantize(reader: CheckpointReader, layer: int, policies: dict[str, QuantPolicy | None]) -> QuantizedLayer:
    """A layer of the checkpoint with the linears of `policies` (names within the layer) rounded."""
    tensors = reader.read_layer(layer)
    linears = {}
    for name, policy in policies.items():
        if policy is not None:
            weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
            linears[name] = round_linear(weight, bias, policy, reader.architecture.dtype)
    return QuantizedLayer(layer=layer, linears=linears, tensors=tensors)
