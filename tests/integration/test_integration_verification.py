"""Whether a directory is what a job published, and whether its weights are the float model's."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save_tokenizer, tiny_checkpoint
from runs import W8A8, run_inline, small_recipe
from safetensors.numpy import load_file, save_file

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.provenance import PROVENANCE_FILE
from gs_dist.seal import sealed_text

DIALECTS = ("compressed-tensors", "ascend", "golden-stick")
W4 = {
    "weight_quant_dtype": "qint4x2",
    "weight_quant_granularity": "per_group",
    "group_size": 64,
    "outliers_suppression": "awq",
    "precision_recovery": "gptq",
    "algo_args": {"desc_act": True, "static_groups": True},
}
P = "model.layers.1."


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished jobs over one model, with smoothed W8A8 in every dialect and with AWQ and GPTQ at four bits."""
    root = tmp_path_factory.mktemp("published")
    smooth = small_recipe(root, "w8a8", num_layers=2, ptq=W8A8, format=list(DIALECTS))
    save_tokenizer(root / "model")
    run_inline(smooth)
    run_inline(small_recipe(root, "w4", num_layers=2, ptq=W4, format=["compressed-tensors", "golden-stick"]))
    return root


@pytest.fixture
def alone(published: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a model directory outside of its run."""

    def take(name: str) -> Path:
        return Path(shutil.copytree(published / name, tmp_path / "alone"))

    return take


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def forge(directory: Path, edit: Callable[[dict[str, Any]], object], file: str = "layer-00001.safetensors") -> None:
    """Changes a shard, and its hash with it, as somebody would who means it."""
    tensors = {name: array.copy() for name, array in load_file(directory / file).items()}
    edit(tensors)
    save_file(tensors, directory / file)
    sha256 = hashlib.sha256((directory / file).read_bytes()).hexdigest()
    edit_json(directory / PROVENANCE_FILE, lambda content: content["shards"][file].update(sha256=sha256))


def rules(directory: Path, **options: Any) -> set[tuple[str, str]]:
    return {(problem.rule, problem.tensor or problem.file) for problem in check(directory, **options).problems}


@pytest.mark.parametrize("name", [*(f"w8a8/{name}" for name in DIALECTS), "w4/compressed-tensors", "w4/golden-stick"])
def test_what_a_job_published_is_verified_and_is_its_sources(
    name: str, published: Path, alone: Callable[[str], Path]
) -> None:
    """Files, scales and weights agree, however channels were rescaled on the way, inside of the run and alone."""
    for directory in (published / name, alone(name)):
        report = check(directory, model=published / "model")
        assert report.problems == ()
        assert report.verified
        assert "by provenance.json" in report.facts["verified"]
        assert "14 linears" in report.facts["verified"]
        assert 0 < float(report.facts["source"].split("energy ")[1].split(",")[0]) < 0.2


@pytest.mark.parametrize("name", [f"w8a8/{name}" for name in DIALECTS])
def test_every_file_of_the_job_is_noted(name: str, published: Path) -> None:
    """The card alone is not, since `gs-dist evaluate` writes it anew."""
    content = json.loads((published / name / PROVENANCE_FILE).read_text())
    noted = {*content["shards"], *content["files"]}
    assert {path.name for path in (published / name).iterdir()} - noted == {PROVENANCE_FILE, "README.md"}


def remove(file: str) -> Callable[[Path], None]:
    return lambda directory: (directory / file).unlink()


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", lambda content: content.update(values))


def provenance(**values: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / PROVENANCE_FILE, lambda content: content.update(values))


def scaled(directory: Path) -> None:
    """A scale of one channel a thousandfold."""

    def edit(tensors: dict[str, Any]) -> None:
        tensors[P + "mlp.up_proj.weight_scale"][3] *= 1000

    forge(directory, edit)


def exchanged(directory: Path) -> None:
    """The layers' tensors under each other's names."""
    first, second = (load_file(directory / f"layer-0000{number}.safetensors") for number in (0, 1))
    forge(directory, lambda tensors: tensors.update({n.replace("s.0.", "s.1."): a for n, a in first.items()}))
    forge(
        directory,
        lambda tensors: tensors.update({n.replace("s.1.", "s.0."): a for n, a in second.items()}),
        "layer-00000.safetensors",
    )


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no provenance": (remove(PROVENANCE_FILE), "provenance-present", PROVENANCE_FILE),
    "a provenance without shards": (provenance(shards={}), "shard-noted", "layer-00000.safetensors"),
    "a provenance without rows": (provenance(linears=[]), "provenance-rows", PROVENANCE_FILE),
    "a provenance with a row gone": (
        lambda directory: edit_json(directory / PROVENANCE_FILE, lambda content: content["linears"].pop(3)),
        "provenance-rows",
        "model.layers.0.self_attn.o_proj",
    ),
    "rotary base": (set_config(rope_theta=5e5), "file-hash", "config.json"),
    "no tokenizer": (remove("tokenizer.json"), "file-noted", "tokenizer.json"),
    "other weights beside": (
        lambda directory: shutil.copy(directory / "outer.safetensors", directory / "extra.safetensors"),
        "file-listed",
        "extra.safetensors",
    ),
    "scale of a channel": (scaled, "provenance-scale", P + "mlp.up_proj.weight_scale"),
    "layers exchanged": (exchanged, "provenance-scale", P + "mlp.up_proj.weight_scale"),
    "ModelOpt's file": (
        lambda directory: (directory / "hf_quant_config.json").write_text("{}"),
        "file-beside",
        "hf_quant_config.json",
    ),
    "an adapter": (
        lambda directory: (directory / "adapter_config.json").write_text("{}"),
        "file-beside",
        "adapter_config.json",
    ),
    "code": (lambda directory: (directory / "modeling_x.py").write_text(""), "file-beside", "modeling_x.py"),
    "a pickle": (
        lambda directory: (directory / "pytorch_model.bin").write_bytes(b""),
        "file-beside",
        "pytorch_model.bin",
    ),
}


@pytest.mark.parametrize("name", [f"w8a8/{name}" for name in DIALECTS])
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_as_published_is_named(case: str, name: str, alone: Callable[[str], Path]) -> None:
    """Each change is told by its rule and its place, also where hashes were forged with it."""
    spoil, rule, place = BROKEN[case]
    directory = alone(name)
    spoil(directory)
    assert (rule, place) in rules(directory)


@pytest.mark.parametrize("name", ["done", "summary.json", "summary.parquet", "recipe.yaml", "layer_policies.yaml"])
def test_what_lies_beside_the_models_of_a_run_is_verified_too(name: str, published: Path, tmp_path: Path) -> None:
    """A byte of any file that a job keeps in its output, and the absence of one that it always has."""
    run = Path(shutil.copytree(published / "w8a8", tmp_path / "run"))
    path = run / name
    if name == "layer_policies.yaml":
        path.write_text(sealed_text("layer_policies:\n  'a': null\n"))
    assert check(run / "ascend").clean
    whole = path.read_bytes()
    path.write_bytes(whole[:30] + bytes([whole[30] ^ 1]) + whole[31:])
    assert [(p.file, p.rule) for p in check(run / "ascend").problems] == [(f"../{name}", "run-file-whole")]
    path.unlink()
    missed = [] if name in ("done", "layer_policies.yaml") else [(f"../{name}", "run-file-present")]
    assert [(p.file, p.rule) for p in check(run / "ascend").problems if p.file == f"../{name}"] == missed


def test_a_directory_that_nothing_vouches_for_is_not_called_clean(alone: Callable[[str], Path]) -> None:
    """Another tool's directory breaks no rule and is not verified, and the last line says so."""
    directory = alone("w8a8/compressed-tensors")
    (directory / PROVENANCE_FILE).unlink()
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for number, file in enumerate(sorted(directory.glob("*.safetensors"))):
        new = f"model-{number:05d}-of-00003.safetensors"
        index["weight_map"] = {n: new if f == file.name else f for n, f in index["weight_map"].items()}
        file.rename(directory / new)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    report = check(directory)
    assert report.problems == ()
    assert not report.verified
    assert report.render().splitlines()[-1].endswith("no rule broken, but not verified: see above")
    assert report.exit_code == 0


def zero_row(tensors: dict[str, Any]) -> None:
    tensors[P + "mlp.down_proj.weight"][5] = 0


def other_values(tensors: dict[str, Any]) -> None:
    tensors[P + "mlp.gate_proj.weight"] = np.roll(tensors[P + "mlp.gate_proj.weight"], 1, axis=1)


def scaled_values(tensors: dict[str, Any]) -> None:
    """A row of v_proj, which only o_proj could undo."""
    name = next(n for n in (P + "self_attn.v_proj.deq_scale", P + "self_attn.v_proj.weight_scale") if n in tensors)
    tensors[name][2] *= 8


@pytest.mark.parametrize("name", [f"w8a8/{name}" for name in DIALECTS])
@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (zero_row, P + "mlp.down_proj.weight"),
        (other_values, P + "mlp.gate_proj.weight"),
        (scaled_values, P + "self_attn.o_proj.weight"),
    ],
)
def test_weights_that_are_not_the_sources_are_named(
    edit: Callable[[dict[str, Any]], None], place: str, name: str, alone: Callable[[str], Path], published: Path
) -> None:
    """Integers are valid whatever they are: only the float model tells that they stand for something else."""
    directory = alone(name)
    forge(directory, edit)
    assert ("source-weight", place) in rules(directory, model=published / "model")


def test_another_model_of_the_same_shapes_is_not_the_source(alone: Callable[[str], Path], tmp_path: Path) -> None:
    """Its embedding and its linears have other values."""
    other = tiny_checkpoint(tmp_path / "other", num_layers=2, seed=9)
    found = rules(alone("w4/compressed-tensors"), model=other)
    assert {rule for rule, _ in found} == {"source-tensor", "source-weight"}
    larger = tiny_checkpoint(tmp_path / "larger", num_layers=3)
    assert rules(tmp_path / "alone", model=larger) == {("source-architecture", "config.json")}
