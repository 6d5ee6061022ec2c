"""What `docs/extending.md` promises: an addition of each kind is taken up everywhere from its own home.

Each test registers a small addition of `tests/` and goes the way of a recipe with it; nothing else is touched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_checkpoint
from plain_dialect.codec import DESCRIPTION
from pydantic import ValidationError
from quantized_layers import LINEARS, quantize
from safetensors.numpy import load_file, save_file

from gs_dist.checkpoint.check import check, check_all
from gs_dist.checkpoint.dialects import codec_of, published_dialect
from gs_dist.checkpoint.finished_model import find_models
from gs_dist.checkpoint.manifest import Fingerprints, publish_layer, publish_outer
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.model_card import write_model_card
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import CheckpointError, RecipeError
from gs_dist.methods.table import ROUNDINGS, SUPPRESSIONS, OutliersSuppressionType, PrecisionRecovery
from gs_dist.recipe import dialects
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.summary import CalibrationSummary
from gs_dist.solvers import rounding, suppression

DOCS = Path(__file__).parents[2] / "docs" / "extending.md"
PRINTS = Fingerprints(recipe="r", source="s", data="d")
PLAIN = dialects.Dialect(
    name="plain", title="the plain layout", home="plain_dialect", description_file=DESCRIPTION, elsewhere="Not at all."
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one row that an addition costs outside of its own package."""
    monkeypatch.setitem(dialects.DIALECTS, "plain", PLAIN)  # type: ignore[arg-type]  # a table is read-only


def a_recipe(output: Path, source: Path, **changes: object) -> CalibrationConfig:
    values = {"model": str(source), "output": str(output), "calibration": {"data": "c.parquet"}, "format": ["plain"]}
    return CalibrationConfig.model_validate({**values, **changes})


def test_a_dialect_that_is_not_registered_is_refused(tmp_path: Path) -> None:
    """The names that a recipe takes are those of the table."""
    with pytest.raises(ValidationError, match="compressed-tensors, ascend, golden-stick, gptq, each once"):
        a_recipe(tmp_path / "run", tmp_path / "m")


@pytest.mark.usefixtures("plain")
def test_a_registered_dialect_is_recipe_written_merged_checked_read_back_and_told_of(tmp_path: Path) -> None:
    """With a record, a codec and a layout it goes the whole way, and no file of the package knows its name."""
    source, output = tiny_checkpoint(tmp_path / "m", "llama", tokenizer=True), tmp_path / "run"
    config = a_recipe(output, source)
    reader = CheckpointReader(source)
    architecture, policy = reader.architecture, QuantPolicy()
    refused = QuantPolicy(act_quant_dtype="int8")
    with pytest.raises(RecipeError, match="plain holds weights alone"):
        codec_of("plain").check_policies({"model.layers.0.mlp.up_proj": refused}, architecture)

    layers = [quantize(reader, n, dict.fromkeys(LINEARS, policy)) for n in range(architecture.num_layers)]
    output.mkdir()
    manifests = [publish_layer(output, layer, architecture, config.dialects, PRINTS) for layer in layers]
    outer = publish_outer(output, reader, config.dialects, PRINTS)
    merge_checkpoint(output, "plain", reader, manifests, outer)

    directory = output / "plain"
    assert json.loads((directory / DESCRIPTION).read_text())["linears"]
    assert published_dialect(directory) == "plain"
    assert find_models(output) == {"plain": directory}
    assert {name: report.clean for name, report in check_all(output).items()} == {"plain": True}
    with pytest.raises(CheckpointError, match=f"{DESCRIPTION} describes quantised weights"):
        CheckpointReader(directory)
    decoded = codec_of("plain").decode_layer(CheckpointReader(directory, quantized=True), 1)
    for name, linear in decoded.linears.items():
        np.testing.assert_array_equal(linear.dequantized(), layers[1].linears[name].dequantized())

    write_model_card(directory, config, _summary(source), architecture)
    card = (directory / "README.md").read_text()
    assert "by gs_dist, in the plain layout." in card

    shard = directory / "layer-00001.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight_scale"][3] = 0
    save_file(tensors, shard)
    assert "scale-positive" in {problem.rule for problem in check(directory).problems}


def test_what_a_dialect_costs_is_what_the_page_says() -> None:
    """Its list names three places, the record and the two files of its folder, and those exist for every dialect."""
    page = DOCS.read_text(encoding="utf-8").split("\n## A dialect\n")[1].split("\n## ")[0]
    named = [line for line in page.splitlines() if line.startswith("1. ")]
    assert len(named) == 3
    assert "gs_dist/recipe/dialects.py" in named[0]
    assert "codec.py" in named[1]
    assert "layout.py" in named[2]
    for dialect in dialects.DIALECTS.values():
        home = DOCS.parents[1].joinpath(*dialect.home.split("."))
        assert (home / "codec.py").is_file()
        assert (home / "layout.py").is_file()


ADDITIONS = Path(__file__).parents[1] / "additions"
PACKAGE = Path(__file__).parents[2] / "gs_dist"
# Lines of tables that are there already: file, what is found there, what stands in its place.
METHOD_ROWS = (
    ("methods/table.py", "from gs_dist.methods.unsuppressed", "from gs_dist.methods.toward_zero import *\n{}"),
    ("methods/table.py", '    GPTQ = "gptq"\n', '{}    TOWARD_ZERO = "toward-zero"\n'),
    ("methods/table.py", "class AlgoArgs(", "{}TowardZeroArguments, "),
    ("methods/table.py", "RoundToNearest())", "TowardZero(), {}"),
    ("solvers/rounding.py", "import clip, ", "import toward_zero, clip, "),
    (
        "solvers/rounding.py",
        "    PrecisionRecovery.GPTQ:",
        "    PrecisionRecovery.TOWARD_ZERO: toward_zero.round_weight,\n{}",
    ),
)
NUMBER_FORMAT_ROWS = (
    ("numbers/table.py", "from gs_dist.numbers.integer", "from gs_dist.numbers.int6 import INT6\n{}"),
    ("numbers/table.py", "Literal[", '{}"int6", '),
    ("numbers/table.py", '{{"int8": INT8', '{{"int6": INT6, "int8": INT8'),
)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("check", "files", "rows", "heading"),
    [
        ("check_method.py", ("methods/toward_zero.py", "solvers/toward_zero.py"), METHOD_ROWS, "An algorithm"),
        ("check_number_format.py", ("numbers/int6.py",), NUMBER_FORMAT_ROWS, "A number format"),
    ],
    ids=["an algorithm", "a number format"],
)
def test_an_addition_is_taken_up_everywhere_from_its_own_files_and_a_line_in_each_table(
    tmp_path: Path, check: str, files: tuple[str, ...], rows: tuple[tuple[str, str, str], ...], heading: str
) -> None:
    """In a copy of the package recipes, plans, solvers and labels know an addition; the page lists its files."""
    package = tmp_path / "gs_dist"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in files:
        shutil.copy(ADDITIONS / file, package / file)
    for file, found, written in rows:
        text = (package / file).read_text(encoding="utf-8")
        found, written = found.replace("{{", "{"), written.replace("{{", "{").replace("{}", found)
        assert text.count(found) == 1, (file, found)
        (package / file).write_text(text.replace(found, written), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, str(ADDITIONS / check)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "taken up\n"), run.stderr

    page = DOCS.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    touched = {*files, *(file for file, _, _ in rows)}
    listed = [line for line in page.splitlines() if line.startswith("1. ")]
    assert len(listed) == len(touched)
    for file in touched:
        home = f"gs_dist/{file}".replace("toward_zero", "NAME").replace("int6", "NAME")
        assert any(home in line for line in listed), home


def test_every_method_has_a_kernel() -> None:
    """What a recipe may name is what the solvers can do."""
    assert set(suppression._KERNELS) == set(SUPPRESSIONS) == set(OutliersSuppressionType)
    assert set(rounding._KERNELS) == set(ROUNDINGS) == set(PrecisionRecovery)


def _summary(source: Path) -> CalibrationSummary:
    return CalibrationSummary(
        model=source.name,
        formats=("plain",),
        propagation="original",
        num_samples=1,
        num_tokens=8,
        seconds=1.0,
        versions={},
        fingerprints={},
        rows=(),
        stages=(),
    )
