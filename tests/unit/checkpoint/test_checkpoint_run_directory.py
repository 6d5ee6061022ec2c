"""The output of a job: who may write to it, and what it may be gone on with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from quantized_layers import LINEARS, quantize

from gs_dist.checkpoint.finished_model import find_models
from gs_dist.checkpoint.lineage import Lineage
from gs_dist.checkpoint.manifest import Fingerprints, MadeWith, publish_layer
from gs_dist.checkpoint.output_lock import locked
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import RunDirectory
from gs_dist.checkpoint.run_record import read_record, recipe_differences
from gs_dist.errors import CheckpointError, OutputError
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.policy import QuantPolicy

PRINTS = Fingerprints(recipe="aa", source="bb", data="cc")
SOFTWARE = MadeWith(versions={"gs-dist": "0.1.0", "numpy": "1.26.4"}, kernel="x86_64 Haswell")
DIALECTS = ("compressed-tensors",)

LINEAGE = Lineage(behind="", tensors=dict.fromkeys(("a", "b"), "0"))


def fields(**changes: Any) -> dict[str, Any]:
    """What of a recipe decides the bytes."""
    content: dict[str, Any] = {
        "model": "m",
        "output": "o",
        "calibration": {"data": "c.parquet"},
        "ptq": {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64},
        "layer_policies": {".*o_proj": {"weight_quant_dtype": "int8"}},
    }
    return CalibrationConfig.model_validate({**content, **changes}).fingerprint_fields()


def run(path: Path, **changes: Any) -> RunDirectory:
    settings: dict[str, Any] = {"fingerprints": PRINTS, "recipe": fields(), "made_with": SOFTWARE}
    return RunDirectory(path, dialects=DIALECTS, **{**settings, **changes})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An interrupted run: one of two layers is published."""
    path = tmp_path / "out"
    path.mkdir()
    assert run(path).prepare(2) == {}
    reader = CheckpointReader(tiny_checkpoint(tmp_path / "m"))
    layer = quantize(reader, 0, dict.fromkeys(LINEARS, QuantPolicy()))
    publish_layer(path, layer, reader.architecture, DIALECTS, PRINTS, SOFTWARE, LINEAGE)
    return path


def refusal(directory: RunDirectory) -> str:
    with pytest.raises(OutputError) as error:
        directory.refuse_other_run()
    with pytest.raises(OutputError) as again:
        directory.prepare(2)
    assert str(again.value) == str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source": "x"}, "a run in which the model differed: restore"),
        ({"source": "x", "data": "x"}, "the model and the calibration data differed: restore"),
    ],
)
def test_another_run_is_refused_by_what_differs(changed: dict[str, str], message: str, output: Path) -> None:
    """A layer of another model or other data is not taken for this run's; output and what differs are named."""
    assert set(run(output).prepare(2)) == {0}
    text = refusal(run(output, fingerprints=dataclasses.replace(PRINTS, **changed)))
    assert text.startswith(f"output {str(output)!r} holds ")
    assert message in text


def test_another_recipe_is_refused_by_its_keys(output: Path) -> None:
    """Each key that differs with both values, though the run never finished; a refused recipe leaves no trace."""
    other = fields(
        ptq={"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 128},
        format="ascend",
    )
    (output / "done").touch()
    text = refusal(run(output, fingerprints=dataclasses.replace(PRINTS, recipe="x"), recipe=other))
    assert text == (
        f'output {str(output)!r} holds a run in which the recipe differed (format: was ["compressed-tensors"], is '
        '["ascend"]; ptq.group_size: was 64, is 128): restore what it was, or set output to another directory'
    )
    assert (output / "done").exists()
    record = read_record(output)
    assert record is not None
    assert (record.num_layers, record.fingerprints) == (2, PRINTS)
    (output / "manifests" / "run.json").unlink()
    assert "the recipe differed: restore" in refusal(
        run(output, fingerprints=dataclasses.replace(PRINTS, recipe="x"), recipe=other)
    )


def test_differences_are_spelt_as_a_recipe_spells_them() -> None:
    """Policies by pattern, the blacklist under ptq, what was not set, and not too many of them."""
    stored = json.loads(json.dumps(fields()))
    assert recipe_differences(stored, fields()) == []
    changed = fields(layer_policies={".*o_proj": None, ".*up_proj": {"group_size": 128}})
    assert recipe_differences(stored, changed) == [
        "layer_policies.'.*o_proj': was set, is null",
        "layer_policies.'.*up_proj': was not set, is set",
    ]
    four_bits = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}
    blacklist = fields(ptq={**four_bits, "opname_blacklist": ["lm_head"]})
    assert recipe_differences(stored, blacklist) == ['ptq.opname_blacklist: was [], is ["lm_head"]']
    before = {f"key{n}": n for n in range(9)}
    assert recipe_differences(before, {})[5:] == ["key5: was 5, is not set", "and 3 more"]


def test_layers_of_two_versions_are_not_mixed(output: Path) -> None:
    """Another version of anything that decides the bytes is refused with what differs; another CPU kernel is not."""
    newer = MadeWith(versions={"gs-dist": "0.2.0", "numpy": "1.26.4"}, kernel=SOFTWARE.kernel)
    assert refusal(run(output, made_with=newer)) == (
        f"output {str(output)!r} holds layer 0 made with other software (gs-dist was 0.1.0, is 0.2.0), and one model "
        "of two versions would be of neither: install what it was made with to go on, or set output to another "
        "directory"
    )
    assert set(run(output, made_with=dataclasses.replace(SOFTWARE, kernel="x86_64 Zen")).prepare(2)) == {0}


def test_layers_are_not_solved_from_what_another_version_judged(output: Path) -> None:
    """Before any layer is published, statistics and costs are of the software that the run started with."""
    newer = MadeWith(versions={"gs-dist": "0.2.0", "numpy": "1.26.4"}, kernel=SOFTWARE.kernel)
    (output / "manifests" / "layer-00000.json").unlink()
    run(output).refuse_other_run()
    (output / "sensitivity").mkdir()
    (output / "sensitivity" / "layer-00000.json").touch()
    assert "holds what layers were judged on made with other software (gs-dist was" in refusal(
        run(output, made_with=newer)
    )


def test_an_output_is_locked_and_an_empty_one_goes_again(tmp_path: Path) -> None:
    """A second job is refused while a first one holds it, before anything else is known of either."""
    path = tmp_path / "new" / "out"
    with locked(path):
        with pytest.raises(OutputError, match=r"new/out' is in use by another job"), locked(path):
            pass
        assert path.is_dir()
    assert not path.exists()
    with locked(path):
        (path / "manifests").mkdir()
    assert (path / ".lock").exists()
    with locked(path):
        pass
    (path / "holiday.jpg").touch()
    with pytest.raises(OutputError, match=r"'holiday\.jpg', which is not of a job"), locked(path):
        pass


def test_a_directory_without_model_is_no_model(tmp_path: Path) -> None:
    """The message says what to give."""
    with pytest.raises(CheckpointError, match="holds no finished model: give the output of a job"):
        find_models(tmp_path)
