"""The merge: an index over shards that are all there, or an error and no model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import random_tensors, save_checkpoint, tiny_checkpoint, tiny_config
from quantized_layers import LINEARS, SCHEMES, quantize
from safetensors.numpy import load_file

from gs_dist.checkpoint.manifest import Fingerprints, LayerManifest, publish_layer, publish_outer
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.writer import write_safetensors
from gs_dist.errors import JobFailure, OutputError
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import LinearSummary

NAME = "compressed-tensors"
PRINTS = Fingerprints(recipe="r", source="s", data="d")
POLICY = QuantPolicy(**SCHEMES["W8A8 static"])


@dataclasses.dataclass
class Run:
    output: Path
    reader: CheckpointReader
    layers: list[LayerManifest]
    outer: LayerManifest

    def merge(self, **options: Any) -> Any:
        return merge_checkpoint(self.output, NAME, self.reader, self.layers, self.outer, **options)

    @property
    def directory(self) -> Path:
        return self.output / NAME


def prepare(source: Path, output: Path, linears: tuple[str, ...] = LINEARS) -> Run:
    reader = CheckpointReader(source)
    output.mkdir()
    layers = [
        publish_layer(output, quantize(reader, n, dict.fromkeys(linears, POLICY)), reader.architecture, [NAME], PRINTS)
        for n in range(reader.architecture.num_layers)
    ]
    return Run(output, reader, layers, publish_outer(output, reader, [NAME], PRINTS))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return prepare(tiny_checkpoint(tmp_path / "m", "qwen2", shards=2, tokenizer=True), tmp_path / "run")


def test_the_index_covers_every_shard_and_rewrites_none(run: Run) -> None:
    """weight_map names the shard of every tensor, total_size is their bytes, and shards stay as they were."""
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.directory.glob("*.safetensors")}
    record = run.merge()
    index = json.loads((run.directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in before}
    assert index["weight_map"]["model.layers.1.mlp.up_proj.weight_scale"] == "layer-00001.safetensors"
    merged = CheckpointReader(run.directory, quantized=True)
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in merged.tensors.values()) == record.total_size
    assert len(merged.tensors) == record.num_tensors
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}


def test_what_serving_needs_goes_along(run: Run) -> None:
    """Whatever is neither weights nor code is copied, and the card is not."""
    source = run.reader.directory
    for name in ("LICENSE", "merges.txt", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja"):
        (source / name).write_text(name)
    for name in ("modeling_x.py", "tokenizer.py", "README.md", "pytorch_model.bin", "tokenizer.safetensors", "a.txt"):
        (source / name).write_text(name)
    record = run.merge()
    copied = {path.name for path in run.directory.iterdir()} - {
        path.name for path in run.directory.glob("*.safetensors")
    }
    assert copied == {
        "LICENSE", "a.txt", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
        "model.safetensors.index.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json",
    }  # fmt: skip
    assert copied < set(record.files)
    for name in copied - {"config.json", "model.safetensors.index.json"}:
        assert (run.directory / name).read_bytes() == (source / name).read_bytes()


def test_config_is_the_source_and_its_quantization(tmp_path: Path) -> None:
    """Every key of the source stays, except one that names code; a dtype is stated where none was."""
    source = tiny_checkpoint(tmp_path / "m", dtype="bfloat16", rope_theta=5e5)
    content = json.loads((source / "config.json").read_text())
    del content["torch_dtype"]
    (source / "config.json").write_text(json.dumps({**content, "auto_map": {"AutoModel": "evil.Model"}}))
    run = prepare(source, tmp_path / "run")
    run.merge()
    merged = json.loads((run.directory / "config.json").read_text())
    quantization = merged.pop("quantization_config")
    assert quantization["quant_method"] == NAME
    assert merged == {**content, "torch_dtype": "bfloat16"}


def test_merging_again_gives_the_same_bytes(run: Run) -> None:
    """A merge that was interrupted is simply done again."""
    run.merge()
    before = {path.name: path.read_bytes() for path in run.directory.iterdir()}
    run.layers.reverse()
    run.merge()
    assert before == {path.name: path.read_bytes() for path in run.directory.iterdir()}


def test_dropped_tensors_are_said(tmp_path: Path) -> None:
    """What no decoder needs is left out and named."""
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    run = prepare(save_checkpoint(tmp_path / "m", config, tensors), tmp_path / "run")
    assert run.merge().dropped == ("lm_head.weight",)
    assert "lm_head.weight" not in CheckpointReader(run.directory, quantized=True).tensors


def without_tensor(run: Run, name: str) -> None:
    """As if a format had forgotten a tensor: shard and manifest agree, the model lacks it."""
    path = run.directory / run.layers[1].shards[NAME].file
    record = write_safetensors(path, {n: array for n, array in load_file(path).items() if n != name})
    run.layers[1] = dataclasses.replace(run.layers[1], shards={NAME: record})


def with_policy(run: Run, policy: QuantPolicy | None) -> None:
    name = "model.layers.0.mlp.up_proj"
    policies = {n: p for n, p in run.layers[0].policies.items() if n != name}
    run.layers[0] = dataclasses.replace(
        run.layers[0], policies=policies if policy is None else {**policies, name: policy}
    )


FAILURES: list[tuple[str, Callable[[Run], Any], str]] = [
    ("layer missing", lambda run: run.layers.pop(1), "1 of 2 layers are not finished, the first is layer 1"),
    ("layer twice", lambda run: run.layers.append(run.layers[0]), "layer-00000: comes twice"),
    ("another format", lambda run: run.layers.append(dataclasses.replace(run.layers.pop(), shards={})), "no shard in"),
    ("float tensor lost", lambda run: without_tensor(run, "model.layers.1.input_layernorm.weight"), "unaccounted for"),
    ("weight lost", lambda run: without_tensor(run, "model.layers.1.mlp.up_proj.weight"), "unaccounted for"),
    ("scale lost", lambda run: without_tensor(run, "model.layers.1.mlp.up_proj.weight_scale"), "unaccounted for"),
    ("policy lost", lambda run: with_policy(run, None), "up_proj.weight is int8 .*, called for is float32"),
    ("other policy", lambda run: with_policy(run, QuantPolicy()), "up_proj.weight_packed is unaccounted for"),
    (
        "dynamic instead of static",
        lambda run: with_policy(run, QuantPolicy(**SCHEMES["W8A8 dynamic"])),
        "holds model.layers.0.mlp.up_proj.input_scale",
    ),
]


@pytest.mark.parametrize(("change", "message"), [r[1:] for r in FAILURES], ids=[r[0] for r in FAILURES])
def test_nothing_is_merged_that_is_not_accounted_for(change: Callable[[Run], Any], message: str, run: Run) -> None:
    """A layer or tensor that is missing, or that no policy calls for, fails the job and leaves no index."""
    change(run)
    with pytest.raises(JobFailure, match=message):
        run.merge()
    assert not (run.directory / "model.safetensors.index.json").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


DAMAGE: list[tuple[str, Callable[[Run], Any], str]] = [
    ("shard gone", lambda run: (run.directory / "layer-00001.safetensors").unlink(), "layer-00001.safetensors: cannot"),
    ("outer gone", lambda run: (run.directory / "outer.safetensors").unlink(), "outer.safetensors: cannot be read"),
    ("shard cut", lambda run: truncate(run.directory / "layer-00000.safetensors"), "truncated"),
    (
        "another shard in its place",
        lambda run: write_safetensors(run.directory / "layer-00000.safetensors", {"x": np.ones(2, np.int8)}),
        "is not the file that was written",
    ),
    (
        "foreign weights",
        lambda run: write_safetensors(run.directory / "model.safetensors", {"x": np.ones(2, np.int8)}),
        "model.safetensors: is not of this run",
    ),
]


@pytest.mark.parametrize(("change", "message"), [r[1:] for r in DAMAGE], ids=[r[0] for r in DAMAGE])
def test_a_directory_that_was_tampered_with_is_refused(change: Callable[[Run], Any], message: str, run: Run) -> None:
    """Lost, cut, exchanged and foreign files are named, with what to do, and no index appears."""
    change(run)
    with pytest.raises(OutputError, match=message):
        run.merge()
    assert not (run.directory / "model.safetensors.index.json").exists()


def test_a_linear_that_stayed_in_float_must_say_why(tmp_path: Path) -> None:
    """The recipe's policies are compared with what was done, and a note in the summary explains a difference."""
    run = prepare(tiny_checkpoint(tmp_path / "m"), tmp_path / "run", LINEARS[:-1])
    planned: dict[str, QuantPolicy | None] = {
        f"model.layers.{layer}.{name}": POLICY for layer in range(2) for name in LINEARS
    }
    planned["lm_head"] = POLICY
    with pytest.raises(JobFailure, match=r"^model\.layers\.0\.mlp\.down_proj: the recipe quantises it"):
        run.merge(planned=planned)
    rows = [
        LinearSummary(
            layer=layer,
            name=f"model.layers.{layer}.mlp.down_proj",
            strategy="NA",
            relative_error=None,
            error_source="none",
            scale_min=None,
            scale_max=None,
            num_tokens=0,
            notes=("kept in float: relative error 0.9",),
        )
        for layer in range(2)
    ]
    run.layers = [dataclasses.replace(part, rows=(row,)) for part, row in zip(run.layers, rows, strict=True)]
    run.merge(planned=planned)
    with pytest.raises(JobFailure, match="the recipe leaves it alone"):
        run.merge(planned={**planned, "model.layers.1.mlp.up_proj": None})


def test_leftovers_of_a_dead_writer_are_cleared(run: Run) -> None:
    """Temporary files without a living writer go with the merge."""
    (run.directory / ".gs-dist-layer-00000.safetensors.0123456789ab.tmp").write_bytes(b"half")
    run.merge()
    assert not list(run.directory.glob(".*"))


def test_tokenizer_links_must_stay_inside(run: Run, tmp_path: Path) -> None:
    """A tokenizer file that is a link to elsewhere is not followed."""
    (tmp_path / "secret").write_text("secret")
    (run.reader.directory / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="points outside"):
        run.merge()
    assert not (run.directory / "model.safetensors.index.json").exists()
