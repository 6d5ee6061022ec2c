"""compressed-tensors: the dialect that transformers and vLLM load.

Names of formats and arguments are those of compressed-tensors 0.20 (`config/base.py`, `quantization/quant_scheme.py`);
tensors those of its compressors. Experts are written one by one, as llm-compressor 0.14 does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gs_dist.checkpoint.dialects.compressed_tensors.packing import pack_int32, packed_size
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
from gs_dist.conversion.schemes import Scheme
from gs_dist.solvers.float_rounding import Fp8BlockRounding, Fp8ChannelRounding, MicroscalingRounding
from gs_dist.solvers.integer_rounding import IntegerRounding
from gs_dist.solvers.weight_rounding import RoundedRows

__all__ = ["CompressedTensorsWriter"]


@dataclass(frozen=True, kw_only=True)
class _OneByteCodes(Encoding):
    """`int-quantized`: a code a byte, int4 too, and a scale a channel."""

    def tensors(self, linear: LinearShape) -> dict[str, StoredTensor]:
        return {
            "weight": StoredTensor(dtype="int8", shape=(linear.rows, linear.columns)),
            "weight_scale": StoredTensor(dtype=linear.dtype, shape=(linear.rows, 1)),
        }

    def encode(self, linear: LinearShape, rounded: RoundedRows) -> dict[str, Array]:
        return {
            "weight": rounded.codes,
            "weight_scale": stored_scale(rounded.scale, linear.dtype, linear.name),
        }


@dataclass(frozen=True, kw_only=True)
class _PackedWords(Encoding):
    """`pack-quantized`: codes of `bits` in int32 words along the inputs, scales a channel or group."""

    bits: int
    group_size: int

    def tensors(self, linear: LinearShape) -> dict[str, StoredTensor]:
        groups = linear.columns // self.group_size if self.group_size else 1
        return {
            "weight_packed": StoredTensor(dtype="int32", shape=(linear.rows, packed_size(linear.columns, self.bits))),
            "weight_scale": StoredTensor(dtype=linear.dtype, shape=(linear.rows, groups)),
            "weight_shape": StoredTensor(dtype="int64", shape=(2,)),
        }

    def encode(self, linear: LinearShape, rounded: RoundedRows) -> dict[str, Array]:
        return {
            "weight_packed": pack_int32(rounded.codes, self.bits),
            "weight_scale": stored_scale(rounded.scale, linear.dtype, linear.name),
        }

    def constants(self, linear: LinearShape) -> dict[str, Array]:
        return {"weight_shape": np.array([linear.rows, linear.columns], dtype=np.int64)}


@dataclass(frozen=True, kw_only=True)
class _Fp8Codes(Encoding):
    """`float-quantized`: E4M3 codes with scales a channel, or a block of `block` x `block`."""

    block: int

    def tensors(self, linear: LinearShape) -> dict[str, StoredTensor]:
        scales = (linear.rows, 1)
        if self.block:
            scales = (-(-linear.rows // self.block), -(-linear.columns // self.block))
        return {
            "weight": StoredTensor(dtype="float8_e4m3fn", shape=(linear.rows, linear.columns)),
            "weight_scale": StoredTensor(dtype=linear.dtype, shape=scales),
        }

    def encode(self, linear: LinearShape, rounded: RoundedRows) -> dict[str, Array]:
        scale = stored_scale(rounded.scale, linear.dtype, linear.name)
        return {"weight": fp8_codes(rounded.codes), "weight_scale": scale}


@dataclass(frozen=True, kw_only=True)
class _Microscaled(Encoding):
    """`mxfp8-quantized`, or (`paired`) `mxfp4-pack-quantized`: exponents plus 127 a block of 32 inputs."""

    paired: bool

    def tensors(self, linear: LinearShape) -> dict[str, StoredTensor]:
        scale = StoredTensor(dtype="uint8", shape=(linear.rows, linear.columns // 32))
        if self.paired:
            packed = StoredTensor(dtype="uint8", shape=(linear.rows, linear.columns // 2))
            return {"weight_packed": packed, "weight_scale": scale}
        weight = StoredTensor(dtype="float8_e4m3fn", shape=(linear.rows, linear.columns))
        return {"weight": weight, "weight_scale": scale}

    def encode(self, linear: LinearShape, rounded: RoundedRows) -> dict[str, Array]:
        if self.paired:
            return {"weight_packed": paired_inputs(rounded.codes), "weight_scale": rounded.scale}
        return {"weight": fp8_codes(rounded.codes), "weight_scale": rounded.scale}


class CompressedTensorsWriter:
    """Writes compressed-tensors checkpoints."""

    name = "compressed-tensors"

    def encoding(self, scheme: Scheme, *, expert: bool) -> Encoding | str:
        """See `DialectWriter.encoding`."""
        weights = scheme.weights
        if isinstance(weights, IntegerRounding):
            if scheme.activations:
                return _OneByteCodes()
            return _PackedWords(bits=weights.bits, group_size=weights.group_size)
        if isinstance(weights, Fp8ChannelRounding):
            return _Fp8Codes(block=0, row_step=1)
        if isinstance(weights, Fp8BlockRounding):
            return _Fp8Codes(block=weights.size, row_step=weights.size)
        if isinstance(weights, MicroscalingRounding) and scheme.name != "W4A8_MXFP":
            return _Microscaled(paired=weights.element.bits == 4)
        return f"compressed-tensors has no {scheme.name}: choose another scheme, or format: [ascend]"

    def conflict(self, schemes: Sequence[Scheme]) -> str | None:
        """None: each scheme has a group of its own."""
        return None

    def config(self, source: Mapping[str, Any], linears: Sequence[Assigned]) -> dict[str, Any]:
        """config.json with `quantization_config`."""
        groups: dict[str, dict[str, Any]] = {}
        members: dict[str, list[str]] = {}
        for linear in linears:
            if linear.scheme is not None:
                entry = _group(linear.scheme)
                key = json.dumps(entry, sort_keys=True)
                groups[key] = entry
                members.setdefault(key, []).append(linear.name)
        everything = [linear.name for linear in linears]
        left = [linear.name for linear in linears if linear.scheme is None]
        formats = {entry["format"] for entry in groups.values()}
        quantization = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {
                    "targets": ["Linear"] if len(groups) == 1 else patterns(members[key], everything),
                    **entry,
                }
                for number, (key, entry) in enumerate(groups.items())
            },
            # A linear that no target matches must be listed: vLLM refuses to guess.
            "ignore": list(dict.fromkeys(["lm_head", *patterns(left, everything)])),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        return {**source, "quantization_config": quantization}

    def describe(self, tensors: Mapping[str, str], linears: Sequence[Assigned]) -> Mapping[str, Mapping[str, Any]]:
        """None: config.json says everything."""
        return {}


_MICROSCALED: Mapping[str, Any] = {
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
_ACTIVATIONS: Mapping[str, dict[str, Any] | None] = {
    "": None,
    "int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
    "fp8-group": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "dynamic": True,
        "group_size": 128,
    },
    "mxfp8": {**_MICROSCALED, "num_bits": 8, "dynamic": True},
    "mxfp4": {**_MICROSCALED, "num_bits": 4, "dynamic": True},
}


def _group(scheme: Scheme) -> dict[str, Any]:
    args, form = _weights(scheme)
    return {
        "weights": args,
        "input_activations": _ACTIVATIONS[scheme.activations],
        "output_activations": None,
        "format": form,
    }


def _weights(scheme: Scheme) -> tuple[dict[str, Any], str]:
    """Arguments of the weights, and the name of their format."""
    weights = scheme.weights
    if isinstance(weights, MicroscalingRounding):
        bits = weights.element.bits
        return {**_MICROSCALED, "num_bits": bits, "dynamic": False}, _MICROSCALED_FORMATS[bits]
    if isinstance(weights, IntegerRounding):
        args: dict[str, Any] = {
            "num_bits": weights.bits,
            "type": "int",
            "symmetric": weights.symmetric,
            "strategy": "group" if weights.group_size else "channel",
            "dynamic": False,
        }
        if weights.group_size:
            args["group_size"] = weights.group_size
        return args, "int-quantized" if scheme.activations else "pack-quantized"
    args = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    if isinstance(weights, Fp8BlockRounding):
        args |= {"strategy": "block", "block_structure": [weights.size, weights.size]}
    return args, "float-quantized"


_MICROSCALED_FORMATS: Mapping[int, str] = {8: "mxfp8-quantized", 4: "mxfp4-pack-quantized"}
_NUMBER = re.compile(r"\\\.\d+(?=\\\.|$)")
_LAYERS = re.compile(r"(?:^|.*\.)((?:layers|blocks|h)\.\d+\..*)$")


def patterns(names: Sequence[str], everything: Sequence[str]) -> list[str]:
    """A pattern for linears that only their numbers tell apart, where all such are in `names`; else full names.

    Patterns begin at `layers`, since engines rename what stands before.
    """
    wanted: dict[str, list[str]] = {}
    for name in names:
        wanted.setdefault(_pattern(name), []).append(name)
    counts: dict[str, int] = {}
    for name in everything:
        counts[_pattern(name)] = counts.get(_pattern(name), 0) + 1
    found = []
    for pattern, mine in wanted.items():
        found += [pattern] if pattern.startswith("re:") and counts[pattern] == len(mine) else mine
    return found


def _pattern(name: str) -> str:
    match = _LAYERS.match(name)
    if match is None:
        return name
    return r"re:.*\." + _NUMBER.sub(r"\\.\\d+", re.escape(match[1])) + "$"
