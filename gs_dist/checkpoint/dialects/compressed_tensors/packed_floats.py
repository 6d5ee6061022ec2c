"""Floats of 4 bits in compressed-tensors, two codes a byte: the scheme of each in config.json, and its tensors.

Sources: compressed_tensors `quantization/quant_scheme.py` (arguments), `compressors/{mxfp4,nvfp4}/base.py` (tensors).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.dialects.compressed_tensors.packing import pack_pairs, unpack_pairs
from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.numbers.nvfp4 import NVFP4, BlockScaledFloat
from gs_dist.numbers.small_float import MXFP4, SmallFloat
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import Float32, QuantizedLinear

__all__ = ["PACKED_FLOATS", "PackedFloat", "packed_float"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class PackedFloat(ABC):
    """How one format is stored: `weight_packed` (out, in / 2) uint8, and scales of its own kind.

    Attributes:
        form: the number format.
        format: its name in config.json.
        arguments: of the weights there, without keys that have their defaults.
    """

    form: SmallFloat
    format: str
    arguments: Mapping[str, Any]

    @property
    def policy(self) -> QuantPolicy:
        """What is known of a linear that config.json describes so."""
        (size,) = self.form.group_sizes
        return QuantPolicy.model_validate(
            {"weight_quant_dtype": self.form.name, "weight_quant_granularity": "per_group", "group_size": size}
        )

    def scheme(self) -> dict[str, Any]:
        """The group's entry without its targets."""
        sides = {"weights": dict(self.arguments), "input_activations": None, "output_activations": None}
        return {**sides, "format": self.format}

    def tensors(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        """Last name to form of what a linear is stored as, beside its bias."""
        groups = columns // self.form.group_sizes[0]
        packed = StoredTensor(dtype="uint8", shape=(rows, columns // 2))
        return {"weight_packed": packed, **self._scale_tensors(rows, groups)}

    def encode(self, linear: QuantizedLinear, largest_scale: float) -> dict[str, Array]:
        """Its tensors, but for a bias.

        Args:
            linear: solved in this format.
            largest_scale: of all linears that engines fuse with it, its own among them.
        """
        codes, scales = self._encode_scales(linear, largest_scale)
        return {"weight_packed": pack_pairs(self.form.encode(codes.astype(np.float32))), **scales}

    def decode(self, parts: Mapping[str, Array]) -> QuantizedLinear:
        """Inverse of `encode`; a bias goes along."""
        bias = parts.get("bias")
        return QuantizedLinear(
            policy=self.policy,
            codes=self.form.decode(unpack_pairs(parts["weight_packed"])).astype(np.int8),
            scale=self._decode_scales(parts),
            bias=None if bias is None else bias.astype(np.float32),
        )

    @abstractmethod
    def _scale_tensors(self, rows: int, groups: int) -> dict[str, StoredTensor]: ...

    @abstractmethod
    def _encode_scales(self, linear: QuantizedLinear, largest_scale: float) -> tuple[Array, dict[str, Array]]:
        """Codes, and tensors of scales; codes may be others where scales cannot be stored as they are."""

    @abstractmethod
    def _decode_scales(self, parts: Mapping[str, Array]) -> Float32: ...


class _Mxfp4(PackedFloat):
    """`weight_scale` uint8: exponents of two, plus 127."""

    def _scale_tensors(self, rows: int, groups: int) -> dict[str, StoredTensor]:
        return {"weight_scale": StoredTensor(dtype="uint8", shape=(rows, groups))}

    def _encode_scales(self, linear: QuantizedLinear, largest_scale: float) -> tuple[Array, dict[str, Array]]:
        return linear.codes, {"weight_scale": self.form.encode_scale(linear.scale)}

    def _decode_scales(self, parts: Mapping[str, Array]) -> Float32:
        return self.form.decode_scale(parts["weight_scale"])


class _Nvfp4(PackedFloat):
    """`weight_scale` E4M3, and `weight_global_scale` float32 (1,), which values are divided by.

    vLLM fuses linears that read one input and takes one global scale for all of them, so theirs are the same.
    """

    form: BlockScaledFloat

    def _scale_tensors(self, rows: int, groups: int) -> dict[str, StoredTensor]:
        return {
            "weight_scale": StoredTensor(dtype="float8_e4m3fn", shape=(rows, groups)),
            "weight_global_scale": StoredTensor(dtype="float32", shape=(1,)),
        }

    def _encode_scales(self, linear: QuantizedLinear, largest_scale: float) -> tuple[Array, dict[str, Array]]:
        whole = self.form.tensor_scale(largest_scale)
        stored = self.form.block_scales(linear.scale, whole)
        scale = self.form.scales(stored, whole)
        tensors: dict[str, Array] = {"weight_scale": stored, "weight_global_scale": np.array([whole])}
        if np.array_equal(scale, linear.scale):
            return linear.codes, tensors
        values = (linear.dequantized().reshape(*scale.shape, -1) / scale[:, :, None]).reshape(linear.codes.shape)
        self.form.snap(values)
        return values.astype(np.int8), tensors

    def _decode_scales(self, parts: Mapping[str, Array]) -> Float32:
        return self.form.scales(parts["weight_scale"], np.float32(parts["weight_global_scale"][0]))


_FLOAT_ARGUMENTS: Mapping[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True}

PACKED_FLOATS: Mapping[str, PackedFloat] = MappingProxyType(
    {
        packed.form.name: packed
        for packed in (
            _Mxfp4(
                form=MXFP4,
                format="mxfp4-pack-quantized",
                arguments={
                    **_FLOAT_ARGUMENTS,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                    "scale_dtype": "torch.uint8",
                    "zp_dtype": "torch.uint8",
                },
            ),
            _Nvfp4(
                form=NVFP4,
                format="nvfp4-pack-quantized",
                arguments={
                    **_FLOAT_ARGUMENTS,
                    "strategy": "tensor_group",
                    "group_size": 16,
                    "dynamic": False,
                    "scale_dtype": "torch.float8_e4m3fn",
                    "zp_dtype": "torch.float8_e4m3fn",
                },
            ),
        )
    }
)
"""By the number format's name."""


def packed_float(policy: QuantPolicy) -> PackedFloat | None:
    """How a linear of that policy is stored, None where its codes are integers."""
    return PACKED_FLOATS.get(policy.weight_format.name)
