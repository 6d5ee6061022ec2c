"""Builders of quantised layers and of quantised model directories for tests.

Layers come from plain rounding written here; directories are laid out by the formats of the package, with an
index, a description and a config.json beside their shards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from checkpoints import DTYPES, random_tensors, save_safetensors, save_tokenizer, tiny_config

from gs_dist.checkpoint.dialects import Codec
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.families import read_architecture
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.results.quantized import LinearSummary, QuantizedKVCache, QuantizedLayer, QuantizedLinear

Array = npt.NDArray[Any]

W8A8 = QuantPolicy(act_quant_dtype="int8")
W8A8_ASYMMETRIC = QuantPolicy(act_quant_dtype="int8", act_symmetric=False)
W8A8_PLUS = QuantPolicy(act_quant_dtype="int8", outliers_suppression="outlier-suppression+")
W8A8_DYNAMIC = QuantPolicy(act_quant_dtype="int8", act_quant_granularity="per_token")
W8A8_MIX = QuantPolicy(act_quant_dtype="int8", act_quant_granularity="pd_mix")
W8A16 = QuantPolicy()
W4A16 = QuantPolicy(weight_quant_dtype="qint4x2")
W4A16_GROUPS = QuantPolicy(weight_quant_dtype="qint4x2", weight_quant_granularity="per_group", group_size=64)
W4A8 = QuantPolicy(
    weight_quant_dtype="qint4x2",
    act_quant_dtype="int8",
    act_quant_granularity="per_token",
    precision_recovery="gptq",
    algo_args=AlgoArgs(desc_act=True, static_groups=True),
)


def round_linear(
    weight: Array, policy: QuantPolicy, dtype: str, bias: Array | None, input_scale: float, zero_point: int
) -> QuantizedLinear:
    """Plain symmetric rounding with scales in the checkpoint's dtype."""
    rows, columns = weight.shape
    groups = columns // policy.group_size if policy.group_size else 1
    top = 2 ** (policy.weight_format.bits - 1)
    grouped = weight.astype(np.float32).reshape(rows, groups, -1)
    scale = (np.abs(grouped).max(axis=2) / (top - 0.5)).astype(DTYPES[dtype]).astype(np.float32)
    codes = np.clip(np.rint(grouped / scale[:, :, None]), -top, top - 1).astype(np.int8).reshape(rows, columns)
    static = policy.is_static
    return QuantizedLinear(
        policy=policy,
        codes=codes,
        scale=scale,
        bias=None if bias is None else bias.astype(np.float32),
        input_scale=float(np.float32(input_scale).astype(DTYPES[dtype])) if static else None,
        input_zero_point=zero_point if static else None,
    )


def round_layer(
    architecture: DecoderArchitecture,
    tensors: dict[str, Array],
    layer: int,
    policies: dict[str, QuantPolicy | None],
    zero_point: int = 0,
    kv_cache: bool = False,
) -> QuantizedLayer:
    """One decoder layer of `tensors` (full names) by plain rounding; static inputs get one scale a layer input."""
    prefix = architecture.layer_prefix(layer)
    rest = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    linears = {}
    for number, layer_input in enumerate(architecture.inputs(0)):
        for name in layer_input.linears:
            policy = policies.get(prefix + name)
            if policy is None or not policy.quantizes_linear:
                continue
            weight, bias = rest.pop(name + ".weight"), rest.pop(name + ".bias", None)
            scale = 0.013 * (1 + number + layer)
            linears[name] = round_linear(weight, policy, architecture.dtype, bias, scale, zero_point)
    rng = np.random.default_rng(layer)
    scales = rng.uniform(0.01, 0.1, (2, architecture.kv_size)).astype(DTYPES[architecture.dtype]).astype(np.float32)
    cache = QuantizedKVCache(key_scale=scales[0], value_scale=scales[1]) if kv_cache else None
    rows = tuple(
        summary_row(layer, prefix + linear.name, linears.get(linear.name)) for linear in architecture.linears(layer)
    )
    return QuantizedLayer(layer=layer, linears=linears, tensors=rest, kv_cache=cache, rows=rows)


def summary_row(layer: int, name: str, linear: QuantizedLinear | None) -> LinearSummary:
    """The row that a solver gives, as far as a directory is compared with it."""
    return LinearSummary(
        layer=layer,
        name=name,
        strategy="NA" if linear is None else "W8-perchannel",
        relative_error=None,
        error_source="none",
        scale_min=None if linear is None else float(linear.scale.min()),
        scale_max=None if linear is None else float(linear.scale.max()),
        num_tokens=0,
    )


def uniform_policies(architecture: DecoderArchitecture, policy: QuantPolicy | None) -> dict[str, QuantPolicy | None]:
    """The same policy for every linear, and none for the head."""
    return {name: None if name == "lm_head" else policy for name in architecture.linear_names()}


def save_model(
    directory: Path,
    dialect: Codec,
    policy: QuantPolicy | dict[str, QuantPolicy | None] | None,
    dtype: str = "bfloat16",
    model_type: str = "llama",
    zero_point: int = 0,
    kv_cache: str | None = None,
    **config: Any,
) -> dict[int, QuantizedLayer]:
    """A whole model directory in a dialect: a shard a layer, outer.safetensors, index, config.json, description.

    Returns the layers that went in.
    """
    content = tiny_config(model_type, torch_dtype=dtype, **config)
    architecture = read_architecture(content)
    policies = policy if isinstance(policy, dict) else uniform_policies(architecture, policy)
    if kv_cache is not None:
        for name in [n for n in policies if n.endswith(("k_proj", "v_proj"))]:
            fields = {"weight_quant_dtype": None} if policies[name] is None else policies[name].model_dump()
            policies[name] = QuantPolicy(**{**fields, "kvcache_quant_dtype": "int8"})
    tensors = random_tensors(content, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    layers = {}
    files = {"model-outer.safetensors": {n: a for n, a in tensors.items() if not n.startswith("model.layers.")}}
    for layer in range(architecture.num_layers):
        layers[layer] = round_layer(architecture, tensors, layer, policies, zero_point, kv_cache is not None)
        files[f"model-{layer:05d}.safetensors"] = dialect.encode_layer(layers[layer], architecture)
    for file, held in files.items():
        # The safetensors library orders by item size, so that every tensor lies aligned.
        save_safetensors(directory / file, dict(sorted(held.items(), key=lambda i: (-i[1].dtype.itemsize, i[0]))))
    kinds = dict.fromkeys(range(architecture.num_layers), kv_cache)
    index = {
        "metadata": {"total_size": sum(a.nbytes for held in files.values() for a in held.values())},
        "weight_map": {name: file for file, held in files.items() for name in held},
    }
    save_json(directory / "model.safetensors.index.json", index)
    save_json(directory / "config.json", dialect.config(content, policies, kinds, architecture))
    for file, value in dialect.extra_files(policies, kinds, architecture).items():
        save_json(directory / file, value)
    save_tokenizer(directory)
    return layers


def save_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(value, indent=2))


def load_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content
