"""Finished parts of a run: a shard per dialect, and beside them the manifest that says they are complete.

Layout of an output directory: `<dialect>/layer-00017.safetensors`, `<dialect>/outer.safetensors` (embedding,
final norm and head), `manifests/layer-00017.json`, `manifests/outer.json`. A manifest is written after
its shards, so whatever it names exists in full.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.finite import beyond_float16
from gs_dist.checkpoint.lineage import Lineage, checksums
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.sealed_json import read_sealed_json, write_sealed_json
from gs_dist.checkpoint.shard_records import record_faults, record_from_json, rows_from_json
from gs_dist.checkpoint.writer import ShardRecord, StoredTensor, make_directory, write_safetensors
from gs_dist.errors import LayerError, OutputError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.dtypes import FLOATS
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import LinearSummary, QuantizedLayer

__all__ = [
    "MANIFESTS",
    "Fingerprints",
    "LayerManifest",
    "MadeWith",
    "part_stem",
    "publish_layer",
    "publish_outer",
    "read_manifest",
    "shard_faults",
    "write_manifest",
]

MANIFESTS = "manifests"
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """What a part was made from: digests of the recipe, of the source checkpoint and of the calibration data."""

    recipe: str
    source: str
    data: str


@dataclass(frozen=True, kw_only=True)
class MadeWith:
    """What decides the bytes of a part beside recipe, model and data.

    Attributes:
        versions: package to version.
        kernel: the CPU kernels of BLAS, such as `x86_64 Haswell`.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    kernel: str = ""


@dataclass(frozen=True, kw_only=True)
class LayerManifest:
    """One finished decoder layer, or (`layer` None) what lies outside of the layers.

    Attributes:
        layer: index of the decoder layer.
        shards: name of the dialect to the shard written for it.
        fingerprints: what it was made from.
        made_with: the software that made it; not in the shards, which are the same on like software.
        policies: full dotted name of every linear that was quantised, to how it was; a linear of the layer
            that is not here stayed in float.
        kv_cache: "per_channel", "per_token" or None.
        rows: the layer's rows of the summary.
        lineage: the source tensors that it was made from, by their checksums; None where nobody noted them.
        solved: checksum of the layer's file in `solved/`, where later layers see the quantised ones.
    """

    layer: int | None
    shards: Mapping[str, ShardRecord]
    fingerprints: Fingerprints
    made_with: MadeWith = MadeWith()
    policies: Mapping[str, QuantPolicy] = field(default_factory=dict)
    kv_cache: str | None = None
    rows: tuple[LinearSummary, ...] = ()
    lineage: Lineage | None = None
    solved: str | None = None

    @property
    def stem(self) -> str:
        """`layer-00017` or `outer`: what its files are called."""
        return part_stem(self.layer)


def part_stem(layer: int | None) -> str:
    """Name without suffix of a layer's shards and manifest, `outer` for None."""
    return "outer" if layer is None else f"layer-{layer:05d}"


def publish_layer(
    output: Path,
    layer: QuantizedLayer,
    architecture: DecoderArchitecture,
    dialects: Sequence[str],
    fingerprints: Fingerprints,
    made_with: MadeWith = MadeWith(),
    lineage: Lineage | None = None,
    solved: str | None = None,
) -> LayerManifest:
    """Writes a layer's shard in every dialect, then its manifest.

    Args:
        output: the run's output directory; subdirectories are made.
        layer: what the solvers made of the layer.
        architecture: of the source checkpoint.
        dialects: dialects to write.
        fingerprints: what the layer was made from.
        made_with: the software of this process.
        lineage: the source tensors that the layer was made from.
        solved: checksum of what `write_solved` wrote of it, if it did.

    Raises:
        OutputError: the disk is full, or the directory cannot be written.
        LayerError: a value that the dialect cannot hold.
    """
    prefix = architecture.layer_prefix(layer.layer)
    shards = {}
    for name in dialects:
        directory = make_directory(output / name)
        tensors = codec_of(name).encode_layer(layer, architecture)
        if architecture.dtype == "float16":
            _refuse_beyond_float16(tensors)
        shards[name] = write_safetensors(directory / f"{part_stem(layer.layer)}.safetensors", tensors)
    kv_cache = None
    if layer.kv_cache is not None:
        kv_cache = "per_token" if layer.kv_cache.key_scale is None else "per_channel"
    manifest = LayerManifest(
        layer=layer.layer,
        shards=shards,
        fingerprints=fingerprints,
        made_with=made_with,
        policies={prefix + name: linear.policy for name, linear in layer.linears.items()},
        kv_cache=kv_cache,
        rows=layer.rows,
        lineage=lineage,
        solved=solved,
    )
    write_manifest(output, manifest)
    return manifest


def _refuse_beyond_float16(tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """What stays in float, of another dtype, is cast by the engine."""
    for name, array in tensors.items():
        if array.dtype in FLOATS.values() and array.dtype != np.float16 and beyond_float16(array).any():
            largest = float(np.abs(array.astype(np.float32)).max())
            raise LayerError(f"{name} holds {largest:.4g}, which float16 cannot: set serving_dtype: bfloat16")


def publish_outer(
    output: Path,
    reader: CheckpointReader,
    dialects: Sequence[str],
    fingerprints: Fingerprints,
    made_with: MadeWith = MadeWith(),
) -> LayerManifest:
    """Carries what stands outside the layers over, bit for bit, in every dialect; then writes its manifest.

    A tensor is read, or decoded, when it is written.
    """
    tensors = reader.read(reader.outer_part)
    stored = {
        name: StoredTensor(dtype=reader.tensors[name].dtype, shape=reader.tensors[name].shape) for name in tensors
    }
    shards = {
        name: write_safetensors(
            make_directory(output / name) / f"{part_stem(None)}.safetensors", tensors, stored=stored
        )
        for name in dialects
    }
    lineage = Lineage(behind="", tensors=checksums(tensors))
    manifest = LayerManifest(layer=None, shards=shards, fingerprints=fingerprints, made_with=made_with, lineage=lineage)
    write_manifest(output, manifest)
    return manifest


def write_manifest(output: Path, manifest: LayerManifest) -> None:
    """Publishes a manifest; its shards are in place already."""
    content = {
        "version": _VERSION,
        "layer": manifest.layer,
        "fingerprints": dataclasses.asdict(manifest.fingerprints),
        "made_with": dataclasses.asdict(manifest.made_with),
        "shards": {name: dataclasses.asdict(record) for name, record in manifest.shards.items()},
        "policies": {name: policy.model_dump(mode="json") for name, policy in manifest.policies.items()},
        "effective_policies": {name: policy.effective() for name, policy in manifest.policies.items()},
        "kv_cache": manifest.kv_cache,
        "rows": [dataclasses.asdict(row) for row in manifest.rows],
        "lineage": None if manifest.lineage is None else dataclasses.asdict(manifest.lineage),
        "solved": manifest.solved,
    }
    write_sealed_json(make_directory(output / MANIFESTS) / f"{manifest.stem}.json", content)


def read_manifest(output: Path, layer: int | None) -> LayerManifest | None:
    """The manifest of a layer (None: of the outer part), or None where it is not finished.

    Raises:
        DamagedError: the file does not hold what was written.
        OutputError: it is of another version.
    """
    label = f"{MANIFESTS}/{part_stem(layer)}.json"
    try:
        content = read_sealed_json(output / label, label)
    except FileNotFoundError:
        return None
    try:
        manifest = _from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise OutputError(
            f"{label}: is not a manifest of this version ({reason:.200}); delete it to have the layer done again"
        ) from error
    if manifest.layer != layer:
        raise OutputError(f"{label}: is the manifest of {manifest.stem}; delete it to have the layer done again")
    return manifest


def shard_faults(output: Path, manifest: LayerManifest) -> list[str]:
    """Reads the manifest's shards in full and says which are missing or changed; empty where all is well."""
    return record_faults(output, manifest.shards)


def _from_json(content: Mapping[str, Any]) -> LayerManifest:
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']!r}")
    return LayerManifest(
        layer=content["layer"],
        fingerprints=Fingerprints(**content["fingerprints"]),
        made_with=MadeWith(**content["made_with"]),
        shards={name: record_from_json(record) for name, record in content["shards"].items()},
        policies={
            name: QuantPolicy.model_validate_json(json.dumps(policy)) for name, policy in content["policies"].items()
        },
        kv_cache=content["kv_cache"],
        rows=rows_from_json(content["rows"]),
        lineage=None if content["lineage"] is None else Lineage(**content["lineage"]),
        solved=content["solved"],
    )
