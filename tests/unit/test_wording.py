"""Words that messages share, and foreign text on its way to a terminal."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import dialects
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checkpoints import save_safetensors, tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from typer.testing import CliRunner

from gs_dist.checkpoint.dialects.compressed_tensors.codec import CompressedTensorsCodec
from gs_dist.checkpoint.name_patterns import NamePatterns
from gs_dist.errors import CheckpointError
from gs_dist.terminal.cli import app
from gs_dist.terminal.console import LineProgress, PrintableConsole
from gs_dist.wording import one_line, printable

PACKAGE = Path(__file__).parents[2] / "gs_dist"
RED, BACKWARDS = "\x1b[31m", "\u202e"


@given(st.text())
def test_printable_text_has_nothing_that_steers(text: str) -> None:
    """Only what can be seen is left, with line ends and tabulators; what could be seen before is as it was."""
    shown = printable(text)
    assert all(char in "\n\t" or char.isprintable() or char.isspace() for char in shown)
    assert not any(0x7F <= ord(char) < 0xA0 or char in "\x1b\r\u202e\u2028" for char in shown)
    assert printable(shown) == shown
    assert "\n" not in one_line(text)


@given(st.dictionaries(st.text(), st.text()))
def test_json_stays_the_same_json(content: dict[str, str]) -> None:
    """What is spelt out is spelt as JSON does, so that `--json` can be read back."""
    assert json.loads(printable(json.dumps(content, ensure_ascii=False))) == content


def test_names_of_other_peoples_files_do_not_steer_the_terminal(tmp_path: Path) -> None:
    """A tensor's and a file's name with control characters, and a path with them in an error, come out spelt."""
    directory = tmp_path / f"model{RED}"
    dialects.save_model(directory, CompressedTensorsCodec(), dialects.W8A8)
    save_safetensors(
        directory / f"x{RED}{BACKWARDS}.safetensors", {f"a{RED}\nmodel: no problem found": np.ones(2, np.float32)}
    )
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [f"re:({RED}"]
    (directory / "config.json").write_text(json.dumps(config))
    for arguments in (
        ["check", str(directory)],
        ["check", str(directory / f"nowhere{RED}")],
        ["plan", f"no{RED}.yaml"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "\\u001b[31m" in result.output or "\\x1b[31m" in result.output
        assert not any(char in result.output for char in (RED, BACKWARDS))
        assert "\nmodel: no problem found" not in result.output


@pytest.mark.seconds
def test_names_in_recipes_and_data_do_not_steer_the_terminal(tmp_path: Path) -> None:
    """Keys, values, patterns, files and columns of a recipe and of the data that it names."""
    tiny_checkpoint(tmp_path / "model", num_layers=1)
    data = tmp_path / f"d{RED}.parquet"
    pq.write_table(pa.table({f"c{RED}": ["a"], f"d{BACKWARDS}": [{"x": 1}]}), data)
    good = {"model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "calibration": {"data": str(data)}}
    recipes = (
        good,
        {**good, f"k{RED}": 1},
        {**good, "model": f"m{RED}"},
        {**good, "calibration": {"data": f"nothing{RED}{BACKWARDS}.parquet"}},
        {**good, "layer_policies": {f"x{RED}": None}},
        {**good, "ptq": {"opname_blacklist": [f"x{BACKWARDS}"]}},
        {**good, "gram": f"x{RED}"},
    )
    for recipe in recipes:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        result = CliRunner().invoke(app, ["quantize", str(tmp_path / "recipe.yaml")])
        assert result.exit_code == 2
        assert "u001b[31m" in result.output or "x1b[31m" in result.output or "u202e" in result.output
        assert not any(char in result.output for char in (RED, BACKWARDS))


def test_tables_and_progress_are_printable() -> None:
    """Cells of tables keep their colours and lose those of their text."""
    stream = io.StringIO()
    table = Table()
    table.add_column("a", style="red")
    table.add_row(f"x{BACKWARDS}\x07")
    console = PrintableConsole(file=stream, force_terminal=True, width=60)
    console.print(table)
    console.print(f"y{RED}", markup=False)
    LineProgress(stream).message(f"z{RED}")
    text = stream.getvalue()
    assert "y\\u001b" in text
    assert "z\\u001b[31m" in text
    assert BACKWARDS not in text
    assert "\x1b[31m" in text  # the column's own


def test_everything_that_is_printed_goes_through_one_door() -> None:
    """No module prints by itself, and none makes a console that does not spell things out."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            spelt = any(isinstance(a, ast.Call) and ast.unparse(a.func) == "printable" for a in node.args)
            prints = called in ("print", "typer.echo", "typer.secho", "click.echo", "Console") or called.endswith(
                ("stdout.write", "stderr.write")
            )
            if prints and not spelt:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {called}")
    assert found == []


@pytest.mark.parametrize("pattern", ["re:(a|a)*b", "re:(.*)*c", "re:(?:a+)+$", "re:(x+x+)+y"])
def test_a_pattern_cannot_keep_the_check_busy(pattern: str) -> None:
    """Patterns that take `re` longer than a life are tried on a long name at once."""
    assert not NamePatterns([pattern]).match("a" * 5000 + "x" * 5000)


@pytest.mark.parametrize(
    "targets",
    [["re:(?!a)b"], ["re:(a)\\1"], ["re:("], ["re:" + "a" * 2000], ["re:\ud800"], [f"re:{n}" for n in range(2000)]],
)
def test_what_is_not_tried_is_said(targets: list[str]) -> None:
    """Look-around, references to groups, and more or longer patterns than any model has."""
    with pytest.raises(CheckpointError, match="pattern"):
        NamePatterns(targets)
