"""The dialect of `vllm serve --quantization golden-stick`: Golden Stick's `save_quantized(backend=ASCEND)`.

Shapes and labels are those of the golden-stick 1.4.1 wheel, run on plain `nn.Dense` linears; the reader is
vLLM-MindSpore a7b56a4, `model_executor/layers/quantization/golden_stick/golden_stick.py` (description file, labels,
fused linears) and `a8w8.py` (tensors). That reader knows FLOAT and W8A8; the other labels are Golden Stick's own
and are read by networks that Golden Stick builds.

Weight files keep this project's names under `model.safetensors.index.json`: vLLM-MindSpore loads through vLLM's
`default_loader.py`, which takes the files this index lists, whatever they are called.

Tensors of a linear `<p>` with weight (N, K), pd being the model's dtype, G = K / group_size:

* `W8A16`, `W8A8_DYNAMIC`: weight int8 (N, K); weight_scale pd (N,); weight_offset int32 (N,), zero; bias pd.
* `W8A8`: these and deq_scale float32 (N,); quant_bias int32 (N,) *without* the linear's bias, which the reader adds
  after the matmul; input_scale pd (K,); input_offset int8 (K,).
* `W4A16`: weight int8 (K, N/2): transposed, neighbouring output channels share a byte, the even one in the low
  half, two's complement; weight_scale pd, weight_offset int32 of shape (N,) or (G, N).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gs_dist.checkpoint.dialects.base import Codec, KVKind, Policies
from gs_dist.checkpoint.dialects.description import (
    FLOAT,
    MIX_REASON,
    Array,
    cast_scale,
    describe_tensors,
    expected_names,
    kv_layers,
    label_of,
    mixed_fusions,
    policy_of,
    refuse,
    require_shared_input,
    row_sums,
    shift_notes,
    split_linears,
    static_parameters,
)
from gs_dist.checkpoint.header import read_json
from gs_dist.checkpoint.published_config import without_quantization
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.errors import CheckpointError, RecipeError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.dtypes import FLOATS
from gs_dist.numbers.integer import INT4, INT8
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.integers import pack_int4, unpack_int4
from gs_dist.results.quantized import QuantizedLayer, QuantizedLinear

__all__ = ["CODEC", "DESCRIPTION_FILE", "LABELS", "GoldenStickCodec"]

DESCRIPTION_FILE = DIALECTS["golden-stick"].describing_file
LABELS = (FLOAT, "W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16")


class GoldenStickCodec:
    """Writes and reads Golden Stick's layout; see the module's page for the tensors."""

    name = "golden-stick"
    number_formats = (INT8, INT4)
    makes_biases = False

    def check_policies(self, policies: Policies, architecture: DecoderArchitecture) -> tuple[str, ...]:
        """Refuses what the layout has no place for, naming what to choose in its place; returns notes.

        Raises:
            RecipeError: weights with zero points, dense W4A8, groups in GPTQ's activation order, odd numbers of
                output channels at 4 bits, a quantised KV cache, or linears that the engine fuses with
                different policies.
        """
        if any(kind.mlp.experts for kind in architecture.kinds):
            raise RecipeError(
                "format golden-stick has no reader that knows experts: write format: [compressed-tensors] or [ascend]"
            )
        reasons: dict[str, list[str]] = {}
        shapes = {
            architecture.layer_prefix(layer) + linear.name: linear
            for layer in range(architecture.num_layers)
            for linear in architecture.linears(layer)
        }
        for name, policy in policies.items():
            out_features = shapes[name].out_features if name in shapes else architecture.vocab_size
            for reason in _unwritable(policy, out_features):
                reasons.setdefault(reason, []).append(name)
        for layer in kv_layers(policies, architecture):
            reason = (
                "Golden Stick's files have no KV cache scales that a reader loads: set kvcache_quant_dtype: null, or "
                "format: [ascend]"
            )
            reasons.setdefault(reason, []).append(architecture.layer_prefix(layer) + "self_attn")
        refuse(self.name, {**reasons, **mixed_fusions(policies, architecture)})
        notes = shift_notes(self.name, policies)
        others = sorted({label_of(policy) for policy in policies.values()} - {FLOAT, "W8A8"})
        if others:
            return (
                *notes,
                f"golden-stick: vLLM-MindSpore's own reader knows W8A8 and float linears; {', '.join(others)} is for "
                "networks that Golden Stick builds",
            )
        return notes

    def encode_layer(self, layer: QuantizedLayer, architecture: DecoderArchitecture) -> dict[str, Array]:
        """Tensors of a decoder layer under their full names.

        Raises:
            LayerError: fused linears with different input scales, or a value that its dtype cannot hold.
        """
        require_shared_input(layer)
        prefix = architecture.layer_prefix(layer.layer)
        dtype = FLOATS[architecture.dtype]
        tensors: dict[str, Array] = {prefix + name: np.asarray(array) for name, array in layer.tensors.items()}
        for name, linear in layer.linears.items():
            encoded = _encode_linear(linear, dtype, prefix + name)
            tensors.update({f"{prefix}{name}.{leaf}": array for leaf, array in encoded.items()})
        return tensors

    def expected_tensors(
        self, layer: int, policies: Policies, kv_cache: KVKind, architecture: DecoderArchitecture
    ) -> dict[str, StoredTensor]:
        """See `Codec.expected_tensors`."""
        prefix, model_dtype = architecture.layer_prefix(layer), architecture.dtype
        shapes = architecture.layer_tensors(layer)
        found: dict[str, StoredTensor] = {}
        for linear in architecture.linears(layer):
            policy = policies.get(prefix + linear.name)
            if policy is None or not policy.quantizes_linear:
                continue
            rows, columns = shapes.pop(linear.name + ".weight")
            groups = columns // policy.group_size if policy.group_size else 1
            scales = (groups, rows) if groups > 1 else (rows,)
            leaves: dict[str, tuple[str, tuple[int, ...]]] = {
                "weight": ("int8", (columns, rows // 2) if policy.weight_format is INT4 else (rows, columns)),
                "weight_scale": (model_dtype, scales),
                "weight_offset": ("int32", scales),
            }
            if shapes.pop(linear.name + ".bias", None) is not None:
                leaves["bias"] = (model_dtype, (rows,))
            if policy.is_static:
                leaves |= {
                    "deq_scale": ("float32", (rows,)),
                    "quant_bias": ("int32", (rows,)),
                    "input_scale": (model_dtype, (columns,)),
                    "input_offset": ("int8", (columns,)),
                }
            found |= {
                f"{prefix}{linear.name}.{leaf}": StoredTensor(dtype=dtype, shape=shape)
                for leaf, (dtype, shape) in leaves.items()
            }
        return found | {prefix + name: StoredTensor(dtype="", shape=shape) for name, shape in shapes.items()}

    def config(
        self,
        source: Mapping[str, Any],
        policies: Policies,
        kv_cache: Mapping[int, KVKind],
        architecture: DecoderArchitecture,
    ) -> dict[str, Any]:
        """config.json without `quantization_config`, which vLLM would read in place of the description file."""
        return without_quantization(source)

    def extra_files(
        self, policies: Policies, kv_cache: Mapping[int, KVKind], architecture: DecoderArchitecture
    ) -> dict[str, dict[str, Any]]:
        """`quantization_description.json`: file name to content, one key a tensor and no other.

        All keys of a module carry its linear's label, biases too: the reader refuses a module with two.
        """
        names = expected_names(self, policies, kv_cache, architecture)
        return {DESCRIPTION_FILE: dict(describe_tensors(policies, names))}

    def decode_layer(self, reader: CheckpointReader, layer: int) -> QuantizedLayer:
        """Inverse of `encode_layer`; policies are rebuilt from the description file's labels.

        Raises:
            CheckpointError: a tensor or the description is missing, or a label is not one of this dialect.
        """
        description = read_json(reader.directory / DESCRIPTION_FILE, DESCRIPTION_FILE)
        linears, rest = split_linears(reader.read_layer(layer), description, reader.architecture, layer)
        prefix = reader.architecture.layer_prefix(layer)
        return QuantizedLayer(
            layer=layer,
            linears={name: _decode_linear(leaves, label, prefix + name) for name, (label, leaves) in linears.items()},
            tensors=rest,
        )


CODEC: Codec = GoldenStickCodec()


def _unwritable(policy: QuantPolicy | None, out_features: int) -> list[str]:
    if policy is None or not policy.quantizes_linear:
        return []
    reasons = []
    if policy.weight_format is INT4 and policy.act_quant_dtype is not None:
        reasons.append(
            "Golden Stick writes W4A8 for mixture-of-experts networks only: set act_quant_dtype: null (W4A16), or "
            "format: [compressed-tensors]"
        )
    if policy.mixes_phases:
        reasons.append(MIX_REASON)
    if not policy.weight_symmetric:
        reasons.append("Golden Stick's readers take weights without zero points: set weight_symmetric: true")
    if policy.weight_format is INT4 and out_features % 2:
        reasons.append(
            f"two output channels share a byte and this linear has {out_features}: set weight_quant_dtype: int8 for it"
        )
    if policy.weight_format is INT8 and policy.weight_quant_granularity != "per_channel":
        reasons.append("Golden Stick's W8A16 files are per channel: set weight_quant_granularity: per_channel")
    if policy.column_order == "group":
        reasons.append(
            "Golden Stick's files cannot say which group a column belongs to: set algo_args static_groups: true, or "
            "desc_act: false"
        )
    return reasons


def _encode_linear(linear: QuantizedLinear, dtype: np.dtype[Any], where: str) -> dict[str, Array]:
    scale = cast_scale(linear.scale, dtype, where + " weight_scale")
    scale = np.ascontiguousarray(scale.T) if scale.shape[1] > 1 else scale.reshape(-1)
    packs = linear.policy.weight_format is INT4
    tensors: dict[str, Array] = {
        "weight": pack_int4(linear.codes) if packs else np.ascontiguousarray(linear.codes),
        "weight_scale": scale,
        "weight_offset": np.zeros(scale.shape, dtype=np.int32),
    }
    if linear.bias is not None:
        tensors["bias"] = linear.bias.astype(dtype)
    if not linear.policy.is_static:
        return tensors
    input_scale, zero_point, deq_scale = static_parameters(linear, dtype, where)
    columns = linear.codes.shape[1]
    return tensors | {
        "deq_scale": deq_scale,
        "quant_bias": (-zero_point * row_sums(linear.codes)).astype(np.int32),
        "input_scale": np.full(columns, input_scale[0], dtype=dtype),
        "input_offset": np.full(columns, zero_point, dtype=np.int8),
    }


def _decode_linear(leaves: Mapping[str, Array], label: str, where: str) -> QuantizedLinear:
    if label not in LABELS:
        raise CheckpointError(f"{DESCRIPTION_FILE}: {where} is {label!r}; this dialect knows {', '.join(LABELS)}")
    try:
        weight, scale = leaves["weight"], leaves["weight_scale"].astype(np.float32)
        codes = unpack_int4(weight) if label == "W4A16" else weight
        scale = np.ascontiguousarray(scale.T) if scale.ndim == 2 else scale.reshape(-1, 1)
        group_size = codes.shape[1] // scale.shape[1] if scale.shape[1] > 1 else 0
        static = label == "W8A8"
        zero_point = int(leaves["input_offset"][0]) if static else None
        return QuantizedLinear(
            policy=policy_of(label, group_size, act_symmetric=not zero_point),
            codes=codes,
            scale=scale,
            bias=leaves["bias"].astype(np.float32) if "bias" in leaves else None,
            input_scale=float(leaves["input_scale"].astype(np.float32)[0]) if static else None,
            input_zero_point=zero_point,
        )
    except KeyError as missing:
        raise CheckpointError(f"{where} is {label} and has no tensor {where}.{missing.args[0]}") from missing
