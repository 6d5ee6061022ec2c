"""The notebook runs from its first cell to its last, on a tiny model."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from runs import small_recipe

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "jobs" / "quantize.ipynb"

pytestmark = pytest.mark.ray


def run(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell; what its last line is worth, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_runs_and_shows_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every cell gives what the text above it promises; outputs are not kept in the file."""
    config = small_recipe(tmp_path, num_layers=2)
    data = str(config.calibration.data[0])
    for name, value in {
        "ROOT": str(ROOT),
        "MODEL": config.model,
        "CALIBRATION": data,
        "EVALUATION": data,
        "OUTPUT": str(tmp_path / "notebook"),
    }.items():
        monkeypatch.setenv(f"GS_DIST_{name}", value)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {}
    shown = [
        run("".join(cell["source"]).replace("samples=32, length=256", "samples=4, length=16"), names) for cell in cells
    ]
    _, planned, _, quality, table, report = shown
    assert "worker" in planned
    assert quality["mean KL"] >= 0
    assert 0 < quality["quantised"] < 2 * quality["float"]
    errors = [row["relative_error"] for row in table if row["relative_error"] is not None]
    assert errors == sorted(errors, reverse=True)
    assert errors
    page = report._repr_html_()
    assert page.startswith("<iframe srcdoc=")
    assert "W8-perchannel" in page
