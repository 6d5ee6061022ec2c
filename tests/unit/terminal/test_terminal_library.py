"""The commands for Python: the same as the command line, typed, and light to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from summaries import a_summary, dense_rows

import gs_dist
from gs_dist import JobStatus, load_summary, plan, quantize
from gs_dist.errors import PlanError, RecipeError
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.results.summary import CalibrationSummary, write_summary
from gs_dist.terminal.request import Request


def test_importing_the_package_imports_nothing_heavy() -> None:
    """The names are found when they are asked for."""
    code = "import gs_dist, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not {"ray", "mindspore", "pyarrow", "numpy", "pydantic", "typer"} & set(loaded)


def test_the_names_are_told_and_no_others_are_found() -> None:
    """A misspelt name is an AttributeError, as of any module."""
    assert {"quantize", "plan", "evaluate", "load_summary", "JobStatus"} <= set(dir(gs_dist))
    with pytest.raises(AttributeError, match="calibrate"):
        gs_dist.calibrate  # type: ignore[attr-defined]  # noqa: B018  # that is what is tested


def test_a_plan_is_that_of_the_command_line(tmp_path: Path) -> None:
    """Of a model directory as of a recipe, and one that cannot fit is refused."""
    model = tiny_checkpoint(tmp_path / "model")
    made = plan(model, "parallel.pipeline_parallel_size=2", scheme="w8a8")
    assert made.pipeline_parallel_size == 2
    assert plan(Request(source=model, scheme="w8a8", output=tmp_path / "out").config()).num_workers == 1
    with pytest.raises(PlanError):
        plan(model, "parallel.memory_per_worker=1MiB")


def test_quantizing_runs_the_recipe_that_the_arguments_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the callback hears where the job stands."""
    model, calls, heard = tiny_checkpoint(tmp_path / "model"), [], []
    status = JobStatus(
        state="running",
        phase="",
        layers_done=1,
        num_layers=2,
        tokens_done=3,
        tokens_per_second=None,
        seconds=4.0,
        seconds_left=None,
        started="",
        updated="",
    )

    def run(config: CalibrationConfig, **options: Any) -> CalibrationSummary:
        calls.append(config)
        options["progress"].job_status(status)
        return a_summary(dense_rows(1))

    fake = ModuleType("gs_dist.runtime.coordinator")
    fake.quantize = run  # type: ignore[attr-defined]  # a module that stands for another
    monkeypatch.setitem(sys.modules, "gs_dist.runtime.coordinator", fake)
    monkeypatch.setattr("gs_dist.runtime.coordinator", fake, raising=False)
    quantize(model, "calibration.seed=7", scheme="w4a16", output=tmp_path / "out", samples=4, progress=heard.append)
    typed = Request(
        source=model, overrides=["calibration.seed=7"], scheme="w4a16", output=tmp_path / "out", samples=4
    ).config()
    assert calls == [typed]
    assert heard == [status]


def test_mistakes_are_raised_as_the_command_line_tells_them(tmp_path: Path) -> None:
    """A scheme that is none, and options beside a recipe that is read."""
    model = tiny_checkpoint(tmp_path / "model")
    with pytest.raises(RecipeError, match="do you mean w8a8"):
        plan(model, scheme="w8b8")
    config = Request(source=model, output=tmp_path / "out").config()
    with pytest.raises(TypeError, match="model_copy"):
        plan(config, scheme="w8a8")


def test_a_summary_opens_as_a_table(tmp_path: Path) -> None:
    """The rows of summary.parquet, ready for Arrow, pandas or polars."""
    write_summary(tmp_path, a_summary(dense_rows(2)))
    table = load_summary(tmp_path).to_arrow()
    assert table.num_rows == len(dense_rows(2))
    assert table.column("name").to_pylist()[0] == "model.layers.0.self_attn.q_proj"
