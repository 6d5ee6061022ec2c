"""vLLM-Ascend reading ModelSlim's layout; SGLang and xLLM on Ascend read the same directory.

Rules are those of vllm-ascend at 182b75e, `quantization/methods/*.py` (tensors) and `modelslim_config.py` (description
file), and of msmodelslim 3de0a3c, `core/quant_service/modelslim_v1/save/ascendv1.py`. Of a linear (N, K), pd being the
model's dtype:

* `W8A8_DYNAMIC`, `W8A16`: weight int8 (N, K); weight_scale, weight_offset (zero) pd (N, 1).
* `W4A8_DYNAMIC`, experts alone: see `gs_dist.checkpoint.dialects.ascend.int4_experts`.
* `W8A8FP8_DYNAMIC`: weight E4M3 (N, K); weight_scale float32, weight_offset (zero) pd (N, 1).
* `W8A8_MXFP8`: weight E4M3 (N, K); weight_scale uint8 (N, K / 32), exponents plus 127.
* `W4A8_MXFP`, `W4A4_MXFP4`, `W4A16_MXFP4`: weight uint8 (N, K / 2), two E2M1 codes of neighbouring inputs, the lower
  half first; weight_scale as above. Ascend 950 computes in these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gs_dist.checkpoint.dialects.ascend.int4_experts import encode_expert, expert_misfit, expert_tensors
from gs_dist.checkpoint.header import DTYPES, SPELLINGS
from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.conversion.dialects.base import (
    Array,
    Assigned,
    Encoding,
    LinearShape,
    fp8_codes,
    paired_inputs,
    stored_scale,
)
from gs_dist.conversion.schemes import FLOAT, Scheme
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.solvers.float_rounding import MX_BLOCK, MicroscalingRounding
from gs_dist.solvers.weight_rounding import RoundedRows

__all__ = ["AscendWriter"]

DESCRIPTION_FILE = DIALECTS["ascend"].describing_file


@dataclass(frozen=True, kw_only=True)
class _OneByteCodes(Encoding):
    """int8 codes, scale and a zero offset a channel."""

    def tensors(self, linear: LinearShape) -> dict[str, StoredTensor]:
        scale = StoredTensor(dtype=linear.dtype, shape=(linear.rows, 1))
        weight = StoredTensor(dtype="int8", shape=(linear.rows, linear.columns))
        return {"weight": weight, "weight_scale": scale, "weight_offset": scale}

    def encode(self, linear: LinearShape, rounded: RoundedRows) -> dict[str, Array]:
        scale = stored_scale(rounded.scale, linear.dtype, linear.name)
        return {"weight": rounded.codes, "weight_scale": scale, "weight_offset": np.zeros_like(scale)}


@dataclass(frozen=True, kw_only=True)
class _Int4Expert(Encoding):
    """int4 codes of two outputs a byte, and what the kernel needs beside the scale; see `int4_experts`."""

    row_step: int = 2

    def tensors(self, linear: LinearShape) -> dict[str, StoredTensor]:
        return expert_tensors(linear.name, linear.rows, linear.columns)

    def encode(self, linear: LinearShape, rounded: RoundedRows) -> dict[str, Array]:
        return encode_expert(linear.name, rounded.codes, rounded.scale)

    def misfit(self, linear: LinearShape) -> str | None:
        return expert_misfit(linear.name, linear.rows, linear.columns)


@dataclass(frozen=True, kw_only=True)
class _Fp8Channels(Encoding):
    """E4M3 codes, a float32 scale and a zero offset a channel."""

    def tensors(self, linear: LinearShape) -> dict[str, StoredTensor]:
        return {
            "weight": StoredTensor(dtype="float8_e4m3fn", shape=(linear.rows, linear.columns)),
            "weight_scale": StoredTensor(dtype="float32", shape=(linear.rows, 1)),
            "weight_offset": StoredTensor(dtype=linear.dtype, shape=(linear.rows, 1)),
        }

    def encode(self, linear: LinearShape, rounded: RoundedRows) -> dict[str, Array]:
        offset = np.zeros(rounded.scale.shape, dtype=DTYPES[SPELLINGS[linear.dtype]])
        return {"weight": fp8_codes(rounded.codes), "weight_scale": rounded.scale, "weight_offset": offset}


@dataclass(frozen=True, kw_only=True)
class _Microscaled(Encoding):
    """Codes with an exponent a block of 32 inputs: E4M3 a byte each, or (`paired`) E2M1 two inputs a byte."""

    paired: bool

    def tensors(self, linear: LinearShape) -> dict[str, StoredTensor]:
        weight = StoredTensor(dtype="float8_e4m3fn", shape=(linear.rows, linear.columns))
        if self.paired:
            weight = StoredTensor(dtype="uint8", shape=(linear.rows, linear.columns // 2))
        return {
            "weight": weight,
            "weight_scale": StoredTensor(dtype="uint8", shape=(linear.rows, linear.columns // 32)),
        }

    def encode(self, linear: LinearShape, rounded: RoundedRows) -> dict[str, Array]:
        weight = paired_inputs(rounded.codes) if self.paired else fp8_codes(rounded.codes)
        return {"weight": weight, "weight_scale": rounded.scale}

    def misfit(self, linear: LinearShape) -> str | None:
        """The engine takes exponents in pairs (`w8a8_mxfp8.py`, `w4a8_mxfp4.py`, process_weights_after_loading)."""
        if linear.columns % 64:
            return (
                f"has {linear.columns} input channels, and vLLM-Ascend takes microscaling blocks in pairs, 64 channels"
            )
        return None


_ENCODINGS: Mapping[tuple[str, bool], Encoding] = {
    ("W8A8_DYNAMIC", False): _OneByteCodes(),
    ("W8A8_DYNAMIC", True): _OneByteCodes(),
    ("W8A16", False): _OneByteCodes(),
    ("W4A8_DYNAMIC", True): _Int4Expert(),
    ("W8A8FP8_DYNAMIC", False): _Fp8Channels(),
    ("W8A8FP8_DYNAMIC", True): _Fp8Channels(),
    ("W8A8_MXFP8", False): _Microscaled(paired=False),
    ("W8A8_MXFP8", True): _Microscaled(paired=False),
    ("W4A8_MXFP", False): _Microscaled(paired=True),
    ("W4A8_MXFP", True): _Microscaled(paired=True),
    ("W4A4_MXFP4", False): _Microscaled(paired=True),
    ("W4A4_MXFP4", True): _Microscaled(paired=True),
    ("W4A16_MXFP4", True): _Microscaled(paired=True),
}
"""Scheme, and whether of an expert, to how it is written: what vllm-ascend registers for "linear" and "moe"."""


class AscendWriter:
    """Writes ModelSlim's layout."""

    name = "ascend"

    def encoding(self, scheme: Scheme, *, expert: bool) -> Encoding | str:
        """See `DialectWriter.encoding`."""
        found = _ENCODINGS.get((scheme.name, expert))
        if found is not None:
            return found
        served = [name for name, of_expert in _ENCODINGS if of_expert == expert]
        what = "experts of mixtures" if expert else "linears outside of experts"
        return f"vLLM-Ascend's main loads no {what} in {scheme.name}: give them {', '.join(served)}, or null"

    def conflict(self, schemes: Sequence[Scheme]) -> str | None:
        """One `group_size` describes all: W4A8_DYNAMIC raises on any, microscaling divides by it (`methods/*.py`)."""
        grouped = sorted(scheme.name for scheme in schemes if isinstance(scheme.weights, MicroscalingRounding))
        if grouped and any(scheme.name == "W4A8_DYNAMIC" for scheme in schemes):
            return (
                f"vLLM-Ascend loads W4A8_DYNAMIC only without groups and {grouped[0]} only with: choose one of the two"
            )
        return None

    def config(self, source: Mapping[str, Any], linears: Sequence[Assigned]) -> dict[str, Any]:
        """config.json as it is: the description file tells of the quantisation."""
        return dict(source)

    def describe(self, tensors: Mapping[str, str], linears: Sequence[Assigned]) -> Mapping[str, Mapping[str, Any]]:
        """`quant_model_description.json`, in which every tensor is named.

        `lm_head.weight` is named also where it is tied and has no tensor: the engine looks it up by direct indexing.
        """
        labels = dict(sorted(tensors.items()))
        labels.setdefault("lm_head.weight", FLOAT)
        kinds = Counter(linear.scheme.name for linear in linears if linear.scheme is not None)
        microscaled = any(
            isinstance(linear.scheme.weights, MicroscalingRounding) for linear in linears if linear.scheme is not None
        )
        head: dict[str, Any] = {
            "version": "1.0.0",
            "model_quant_type": kinds.most_common(1)[0][0] if kinds else FLOAT,
            "group_size": MX_BLOCK if microscaled else 0,
            "metadata": {},
            "optional": {},
        }
        return {DESCRIPTION_FILE: head | labels}
