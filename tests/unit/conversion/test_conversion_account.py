"""What a conversion says of itself: each linear's error as stored, the gate, summary, card, recipe, provenance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from checkpoints import save_checkpoint, tiny_checkpoint
from conversions import Array, family_checkpoint, paired_rows, read_file, read_tensors, run_conversion, unpacked_int32
from typer.testing import CliRunner

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.provenance import read_provenance
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import LayerError
from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import read_summary
from gs_dist.terminal.cli import app
from gs_dist.terminal.conversion import published_texts

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def restored(found: dict[str, Array], name: str, columns: int) -> Array:
    """Float64 values of a stored linear, whatever its form, by the formats' pages."""
    scale = found[f"{name}.weight_scale"]
    stored = found.get(f"{name}.weight", found.get(f"{name}.weight_packed"))
    assert stored is not None
    steps = 2.0 ** (scale.astype(np.float64) - 127) if scale.dtype == np.uint8 else scale.astype(np.float64)
    if stored.dtype == np.int32:
        values = unpacked_int32(stored, 32 * stored.shape[1] // columns, columns).astype(np.float64)
    elif stored.dtype == np.uint8:
        values = np.stack([E2M1[stored & 15], E2M1[stored >> 4]], axis=-1).reshape(len(stored), -1)
    elif len(scale) == 2 * len(stored):
        values = paired_rows(stored).astype(np.float64)
    else:
        values = stored.astype(np.float64)
    if len(steps) != len(values):
        return np.asarray(values * np.kron(steps, np.ones((128, 128)))[: len(values), :columns])
    return np.asarray(values * np.repeat(steps, columns // steps.shape[1], axis=1))


def assert_told(row: LinearSummary, weight: Array, values: Array, scale: Array) -> None:
    """A row says what is lost, computed anew in float64."""
    weight = weight.astype(np.float64)
    lost, energy = np.square(values - weight), np.square(weight)
    steps = 2.0 ** (scale.astype(np.float64) - 127) if scale.dtype == np.uint8 else scale.astype(np.float64)
    assert row.relative_error == pytest.approx(lost.sum() / energy.sum(), rel=1e-4)
    assert row.token_error == pytest.approx(np.median(lost.sum(axis=0) / energy.sum(axis=0)), rel=1e-4)
    assert row.zeroed == pytest.approx(1 - np.count_nonzero(values) / np.count_nonzero(weight))
    assert (row.scale_min, row.scale_max) == (steps.min(), steps.max())
    assert row.error_source == "weight"


@pytest.mark.parametrize(
    ("dialect", "scheme"),
    [
        ("ascend", "W8A8_DYNAMIC"),
        ("compressed-tensors", "W4A16"),
        ("compressed-tensors", "FP8_BLOCK"),
        ("ascend", "W8A8_MXFP8"),
        ("compressed-tensors", "W4A4_MXFP4"),
    ],
)
def test_every_linears_loss_is_that_of_what_was_stored(tmp_path: Path, dialect: str, scheme: str) -> None:
    """As decoded from the files apart from the package; a linear that stays says why, in JSON and in Parquet."""
    model = tiny_checkpoint(tmp_path / "model", dtype="bfloat16", hidden_size=128, intermediate_size=256)
    source = read_file(model / "model.safetensors")
    found = read_tensors(run_conversion(model, tmp_path / "out", format=dialect, scheme=scheme)[dialect])
    rows = {row.name: row for row in read_summary(tmp_path / "out").rows}
    linears = [name.removesuffix(".weight") for name, array in source.items() if array.ndim == 2]
    assert sorted(rows) == sorted(linears)
    for name, row in rows.items():
        if row.strategy == "NA":
            assert row.notes[0].startswith("stays in floats: ")
            continue
        values = restored(found, name, source[f"{name}.weight"].shape[1])
        assert_told(row, source[f"{name}.weight"], values, found[f"{name}.weight_scale"])
    table = pq.read_table(tmp_path / "out" / "summary.parquet")
    assert table["relative_error"].to_pylist() == [row.relative_error for row in rows.values()]
    assert check(tmp_path / "out").facts["verified"].endswith(f"{len(rows)} linears by provenance.json")


def test_experts_of_a_mixture_have_rows_too(tmp_path: Path) -> None:
    """Fused tensors are told expert by expert, of int4 pairs as well."""
    model, tensors = family_checkpoint(tmp_path / "model", "qwen3_moe")
    found = read_tensors(run_conversion(model, tmp_path / "out", format="ascend", scheme="W4A8_DYNAMIC")["ascend"])
    rows = {row.name: row for row in read_summary(tmp_path / "out").rows}
    name = "model.layers.1.mlp.experts.3.down_proj"
    weight = tensors[f"{name}.weight"]
    assert_told(rows[name], weight, restored(found, name, weight.shape[1]), found[f"{name}.weight_scale"])
    assert rows[name].strategy == "W4-perchannel-A8-pertoken"
    assert rows[name].layer == 1
    assert rows["model.embed_tokens"].layer == -1


def loud(kind: str, rows: int = 64, columns: int = 64) -> Array:
    """A weight of small values among which some are enormous: a column of them, or one in every row."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, columns)) * 0.01
    place = np.full(rows, 5) if kind == "column" else rng.permutation(columns)[:rows]
    weight[np.arange(rows), place] = 400.0
    return weight.astype(np.float32)


@pytest.mark.parametrize("kind", ["column", "scattered"])
@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", "FP8_BLOCK"])
def test_loud_values_that_hide_the_rest_are_refused(tmp_path: Path, kind: str, scheme: str) -> None:
    """Nearly all of the energy is kept, and everything else became zero; no model is there."""
    model = tiny_checkpoint(tmp_path / "model", hidden_size=64, intermediate_size=64)
    tensors = dict(read_file(model / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"] = loud(kind).astype(tensors[f"{name}.weight"].dtype)
    save_checkpoint(model, json.loads((model / "config.json").read_text()), tensors)
    if scheme == "FP8_BLOCK":  # a float has room for both, up to a point
        tensors[f"{name}.weight"][0, 0] = 4e6
        save_checkpoint(model, json.loads((model / "config.json").read_text()), tensors)
    with pytest.raises(LayerError, match=rf"{name}: .*layer_policies, or raise max_relative_error") as told:
        run_conversion(model, tmp_path / "out", scheme=scheme)
    assert "median input channel" in str(told.value) or "become zero" in str(told.value)
    assert not (tmp_path / "out" / "done").exists()
    assert not list((tmp_path / "out").rglob("config.json"))
    made = run_conversion(model, tmp_path / "out", scheme=scheme, max_relative_error=None)
    row = next(row for row in read_summary(tmp_path / "out").rows if row.name == name)
    assert row.relative_error is not None
    assert row.relative_error < 0.01 < 0.5 < (row.zeroed or 0)
    assert row.notes
    assert check(made["compressed-tensors"]).clean
    kept = run_conversion(
        model, tmp_path / "kept", scheme=scheme, layer_policies={r".*layers\.0\.mlp\.(up|gate)_proj": None}
    )
    assert check(kept["compressed-tensors"]).clean


def test_a_linear_that_rounds_to_nothing_is_refused_and_one_of_zeros_is_not(tmp_path: Path) -> None:
    """A float16 scale cannot be as small as weights of 1e-7 would have it; zeros stay what they are."""
    model = tiny_checkpoint(tmp_path / "model", dtype="float16")
    tensors = dict(read_file(model / "model.safetensors"))
    config = json.loads((model / "config.json").read_text())
    zeros = "model.layers.0.mlp.down_proj"
    tensors[f"{zeros}.weight"] = np.zeros_like(tensors[f"{zeros}.weight"])
    save_checkpoint(model, config, tensors)
    run_conversion(model, tmp_path / "out")
    row = next(row for row in read_summary(tmp_path / "out").rows if row.name == zeros)
    assert row.relative_error is None
    assert row.notes == ("all its weights are zero",)
    tensors[f"{zeros}.weight"] = np.full_like(tensors[f"{zeros}.weight"], 2.0**-24)
    tensors[f"{zeros}.weight"][:, 0] = 2.0**-17
    save_checkpoint(model, config, tensors)
    with pytest.raises(LayerError, match=f"{zeros}: the median input channel loses 1 of its energy"):
        run_conversion(model, tmp_path / "tiny")


def test_what_a_job_publishes_a_conversion_does(tmp_path: Path) -> None:
    """Recipe, card and hashes; `gs-dist summary` and `check` work on the output as on a job's."""
    model = tiny_checkpoint(tmp_path / "model", hidden_size=64)
    made = run_conversion(model, tmp_path / "out", layer_policies={r".*k_proj|.*q_proj|.*v_proj": "W8A16"})
    card = (made["compressed-tensors"] / "README.md").read_text()
    for told in ("`W8-perchannel-A8-pertoken`", "`W8-perchannel`", "No data was seen", "vllm serve", "mode: convert"):
        assert told in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "recipe.yaml").read_text()
    told = read_provenance(made["compressed-tensors"])
    assert told is not None
    assert set(told.schemes.values()) == {"W8A8_DYNAMIC", "W8A16", "FLOAT"}
    shown = CliRunner().invoke(app, ["summary", str(tmp_path / "out")])
    assert shown.exit_code == 0
    assert "made without data" in shown.output
    assert CliRunner().invoke(app, ["check", str(tmp_path / "out"), "--for", "vllm"]).exit_code == 0


@pytest.mark.parametrize("where", ["/", "."])
def test_a_published_recipe_gives_the_cards_words_wherever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """`gs-dist evaluate` writes the card anew; the recipe names neither the model's place nor the output's."""
    made = run_conversion(tiny_checkpoint(tmp_path / "model"), tmp_path / "out", scheme="W4A16", group_size=64)
    monkeypatch.chdir(tmp_path if where == "." else where)
    architecture = CheckpointReader(made["compressed-tensors"], quantized=True).architecture
    texts = published_texts(tmp_path / "out" / "recipe.yaml", architecture)
    assert dict(texts.settings)["`group_size`"] == 64
