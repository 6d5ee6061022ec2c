"""Manifests: a layer is finished when its manifest stands, and only if its shards are what was written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tiny_checkpoint
from quantized_layers import LINEARS, SCHEMES, quantize

from gs_dist.checkpoint.header import read_header
from gs_dist.checkpoint.manifest import (
    Fingerprints,
    LayerManifest,
    MadeWith,
    publish_layer,
    publish_outer,
    read_manifest,
    shard_faults,
)
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.sealed_json import write_sealed_json
from gs_dist.errors import DamagedError, OutputError
from gs_dist.recipe.policy import AlgoArgs, QuantPolicy
from gs_dist.results.quantized import LinearSummary, QuantizedKVCache

DIALECTS = ["compressed-tensors"]
PRINTS = Fingerprints(recipe="aa", source="bb", data="cc")
ROW = LinearSummary(
    layer=1,
    name="model.layers.1.mlp.up_proj",
    strategy="SmoothQuant-W8-perchannel-A8-pertensor",
    relative_error=0.0125,
    error_source="gram",
    scale_min=1e-4,
    scale_max=2e-3,
    num_tokens=4096,
    notes=("damped twice",),
)


def publish_one(tmp_path: Path, **policy: Any) -> tuple[Path, LayerManifest]:
    reader = CheckpointReader(tiny_checkpoint(tmp_path / "m"))
    layer = quantize(reader, 1, {**dict.fromkeys(LINEARS, QuantPolicy(**policy)), "mlp.down_proj": None})
    scales = np.ones(reader.architecture.kv_size, np.float32)
    layer = dataclasses.replace(layer, rows=(ROW,), kv_cache=QuantizedKVCache(key_scale=scales, value_scale=scales))
    (tmp_path / "run").mkdir()
    return tmp_path / "run", publish_layer(tmp_path / "run", layer, reader.architecture, DIALECTS, PRINTS)


def test_a_manifest_reads_back(tmp_path: Path) -> None:
    """Shards, fingerprints, policies with all their arguments, KV cache and summary rows survive the disk."""
    args = AlgoArgs(smooth_alpha=(0.25, 0.5), damp_percent=0.02)
    output, manifest = publish_one(tmp_path, outliers_suppression="smooth", algo_args=args)
    assert read_manifest(output, 1) == manifest
    assert manifest.policies["model.layers.1.mlp.up_proj"].algo_args == args
    assert "model.layers.1.mlp.down_proj" not in manifest.policies
    assert (manifest.kv_cache, manifest.rows) == ("per_channel", (ROW,))
    content = json.loads(next(output.rglob("layer-00001.json")).read_text())
    told = content["effective_policies"]["model.layers.1.mlp.up_proj"]
    assert (told["weight_clip"], told["algo_args"]) == (False, {"alpha": 0.5}), "what came out, and not what was open"
    assert sorted(path.name for path in output.rglob("*")) == [
        "compressed-tensors",
        "layer-00001.json",
        "layer-00001.safetensors",
        "manifests",
    ]


def test_a_manifest_tells_the_software_and_the_shard_does_not(tmp_path: Path) -> None:
    """Versions and CPU kernel stand in the manifest alone."""
    reader = CheckpointReader(tiny_checkpoint(tmp_path / "m"))
    layer = quantize(reader, 1, dict.fromkeys(LINEARS, QuantPolicy()))
    shards = []
    for name, made_with in (("a", MadeWith(versions={"numpy": "1.26.4"}, kernel="x86_64 Zen")), ("b", MadeWith())):
        (tmp_path / name).mkdir()
        publish_layer(tmp_path / name, layer, reader.architecture, DIALECTS, PRINTS, made_with)
        manifest = read_manifest(tmp_path / name, 1)
        assert manifest is not None
        assert manifest.made_with == made_with
        shards.append((tmp_path / name / "compressed-tensors" / "layer-00001.safetensors").read_bytes())
    assert shards[0] == shards[1]


def test_an_unfinished_layer_has_none(tmp_path: Path) -> None:
    """No manifest means not finished, whatever shards lie about."""
    output, _ = publish_one(tmp_path)
    assert read_manifest(output, 0) is None
    assert read_manifest(tmp_path / "nowhere", 0) is None
    (output / "manifests" / "layer-00001.json").unlink()
    assert read_manifest(output, 1) is None


def test_bytes_depend_on_the_layer_alone(tmp_path: Path) -> None:
    """Publishing a layer twice gives the same shard and the same manifest, to the byte."""
    output, manifest = publish_one(tmp_path)
    (tmp_path / "again").mkdir()
    other, again = publish_one(tmp_path / "again")
    assert manifest == again
    for path in output.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (other / path.relative_to(output)).read_bytes()


def test_the_outer_part_is_carried_over_bit_for_bit(tmp_path: Path) -> None:
    """Embedding, final norm and head are in a shard of their own, and a tied head is not."""
    reader = CheckpointReader(tiny_checkpoint(tmp_path / "m", "qwen3", "bfloat16", shards=3))
    (tmp_path / "run").mkdir()
    manifest = publish_outer(tmp_path / "run", reader, DIALECTS, PRINTS)
    assert read_manifest(tmp_path / "run", None) == manifest
    path = tmp_path / "run" / "compressed-tensors" / "outer.safetensors"
    infos, _ = read_header(path, path.name)
    data = path.read_bytes()
    for name, array in reader.read_outer().items():
        assert data[infos[name].offset : infos[name].offset + infos[name].nbytes] == array.tobytes()
    assert "lm_head.weight" in infos


def test_changed_shards_are_found(tmp_path: Path) -> None:
    """A flipped bit, a cut file and a missing file are each named; an untouched one is not."""
    output, manifest = publish_one(tmp_path)
    path = output / "compressed-tensors" / "layer-00001.safetensors"
    assert shard_faults(output, manifest) == []
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "its content changed" in shard_faults(output, manifest)[0]
    path.write_bytes(data[:-1])
    assert "bytes" in shard_faults(output, manifest)[0]
    path.unlink()
    assert "cannot be read" in shard_faults(output, manifest)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"layer": 0},
        {"shards": {"compressed-tensors": {"file": "../../etc/passwd", "sha256": "", "nbytes": 0, "tensors": {}}}},
        {"shards": None},
        {"policies": {"x": {"weight_quant_dtype": "int3"}}},
        {"fingerprints": {"recipe": "a"}},
        {"rows": [{}]},
    ],
)
def test_a_damaged_manifest_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """Content of another version or form, or that points elsewhere, gives an OutputError with the file's name.

    Without its checksum made anew, the change itself is what is told.
    """
    output, _ = publish_one(tmp_path)
    path = output / "manifests" / "layer-00001.json"
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=r"^manifests/layer-00001\.json: does not hold what was written"):
        read_manifest(output, 1)
    del content["checksum"]
    path.write_text(json.dumps(content))
    with pytest.raises(OutputError, match=r"^manifests/layer-00001\.json: has no checksum"):
        read_manifest(output, 1)
    write_sealed_json(path, content)
    with pytest.raises(OutputError, match=r"^manifests/layer-00001\.json: .*delete it"):
        read_manifest(output, 1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    """Arbitrary bytes in a manifest give an OutputError with the file's name."""
    output, _ = publish_one(tmp_path)
    (output / "manifests" / "layer-00001.json").write_bytes(content)
    with pytest.raises(OutputError, match=r"^manifests/layer-00001\.json: "):
        read_manifest(output, 1)


def test_every_scheme_can_be_recorded(tmp_path: Path) -> None:
    """Policies of every scheme come back equal."""
    reader = CheckpointReader(tiny_checkpoint(tmp_path / "m", hidden_size=128))
    (tmp_path / "run").mkdir()
    for fields in SCHEMES.values():
        layer = quantize(reader, 0, dict.fromkeys(LINEARS, QuantPolicy(**fields)))
        manifest = publish_layer(tmp_path / "run", layer, reader.architecture, DIALECTS, PRINTS)
        assert read_manifest(tmp_path / "run", 0) == manifest
