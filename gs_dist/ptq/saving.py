"""From a network that `PTQ.apply` quantised to a model directory, as a job publishes one."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gs_dist import __version__
from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.finished_model import move
from gs_dist.checkpoint.lineage import Lineage, checksums
from gs_dist.checkpoint.manifest import Fingerprints, LayerManifest, publish_layer, publish_outer
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.provenance import write_provenance
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import JobFailure, OutputError, UserError
from gs_dist.ptq.cells import FakeQuantDense, QuantDense
from gs_dist.ptq.decoder import CausalDecoder
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedLayer

__all__ = ["save_pretrained"]

_VERSIONED = ("mindspore", "numpy", "scipy")


def save_pretrained(
    network: Any, directory: str | os.PathLike[str], *, model: str | os.PathLike[str], format: str = "golden-stick"
) -> Path:
    """Writes an applied or converted decoder as a directory that an engine loads: weights, index, config, tokenizer.

    The directory appears once it is complete and was checked.

    Args:
        network: a `CausalDecoder` that `PTQ.apply` returned, or what `convert` made of it.
        directory: to make; there is nothing in its place yet, or an empty directory.
        model: directory of the float model the network was made from.
        format: `golden-stick`, `ascend`, `compressed-tensors` or `gptq`.

    Returns:
        The directory.

    Raises:
        UserError: the network holds no layers that `apply` solved, or the format cannot express how they are quantised.
        CheckpointError: `model` is damaged, or another model.
        OutputError: something is in the directory's place, or it cannot be written.
        JobFailure: what was written breaks a rule of its format.
    """
    target = Path(directory)
    if format not in DIALECTS:
        raise UserError(f"format {format!r} is not known: write one of {', '.join(DIALECTS)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{str(target)!r} is in use: give a directory that does not exist, or an empty one")
    layers = _layers(network)
    reader = CheckpointReader(Path(model))
    if reader.architecture != network.architecture:
        raise UserError(f"model {os.fspath(model)!r} is not what the network was made from: its config.json differs")
    codec = codec_of(format)
    codec.check_policies(_policies(reader, layers), reader.architecture)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gs-dist-", dir=target.parent) as place:
        output = Path(place)
        _write(output, reader, layers, format)
        report = check(output / format)
        if not report.clean:
            raise JobFailure(f"{format}: what was written breaks the rules of its format:\n{report.render()}")
        if target.is_dir():
            target.rmdir()
        move(output / format, target)
    return target


def _layers(network: Any) -> Mapping[int, QuantizedLayer]:
    if not isinstance(network, CausalDecoder):
        raise UserError(
            f"save_pretrained takes a CausalDecoder, but got {type(network).__name__}: only of its own decoder does "
            "gs_dist know how an engine names the parts; save another network with mindspore.save_checkpoint"
        )
    if not network.solved.layers:
        raise UserError(
            "the network holds no layer that PTQ.apply has quantised: call apply in QUANTIZE mode first, and give "
            "save_pretrained what it returned"
        )
    if isinstance(network.lm_head, FakeQuantDense | QuantDense):
        raise UserError("lm_head is quantised, and every format keeps it in float: take it out of layer_policies")
    return network.solved.layers


def _policies(reader: CheckpointReader, layers: Mapping[int, QuantizedLayer]) -> dict[str, QuantPolicy | None]:
    prefix = reader.architecture.layer_prefix
    found: dict[str, QuantPolicy | None] = dict.fromkeys(reader.architecture.linear_names())
    for index, layer in layers.items():
        found.update({prefix(index) + name: linear.policy for name, linear in layer.linears.items()})
    return found


def _write(output: Path, reader: CheckpointReader, layers: Mapping[int, QuantizedLayer], dialect: str) -> None:
    """Makes `output/<dialect>` a model directory."""
    architecture = reader.architecture
    made_from = Fingerprints(recipe="", source=reader.fingerprint(), data="")
    manifests: list[LayerManifest] = []
    for index in range(architecture.num_layers):
        layer = layers.get(index)
        if layer is None:
            layer = QuantizedLayer(layer=index, linears={}, tensors=reader.read_layer(index))
        lineage = Lineage(behind="", tensors=checksums(reader.read_layer(index)))
        manifests.append(publish_layer(output, layer, architecture, (dialect,), made_from, lineage=lineage))
    outer = publish_outer(output, reader, (dialect,), made_from)
    policies = _policies(reader, layers)
    merged = merge_checkpoint(output, dialect, reader, manifests, outer, policies)
    told = {name: policy.effective() for name, policy in policies.items() if policy is not None}
    write_provenance(
        output / dialect, [*manifests, outer], recipe={"policies": told}, versions=_versions(), files=merged.files
    )


def _versions() -> dict[str, str]:
    return {"gs-dist": __version__} | {name: importlib.metadata.version(name) for name in _VERSIONED}
