"""Which weights of a checkpoint are quantised already, and what decodes them.

What config.json calls the quantisation decides what is looked for; a tensor that then is not there is an error, since
codes without their scale decode to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gs_dist.checkpoint.header import TensorInfo
from gs_dist.checkpoint.sources.fp8_block import Fp8BlockMatrix
from gs_dist.checkpoint.sources.matrix import StoredMatrix
from gs_dist.checkpoint.sources.mxfp4 import GROUP, Mxfp4Matrix
from gs_dist.checkpoint.sources.packed_int import PackedIntMatrix
from gs_dist.errors import CheckpointError

__all__ = ["EncodedSource", "find_encoding", "is_decoded", "stated_encoding"]

_FP8 = "float8_e4m3fn"


class EncodedSource:
    """Encoded weights of a checkpoint; this one has none.

    Attributes:
        name: of the encoding, for people; "" for floats.
        float_dtype: what weights are decoded to; "" for floats.
        auxiliary: names of tensors that only decode others.
    """

    name = ""

    def __init__(self, float_dtype: str = "") -> None:
        self.float_dtype = float_dtype
        self.auxiliary: set[str] = set()

    def encodes(self, name: str) -> bool:
        """Whether a tensor holds codes."""
        return False

    def module_of(self, name: str) -> str:
        """Full name of the linear, or of the fused tensor of experts, that a tensor's name tells."""
        return name.removesuffix(".weight")

    def matrix(self, name: str) -> StoredMatrix:
        """The weight whose codes a tensor holds."""
        raise NotImplementedError

    def expert_matrices(self, name: str, *, interleaved: bool) -> Sequence[StoredMatrix]:
        """The weights of a fused tensor of experts."""
        raise NotImplementedError


def stated_encoding(config: Mapping[str, Any]) -> Any:
    """What a config.json says of quantised weights, at its top or of its language model; None where nothing."""
    stated = config.get("quantization_config")
    for key in ("text_config", "llm_config", "language_config"):
        part = config.get(key)
        if stated is None and isinstance(part, Mapping):
            stated = part.get("quantization_config")
    return stated


def is_decoded(stated: Any) -> bool:
    """Whether that names an encoding which is decoded: FP8 with a scale a block, MXFP4, packed integers."""
    if not isinstance(stated, Mapping):
        return False
    method = stated.get("quant_method")
    if method == "compressed-tensors":
        return stated.get("format") == "pack-quantized"
    return method == "mxfp4" or (method == "fp8" and stated.get("weight_block_size") is not None)


def find_encoding(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], dtype: str) -> EncodedSource:
    """What the checkpoint's weights are encoded with.

    Args:
        config: content of config.json.
        tensors: all tensors by name.
        dtype: of floats, in which encoded weights are published where they stay.

    Raises:
        CheckpointError: an encoding that is not served, or codes whose scales are missing or of another shape.
    """
    stated = stated_encoding(config)
    if stated is None:
        return _without_config(tensors, dtype)
    if not isinstance(stated, Mapping):
        raise CheckpointError(f"config.json: quantization_config is {stated!r:.100}, which is no table")
    method = str(stated.get("quant_method", ""))
    if method == "fp8":
        return _Fp8Source(stated, tensors, dtype)
    if method == "mxfp4":
        return _Mxfp4Source(tensors, dtype)
    if method == "compressed-tensors":
        return _PackedSource(stated, tensors)
    raise CheckpointError(
        f"config.json: quantization_config is of {method or 'no method'!r:.60}; decoded are fp8 with blocks, mxfp4 and "
        "compressed-tensors' packed integers: set model to the float checkpoint, or to one in these"
    )


def _without_config(tensors: Mapping[str, TensorInfo], dtype: str) -> EncodedSource:
    coded = [info for info in tensors.values() if info.dtype == _FP8]
    if coded:
        raise CheckpointError(
            f"{coded[0].file}: tensor {coded[0].name!r:.200} is {_FP8}, and config.json has no "
            "quantization_config that tells its scales: restore the config.json that the weights came with"
        )
    return EncodedSource()


class _Fp8Source(EncodedSource):
    name = "FP8 blocks"

    def __init__(self, stated: Mapping[str, Any], tensors: Mapping[str, TensorInfo], dtype: str) -> None:
        super().__init__(dtype)
        block = stated.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise CheckpointError(
                f"config.json: quantization_config.weight_block_size is {block!r:.60}; decoded is FP8 with a scale a "
                "block, such as [128, 128]"
            )
        self._matrices: dict[str, Fp8BlockMatrix] = {}
        for info in tensors.values():
            if info.dtype == _FP8 and len(info.shape) in (2, 3):
                scale = tensors.get(f"{info.name}_scale_inv")
                matrix = _fp8(info, scale, (block[0], block[1]), dtype)
                self._matrices[info.name] = matrix
                self.auxiliary.add(matrix.scale.name)

    def encodes(self, name: str) -> bool:
        return name in self._matrices

    def matrix(self, name: str) -> StoredMatrix:
        return self._matrices[name]

    def expert_matrices(self, name: str, *, interleaved: bool) -> Sequence[StoredMatrix]:
        found = self._matrices[name]
        return [
            Fp8BlockMatrix(
                info=found.info, scale=found.scale, block=found.block, float_dtype=found.float_dtype, index=index
            )
            for index in range(found.info.shape[0])
        ]


def _fp8(info: TensorInfo, scale: TensorInfo | None, block: tuple[int, int], dtype: str) -> Fp8BlockMatrix:
    wanted = (*info.shape[:-2], -(-info.shape[-2] // block[0]), -(-info.shape[-1] // block[1]))
    if scale is None:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r:.200} is FP8 and its scales {info.name.rpartition('.')[2]}_scale_inv "
            f"{wanted} are nowhere in the checkpoint: complete the download; without them the weight is lost"
        )
    if scale.shape != wanted or scale.dtype not in ("float32", "bfloat16", "float16", "float8_e8m0fnu"):
        raise CheckpointError(
            f"{scale.file}: tensor {scale.name!r:.200} is {scale.dtype} {scale.shape}, and blocks of {block[0]} x "
            f"{block[1]} of a weight {info.shape} call for {wanted}; the two do not belong together"
        )
    return Fp8BlockMatrix(info=info, scale=scale, block=block, float_dtype=dtype)


class _Mxfp4Source(EncodedSource):
    name = "MXFP4"

    def __init__(self, tensors: Mapping[str, TensorInfo], dtype: str) -> None:
        super().__init__(dtype)
        self._pairs: dict[str, tuple[TensorInfo, TensorInfo]] = {}
        for info in tensors.values():
            if info.name.endswith("_blocks") and info.dtype == "uint8":
                scale = tensors.get(info.name.removesuffix("_blocks") + "_scales")
                self._pairs[info.name] = (info, _mxfp4_scale(info, scale))
                self.auxiliary.add(self._pairs[info.name][1].name)

    def encodes(self, name: str) -> bool:
        return name in self._pairs

    def module_of(self, name: str) -> str:
        return name.removesuffix("_blocks").removesuffix(".weight")

    def matrix(self, name: str) -> StoredMatrix:
        info = self._pairs[name][0]
        raise CheckpointError(
            f"{info.file}: tensor {name!r:.200} is MXFP4 of no experts' projections; decoded are gate_up_proj and "
            "down_proj of experts"
        )

    def expert_matrices(self, name: str, *, interleaved: bool) -> Sequence[StoredMatrix]:
        info, scale = self._pairs[name]
        return [
            Mxfp4Matrix(info=info, scale=scale, index=index, float_dtype=self.float_dtype, interleaved=interleaved)
            for index in range(info.shape[0])
        ]


def _mxfp4_scale(info: TensorInfo, scale: TensorInfo | None) -> TensorInfo:
    if len(info.shape) != 4 or info.shape[3] * 2 != GROUP:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r:.200} {info.shape} is no MXFP4 of experts, which is (experts, out, "
            f"in / {GROUP}, {GROUP // 2}); download the file again"
        )
    if scale is None or scale.shape != info.shape[:3] or scale.dtype != "uint8":
        found = "nowhere in the checkpoint" if scale is None else f"{scale.dtype} {scale.shape}"
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r:.200} is MXFP4, and its scales uint8 {info.shape[:3]} are {found}: "
            "complete the download; without them the weight is lost"
        )
    return scale


class _PackedSource(EncodedSource):
    name = "packed integers"

    def __init__(self, stated: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        super().__init__()
        if stated.get("format") != "pack-quantized":
            raise CheckpointError(
                f"config.json: quantization_config.format is {stated.get('format')!r:.60}; decoded is pack-quantized: "
                "set model to the float checkpoint"
            )
        groups = stated.get("config_groups")
        weights = [
            group["weights"]
            for group in (groups.values() if isinstance(groups, Mapping) else ())
            if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
        ]
        bits = {args.get("num_bits") for args in weights}
        if len(bits) != 1 or not bits <= {4, 8} or any(args.get("actorder") == "group" for args in weights):
            raise CheckpointError(
                "config.json: quantization_config.config_groups must name one width of 4 or 8 bits, without actorder "
                "group, to be decoded; set model to the float checkpoint"
            )
        (self._bits,) = bits
        self._matrices: dict[str, PackedIntMatrix] = {}
        for info in tensors.values():
            if info.name.endswith(".weight_packed"):
                self._matrices[info.name] = self._packed(info, tensors)
                self.float_dtype = self._matrices[info.name].float_dtype
                self.auxiliary.update(part.name for part in self._matrices[info.name].tensors[1:])

    def _packed(self, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> PackedIntMatrix:
        module = info.name.removesuffix(".weight_packed")
        scale, zero = tensors.get(f"{module}.weight_scale"), tensors.get(f"{module}.weight_zero_point")
        if scale is None or info.dtype != "int32" or len(info.shape) != 2 or scale.shape[:1] != info.shape[:1]:
            found = "nowhere in the checkpoint" if scale is None else f"{scale.dtype} {scale.shape}"
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r:.200} {info.dtype} {info.shape} holds packed codes, and their "
                f"weight_scale is {found}: complete the download; without it the weight is lost"
            )
        columns = info.shape[1] * 32 // self._bits
        if columns % scale.shape[1]:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r:.200} has {columns} columns, which {scale.shape[1]} groups of "
                "weight_scale do not divide; set model to the float checkpoint"
            )
        stored_shape = tensors.get(f"{module}.weight_shape")
        return PackedIntMatrix(
            info=info, scale=scale, zero_point=zero, stored_shape=stored_shape, bits=self._bits, columns=columns
        )

    def encodes(self, name: str) -> bool:
        return name in self._matrices

    def module_of(self, name: str) -> str:
        return name.removesuffix(".weight_packed").removesuffix(".weight")

    def matrix(self, name: str) -> StoredMatrix:
        return self._matrices[name]
