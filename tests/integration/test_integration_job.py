"""A job as a person runs it: the command line, real Ray actors, real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import save_tokenizer, tiny_checkpoint
from runs import W8A8, published_hashes, run_inline, save_samples, small_recipe

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.recipe.config import CalibrationConfig, load_recipe
from gs_dist.results.summary import read_summary

pytestmark = pytest.mark.ray


def gs_dist(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gs_dist", *arguments]
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CalibrationConfig]:
    """A recipe file over a tiny model with a tokenizer, run once over 2 stages x 2 replicas by the command line."""
    directory = tmp_path_factory.mktemp("job")
    model = tiny_checkpoint(directory / "model", num_layers=4)
    save_tokenizer(model)
    save_samples(directory / "samples.parquet", CheckpointReader(model).architecture.vocab_size)
    recipe = {
        "model": str(model),
        "output": str(directory / "runs" / "out"),
        "calibration": {
            "data": str(directory / "samples.parquet"),
            "num_samples": 20,
            "sequence_length": 32,
            "micro_batch_size": 2,
        },
        "ptq": {**W8A8, "opname_blacklist": ["lm_head"]},
        "parallel": {"pipeline_parallel_size": 2, "data_parallel_size": 2, "threads_per_worker": 1},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = gs_dist("quantize", str(path))
    assert done.returncode == 0, done.stderr
    assert "SmoothQuant-wclip-W8-perchannel-A8-pertensor" in done.stdout
    return path, load_recipe(path)


def test_actors_publish_the_bytes_of_one_process(job: tuple[Path, CalibrationConfig]) -> None:
    """Two stages by two replicas on Ray give the bytes of one worker in one process."""
    path, config = job
    alone = small_recipe(path.parent, "alone", calibration={"micro_batch_size": 2}, ptq=config.ptq.model_dump())
    run_inline(alone)
    assert published_hashes(alone) == published_hashes(config)


def test_a_finished_job_leaves_what_it_promises(job: tuple[Path, CalibrationConfig]) -> None:
    """Model directory, summary, recipe and `done` are there, and none of them tells of this machine."""
    _, config = job
    output = Path(config.output)
    assert {p.name for p in output.iterdir()} >= {
        "compressed-tensors",
        "done",
        "manifests",
        "recipe.yaml",
        "report.html",
        "summary.json",
        "summary.parquet",
    }
    summary = read_summary(output)
    assert len(summary.stages) == 4
    assert all(stage.peak_memory_measured for stage in summary.stages)
    quantized = [row for row in summary.rows if row.strategy != "NA"]
    assert len(quantized) == 28
    assert all(row.relative_error is not None and 0 < row.relative_error < 0.01 for row in quantized)
    assert summary.rows[-1].name == "lm_head"
    provenance = json.loads((output / "compressed-tensors" / "provenance.json").read_text())
    assert provenance["fingerprints"] == summary.fingerprints
    assert provenance["versions"] == summary.versions
    assert provenance["recipe"] == json.loads(json.dumps(config.fingerprint_fields()))
    assert {f"compressed-tensors/{file}": shard["sha256"] for file, shard in provenance["shards"].items()} == (
        published_hashes(config)
    )
    assert [row["name"] for row in provenance["linears"]] == [row.name for row in summary.rows[:-1]]
    texts = (output / "recipe.yaml", output / "done", *output.rglob("README.md"), *output.rglob("provenance.json"))
    for path in (*output.glob("*.json"), *texts):
        text = path.read_text()
        assert str(output.parent.parent) not in text, path
        assert os.uname().nodename not in text, path


def test_a_second_submission_ends_at_once_with_the_same_model(job: tuple[Path, CalibrationConfig]) -> None:
    """Submitting a finished recipe again keeps every shard and reports success."""
    path, config = job
    before = published_hashes(config)
    again = gs_dist("quantize", str(path))
    assert again.returncode == 0, again.stderr
    assert "4 of 4 layers are finished" in again.stdout + again.stderr
    assert published_hashes(config) == before


def test_evaluate_compares_both_models_and_remembers_it(job: tuple[Path, CalibrationConfig]) -> None:
    """Perplexities of the float and the published model stand side by side, and go into the summary."""
    path, config = job
    found = gs_dist(
        "evaluate",
        config.output,
        "--data",
        str(path.parent / "samples.parquet"),
        "--model",
        config.model,
        "--num-samples",
        "8",
        "--sequence-length",
        "32",
    )
    assert found.returncode == 0, found.stderr
    (measured,) = read_summary(Path(config.output)).evaluations
    assert measured.float_perplexity is not None
    assert measured.perplexity == pytest.approx(measured.float_perplexity, rel=0.02)
    assert f"{measured.perplexity:.4f}" in found.stdout
    card = (Path(config.output) / "compressed-tensors" / "README.md").read_text()
    assert f"{measured.perplexity:.4f}" in card
    assert "Over 8 samples of 32 tokens of samples.parquet (248 predicted tokens" in card


def test_the_published_directory_passes_its_own_check(job: tuple[Path, CalibrationConfig]) -> None:
    """`gs-dist check` calls the model clean, and names the file once a byte is gone."""
    _, config = job
    model = Path(config.output) / "compressed-tensors"
    assert gs_dist("check", str(model)).returncode == 0
    card = model / "config.json"
    text = card.read_text()
    try:
        card.write_text(json.dumps({**json.loads(text), "num_hidden_layers": 5}))
        broken = gs_dist("check", str(model))
    finally:
        card.write_text(text)
    assert broken.returncode == 2
    assert "model.layers.4" in broken.stdout + broken.stderr


def test_resolve_serves_a_second_recipe_without_samples(tmp_path: Path) -> None:
    """From kept statistics a second recipe is solved although the calibration data is gone."""
    config = small_recipe(tmp_path, num_layers=2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": config.model,
                "output": config.output,
                "calibration": {
                    "data": list(config.calibration.data),
                    "num_samples": 20,
                    "sequence_length": 32,
                    "micro_batch_size": 2,
                },
                "ptq": W8A8,
                "parallel": {"threads_per_worker": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
            }
        )
    )
    kept = gs_dist("quantize", str(recipe), "--keep-statistics")
    assert kept.returncode == 0, kept.stderr
    full = gs_dist("quantize", str(recipe), f"output={tmp_path / 'full'}", "ptq.act_range=mse")
    assert full.returncode == 0, full.stderr
    (tmp_path / "samples.parquet").unlink()
    solved = gs_dist("resolve", config.output, str(recipe), f"output={tmp_path / 'second'}", "ptq.act_range=mse")
    assert solved.returncode == 0, solved.stderr
    hashes = [published_hashes(config.model_copy(update={"output": str(tmp_path / n)})) for n in ("full", "second")]
    assert hashes[0] == hashes[1]
    other = gs_dist("resolve", config.output, str(recipe), f"output={tmp_path / 'third'}", "calibration.num_samples=10")
    assert other.returncode == 2
    assert "another calibration" in other.stderr
