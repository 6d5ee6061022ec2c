"""Loads model directories with the reader of vLLM-MindSpore or MindFormers on a CPU, and prints a line of JSON of each.

    python tests/engines/load_mindspore.py vllm-mindspore|mindformers PACKAGE DIRECTORY...

PACKAGE is the folder that a wheel was unpacked into. Its golden_stick modules run as they are, on this environment's
MindSpore: they say what each linear is taken for and allocate its parameters. What lies around them is a stand-in, and
so is the card's library of operators; nothing is computed.

A line holds the directory and its linears as the reader fuses them: method, parameters allocated and found, and what
did not fit; or the words by which the directory was refused.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import mindspore as ms

from gs_dist.checkpoint.reader import CheckpointReader

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
STEM = "vllm_mindspore.model_executor.layers.quantization"
MINDFORMERS = "mindformers.parallel_core.inference.quantization.golden_stick"


class StandIn(ModuleType):
    """A module of empty classes, and of functions that give nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *_, **__: None}) if name[0].isupper() else lambda *_, **__: None
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes stand-ins of all that is none of the modules that are to run."""

    def __init__(self, package: Path, real: Sequence[str]) -> None:
        self._package = package
        self._real = tuple(real)

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.split(".")[0] not in ("vllm", "vllm_mindspore", "mindformers", "ms_custom_ops", "regex"):
            return None
        if name.startswith(self._real):
            return importlib.machinery.PathFinder.find_spec(name, path)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        if spec.name == "regex":
            import re

            return re
        module = StandIn(spec.name)
        module.__path__ = [str(self._package.joinpath(*spec.name.split(".")))]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


class Reader(NamedTuple):
    """What stands for an engine's loader.

    Attributes:
        config: of a description's content.
        prefix: the engine's name of a linear.
        leaf: the checkpoint's name of a parameter.
        sizes: whether `create_weights` also takes the sizes of the whole linear.
    """

    config: Callable[[dict[str, Any]], Any]
    prefix: Callable[[str], str]
    leaf: Callable[[str], str]
    sizes: bool


def vllm_mindspore(package: Path) -> Reader:
    sys.meta_path.insert(0, Finder(package, [f"{STEM}.golden_stick.", f"{STEM}.quant_ops"]))
    module = importlib.import_module(f"{STEM}.golden_stick.golden_stick")

    def config(content: dict[str, Any]) -> Any:
        kind = module.ModelSlimConfig if "model_quant_type" in content else module.GoldenStickConfig
        return kind.from_config({key: label for key, label in content.items() if isinstance(label, str)})

    return Reader(config, lambda name: name, lambda leaf: leaf, sizes=True)


def mindformers(package: Path) -> Reader:
    sys.meta_path.insert(0, Finder(package, [f"{MINDFORMERS}."]))
    module = importlib.import_module(f"{MINDFORMERS}.config")
    tree = ast.parse((package / "mindformers/models/qwen3/utils.py").read_text(encoding="utf-8"))
    mapping = next(
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "weight_mapping"
    )

    def config(content: dict[str, Any]) -> Any:
        return module.GoldenStickConfig({**content, "quantization": "golden-stick", "weight_mapping": mapping})

    def prefix(name: str) -> str:
        names = {"qkv_proj": "linear_qkv", "o_proj": "linear_proj", "gate_up_proj": "linear_fc1"}
        names |= {"down_proj": "linear_fc2"}
        parent, _, last = name.rpartition(".")
        parent = parent.replace("model.layers.", "decoder.layers.").replace("self_attn", "self_attention")
        return f"{parent}.{names[last]}"

    return Reader(config, prefix, lambda leaf: "weight_scale" if leaf == "w_scale" else leaf, sizes=False)


def load_linear(reader: Reader, config: Any, checkpoint: CheckpointReader, name: str) -> dict[str, Any]:
    """Allocates what the engine does, and looks for a tensor of each parameter's name, dtype and shape."""
    parent, _, last = name.rpartition(".")
    members = [f"{parent}.{member}" for member in FUSED.get(last, [last])]
    shapes = [checkpoint.tensors[f"{member}.weight"].shape for member in members]
    rows, columns = [shape[0] for shape in shapes], shapes[0][1]
    dtype = getattr(ms, checkpoint.architecture.dtype)
    cell = ms.nn.Cell()
    method = config.get_quant_method(cell, reader.prefix(name))
    whole = {"input_size": columns, "output_size": sum(rows)} if reader.sizes else {}
    method.create_weights(
        cell, input_size_per_partition=columns, output_partition_sizes=rows, params_dtype=dtype, **whole
    )
    parameters = {parameter.name.rpartition(".")[2]: parameter for parameter in cell.get_parameters()}
    misfits = []
    for leaf, parameter in parameters.items():
        held = [checkpoint.tensors.get(f"{member}.{reader.leaf(leaf)}") for member in members]
        if any(tensor is None for tensor in held):
            misfits.append(f"{name}.{leaf}: no tensor")
            continue
        stored = [tensor for tensor in held if tensor is not None]
        shared = leaf in ("input_scale", "input_offset")
        shape = stored[0].shape if shared else (sum(t.shape[0] for t in stored), *stored[0].shape[1:])
        found = (str(parameter.dtype).lower(), tuple(parameter.shape))
        if {(tensor.dtype, shape) for tensor in stored} != {found}:
            misfits.append(f"{name}.{leaf}: {stored[0].dtype} {shape} for {found}")
    return {"linear": name, "method": type(method).__name__, "allocated": len(parameters), "misfits": misfits}


def main(engine: str, package: str, *directories: str) -> None:
    reader = {"vllm-mindspore": vllm_mindspore, "mindformers": mindformers}[engine](Path(package))
    for directory in directories:
        try:
            checkpoint = CheckpointReader(Path(directory), quantized=True)
            files = ("quantization_description.json", "quant_model_description.json")
            described = next(path for file in files if (path := Path(directory) / file).is_file())
            config = reader.config(json.loads(described.read_text()))
            names = [f"model.layers.{n}.{part}" for n in range(checkpoint.architecture.num_layers) for part in LINEARS]
            found: dict[str, Any] = {"linears": [load_linear(reader, config, checkpoint, name) for name in names]}
        except Exception as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps({"directory": directory, **found}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[2])
    main(*sys.argv[1:])
