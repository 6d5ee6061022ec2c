"""Loads model directories with vLLM-Ascend's own quantisation package on a CPU, and prints a line of JSON of each.

    PYTHON_WITH_TORCH tests/engines/load_ascend.py PACKAGE OUTPUTS.npz DIRECTORY...

PACKAGE is the folder that a wheel of vllm-ascend was unpacked into. Its `quantization` package runs as it is: it says
what a linear is taken for, allocates parameters, processes them after loading, and computes. What lies around it stands
here: operators of the card, as CANN's pages define them, and names of vLLM and of the rest of the package that are
imported and not needed.

A line holds the directory and its linears as the engine fuses them: kind, scheme class, parameters allocated and found,
tensors left over, and what did not fit. Inputs and outputs of each go to OUTPUTS.npz, as `DIRECTORY NUMBER:linear:x`,
`:y` and, where a node that only decodes computes otherwise, `:decoded`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
CACHE = ("k_proj.kv_cache_scale", "k_proj.kv_cache_offset", "v_proj.kv_cache_scale", "v_proj.kv_cache_offset")


# Operators, by CANN's pages: aclnnQuantize, aclnnDynamicQuant, aclnnQuantMatmulV4, aclnnWeightQuantBatchMatmulV2.


def npu_quantize(x: torch.Tensor, reciprocal: torch.Tensor, offset: torch.Tensor, *_: Any) -> torch.Tensor:
    codes = torch.round(x.float() * reciprocal.float()) + offset.float()
    return torch.clamp(codes, -128, 127).to(torch.int8)


def npu_dynamic_quant(x: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(dim=-1) / 127
    return torch.clamp(torch.round(x.float() / scale[:, None]), -128, 127).to(torch.int8), scale


def npu_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    product = x.to(torch.int64) @ weight.to(torch.int64)
    if bias is not None and not bias.is_floating_point():
        product = product + bias.to(torch.int64)
    if scale.dtype == torch.int64:  # the low half holds a float32
        scale = scale.to(torch.int32).view(torch.float32)
    found = product.float() * scale.float()
    if pertoken_scale is not None:
        found = found * pertoken_scale[:, None]
    return (found if bias is None or not bias.is_floating_point() else found + bias.float()).to(output_dtype)


def npu_weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    found = x.float() @ ((weight.float() + antiquant_offset.float()) * antiquant_scale.float())
    return (found if bias is None else found + bias.float()).to(x.dtype)


# What the package imports.


class Nothing:
    """Stands for what is imported and not needed: gives itself, whatever is asked."""

    def __getattr__(self, name: str) -> Any:
        return Nothing()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return Nothing()

    def __iter__(self) -> Any:
        return iter(())


class StandIn(ModuleType):
    """A module of empty classes and of `Nothing`, with the names that are given to it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {}) if name[0].isupper() and not name.isupper() else Nothing()
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes stand-ins of all that is no part of the quantisation package."""

    def __init__(self, package: Path, given: dict[str, dict[str, Any]]) -> None:
        self._package = package
        self._given = given

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.split(".")[0] not in ("torch_npu", "vllm", "vllm_ascend", "transformers"):
            return None
        if name.startswith("vllm_ascend.quantization"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        module = StandIn(spec.name)
        module.__path__ = [str(self._package / "vllm_ascend")] if spec.name == "vllm_ascend" else []
        module.__dict__.update(self._given.get(spec.name, {}))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


class PerTensorScaleParameter(torch.nn.Parameter):
    """As vLLM's, without its loader."""

    def __new__(cls, data: torch.Tensor, weight_loader: Any) -> PerTensorScaleParameter:
        return torch.nn.Parameter.__new__(cls, data, requires_grad=False)  # type: ignore[no-any-return]  # torch is untyped


class WeightsMapper:
    """As vLLM's, of suffixes alone."""

    def __init__(self, orig_to_new_suffix: dict[str, str] | None = None) -> None:
        self._suffixes = orig_to_new_suffix or {}

    def __or__(self, other: Any) -> WeightsMapper:
        return self

    def name(self, name: str) -> str | None:
        """The name that the engine has for one of a checkpoint, None for one that is not mapped."""
        return next((name.removesuffix(k) + v for k, v in self._suffixes.items() if name.endswith(k)), None)


class QuantizationConfig:
    """As vLLM's, without anything of its own."""

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        return WeightsMapper()


def set_weight_attrs(weight: torch.Tensor, attrs: dict[str, Any] | None) -> None:
    for key, value in (attrs or {}).items():
        setattr(weight, key, value)


def given_names() -> dict[str, dict[str, Any]]:
    config = SimpleNamespace(kv_transfer_config=None, model_config=None, parallel_config=None)

    def registers(name: str) -> Callable[[Any], Any]:
        return lambda cls: cls

    def as_it_is(weight: Any, *_: Any, **__: Any) -> Any:
        return weight

    return {
        "torch_npu": {
            "npu_quantize": npu_quantize,
            "npu_dynamic_quant": npu_dynamic_quant,
            "npu_quant_matmul": npu_quant_matmul,
            "npu_weight_quant_batchmatmul": npu_weight_quant_batchmatmul,
        },
        "vllm.config": {"get_current_vllm_config": lambda: config, "get_current_vllm_config_or_none": lambda: None},
        "vllm.model_executor.models.utils": {"WeightsMapper": WeightsMapper},
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "vllm.model_executor.layers.quantization": {"register_quantization_config": registers},
        "vllm.model_executor.parameter": {"PerTensorScaleParameter": PerTensorScaleParameter},
        "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: 0,
            "get_tensor_model_parallel_world_size": lambda: 1,
        },
        "vllm_ascend.utils": {
            "maybe_trans_nz": as_it_is,
            "COMPRESSED_TENSORS_METHOD": "compressed-tensors",
            "ASCEND_QUANTIZATION_METHOD": "ascend",
            "enable_dsa_cp": lambda: False,
            "enable_dsa_cp_with_layer_shard": lambda: False,
            "flashcomm2_enable": lambda: False,
            "oproj_tp_enable": lambda: False,
            "mlp_tp_enable": lambda: False,
        },
    }


def quantize(x: torch.Tensor, scale: torch.Tensor, reciprocal: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """`ops/register_custom_ops.py`, _quantize_impl."""
    return npu_quantize(x, reciprocal, offset)


# Loading.


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    held: dict[str, torch.Tensor] = {}
    for file in sorted(set(index.values())):
        held |= load_file(directory / file)
    return {name: held[name] for name in index}


def linears_of(config: dict[str, Any]) -> list[str]:
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return [f"model.layers.{layer}.{name}" for layer in range(config["num_hidden_layers"]) for name in names]


def load_linear(
    quantization: Any, adapters: Any, prefix: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[dict[str, Any], torch.nn.Module, Any]:
    """Allocates what the engine does and fills it; takes what it uses out of `tensors`."""
    parent, _, name = prefix.rpartition(".")
    members = [f"{parent}.{member}" for member in FUSED.get(name, [name])]
    scheme = quantization.create(prefix)
    method = adapters.AscendLinearMethod(scheme)
    layer = torch.nn.Module()
    sizes = [tensors[f"{member}.weight"].shape[0] for member in members]
    columns = tensors[f"{members[0]}.weight"].shape[1]
    method.create_weights(layer, columns, sizes, columns, sum(sizes), dtype, weight_loader=None)
    allocated, misfits = 0, []
    for leaf, parameter in layer.named_parameters():
        allocated += 1
        parts = [tensors.pop(f"{member}.{leaf}", None) for member in members]
        if any(part is None for part in parts):
            misfits.append(f"{prefix}.{leaf}: no tensor")
            continue
        shared = leaf in ("input_scale", "input_offset")
        if shared and any(not torch.equal(part, parts[0]) for part in parts[1:]):
            misfits.append(f"{prefix}.{leaf}: differs among {', '.join(members)}")
        whole = parts[0] if shared else torch.cat(parts)
        if whole.dtype != parameter.dtype or whole.shape != parameter.shape:
            misfits.append(f"{prefix}.{leaf}: {whole.dtype} {tuple(whole.shape)} for {parameter.dtype}")
            continue
        parameter.data.copy_(whole)
    # A linear's bias is the model's own parameter; vLLM passes over one that the model has not.
    biases = [tensors.pop(f"{member}.bias", None) for member in members]
    bias = None if any(part is None for part in biases) else torch.cat(biases).to(dtype)
    left = [name for name in tensors if name.rpartition(".")[0] in members and ".kv_cache_" not in name]
    report = {
        "linear": prefix,
        "kind": quantization.kind(prefix),
        "scheme": type(scheme).__name__,
        "allocated": allocated,
        "found": allocated - len([text for text in misfits if "no tensor" in text]),
        "left_over": left,
        "misfits": misfits,
        "bias": bias is not None,
    }
    if not misfits:
        layer.params_dtype = dtype
        method.process_weights_after_loading(layer)
    return report, layer, (scheme, bias)


class Quantization:
    """The package's reading of a description file."""

    def __init__(self, module: Any, description: dict[str, Any]) -> None:
        self._module = module
        self._description = description
        self.config = module.AscendModelSlimConfig(description)

    def skipped(self, prefix: str) -> bool:
        return bool(self.config.is_layer_skipped_ascend(prefix, FUSED))

    def kind(self, prefix: str) -> str:
        return str(self._module.get_linear_quant_type(self._description, prefix, FUSED))

    def cache_name(self, name: str) -> str | None:
        """The engine's name for a scale of the cache: a method of a name up to 0.23, a mapper from 0.25.1rc1 on."""
        if hasattr(self.config, "get_cache_scale"):
            found: str | None = self.config.get_cache_scale(name)
            return found
        mapper: WeightsMapper = self.config.get_cache_scale_mapper()
        return mapper.name(name)

    def create(self, prefix: str) -> Any:
        return self._module.create_scheme_for_layer(self._description, prefix, "linear", FUSED)


def load_cache(
    cache: Any, quantization: Quantization, prefix: str, tensors: dict[str, torch.Tensor]
) -> dict[str, Any] | None:
    """Scales of an int8 KV cache, by the names that the engine gives them."""
    if not any(f"{prefix}.{leaf}" in tensors for leaf in CACHE):
        return None
    layer = torch.nn.Module()
    cache.AscendC8KVCacheAttentionMethod({}, prefix).create_weights(layer)
    parameters = dict(layer.named_parameters())
    found = 0
    for leaf in CACHE:
        target = quantization.cache_name(f"{prefix}.{leaf}")
        parameter = parameters.get(str(target).rpartition(".")[2])
        tensor = tensors.pop(f"{prefix}.{leaf}", None)
        if parameter is not None and tensor is not None:
            parameter.weight_loader(parameter, tensor)
            found += int(torch.equal(parameter.data.float(), tensor.float().reshape(-1)))
    return {
        "linear": f"{prefix}.attn",
        "kind": "C8",
        "scheme": "AscendC8KVCacheAttentionMethod",
        "allocated": len(parameters),
        "found": found,
        "left_over": [name for name in tensors if name.startswith(prefix) and ".kv_cache_" in name],
        "misfits": [],
        "bias": False,
    }


def load(modules: Any, directory: Path, number: int, outputs: dict[str, Any]) -> dict[str, Any]:
    config = json.loads((directory / "config.json").read_text())
    # vLLM computes a float32 model in bfloat16.
    dtype = torch.float16 if config["torch_dtype"] == "float16" else torch.bfloat16
    torch.set_default_dtype(dtype)
    quantization = Quantization(modules.config, json.loads((directory / "quant_model_description.json").read_text()))
    tensors = tensors_of(directory)
    linears: list[dict[str, Any]] = []
    for prefix in linears_of(config):
        if quantization.skipped(prefix):
            continue
        report, layer, (scheme, bias) = load_linear(quantization, modules.adapters, prefix, tensors, dtype)
        linears.append(report)
        if not report["misfits"]:
            generator = torch.Generator().manual_seed(len(linears))
            width = layer.weight.shape[0]  # transposed after loading
            x = torch.randn(5, width, generator=generator, dtype=torch.float32).to(dtype)
            y = scheme.apply(layer, x, bias)
            outputs[f"{number}:{prefix}:x"], outputs[f"{number}:{prefix}:y"] = x.float().numpy(), y.float().numpy()
            if hasattr(layer, "is_kv_consumer"):  # set on nodes that only decode
                layer.is_kv_consumer = True
                outputs[f"{number}:{prefix}:decoded"] = scheme.apply(layer, x, bias).float().numpy()
    for layer_number in range(config["num_hidden_layers"]):
        found = load_cache(modules.cache, quantization, f"model.layers.{layer_number}.self_attn", tensors)
        linears += [] if found is None else [found]
    return {"linears": linears}


def main(package: str, outputs_file: str, *directories: str) -> None:
    torch.ops.vllm = SimpleNamespace(quantize=quantize)
    sys.meta_path.insert(0, Finder(Path(package), given_names()))
    from vllm_ascend.quantization import method_adapters, modelslim_config
    from vllm_ascend.quantization.methods import kv_c8

    modules = SimpleNamespace(config=modelslim_config, adapters=method_adapters, cache=kv_c8)
    outputs: dict[str, Any] = {}
    for number, directory in enumerate(directories):
        try:
            found = load(modules, Path(directory), number, outputs)
        except Exception as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps({"directory": directory, **found}), flush=True)
    np.savez(outputs_file, **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
