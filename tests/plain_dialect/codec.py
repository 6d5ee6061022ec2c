"""Writes and reads the plain dialect: `<linear>.weight` int8 (N, K) and `<linear>.weight_scale` float32 (N,)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.dialects.base import Codec, KVKind, Policies
from gs_dist.checkpoint.header import read_json
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.writer import StoredTensor
from gs_dist.errors import RecipeError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedLayer, QuantizedLinear

DESCRIPTION = "plain_description.json"


class PlainCodec:
    name = "plain"
    makes_biases = False

    def check_policies(self, policies: Policies, architecture: DecoderArchitecture) -> tuple[str, ...]:
        for name, policy in policies.items():
            if policy is not None and policy.act_quant_dtype is not None:
                raise RecipeError(f"{name}: plain holds weights alone; set act_quant_dtype: null")
        return ()

    def encode_layer(self, layer: QuantizedLayer, architecture: DecoderArchitecture) -> dict[str, npt.NDArray[Any]]:
        prefix = architecture.layer_prefix(layer.layer)
        tensors = {prefix + name: np.asarray(array) for name, array in layer.tensors.items()}
        for name, linear in layer.linears.items():
            tensors[f"{prefix}{name}.weight"] = linear.codes
            tensors[f"{prefix}{name}.weight_scale"] = linear.scale[:, 0]
        return tensors

    def expected_tensors(
        self, layer: int, policies: Policies, kv_cache: KVKind, architecture: DecoderArchitecture
    ) -> dict[str, StoredTensor]:
        prefix, shapes = architecture.layer_prefix(layer), dict(architecture.layer_tensors(layer))
        found = {}
        for linear in architecture.linears(layer):
            if policies.get(prefix + linear.name) is not None:
                shape = shapes.pop(linear.name + ".weight")
                found[f"{prefix}{linear.name}.weight"] = StoredTensor(dtype="int8", shape=shape)
                found[f"{prefix}{linear.name}.weight_scale"] = StoredTensor(dtype="float32", shape=shape[:1])
        return found | {prefix + name: StoredTensor(dtype="", shape=shape) for name, shape in shapes.items()}

    def config(
        self,
        source: Mapping[str, Any],
        policies: Policies,
        kv_cache: Mapping[int, KVKind],
        architecture: DecoderArchitecture,
    ) -> dict[str, Any]:
        return dict(source)

    def extra_files(
        self, policies: Policies, kv_cache: Mapping[int, KVKind], architecture: DecoderArchitecture
    ) -> dict[str, dict[str, Any]]:
        return {DESCRIPTION: {"linears": sorted(name for name, policy in policies.items() if policy is not None)}}

    def decode_layer(self, reader: CheckpointReader, layer: int) -> QuantizedLayer:
        prefix = reader.architecture.layer_prefix(layer)
        rest, linears = dict(reader.read_layer(layer)), {}
        for name in read_json(reader.directory / DESCRIPTION, DESCRIPTION)["linears"]:
            if name.startswith(prefix):
                short = name.removeprefix(prefix)
                codes, step = rest.pop(short + ".weight"), rest.pop(short + ".weight_scale")
                linears[short] = QuantizedLinear(policy=QuantPolicy(), codes=codes, scale=step[:, None])
        return QuantizedLayer(layer=layer, linears=linears, tensors=rest)


CODEC: Codec = PlainCodec()
