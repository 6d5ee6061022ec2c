"""What a job says of itself when it goes on with an earlier one, or finds nothing left to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from runs import published_hashes, run_inline, small_recipe
from workers import InlineWorkerGroup

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.kept_statistics import read_origin
from gs_dist.errors import DamagedError, JobFailure, OutputError, WorkerLostError
from gs_dist.progress import SilentProgress
from gs_dist.recipe.config import read_published_recipe
from gs_dist.results.summary import read_summary
from gs_dist.runtime.software import Software
from gs_dist.runtime.stage_worker import Job, StageWorker

NUM_LAYERS = 2
KERNEL = Software.here().kernel


def no_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
    raise AssertionError("nothing was left to do")


class _EndsEarly(StageWorker):
    """Is lost after its first layer."""

    def solve(self, layer, *others):  # type: ignore[no-untyped-def]  # as the worker's
        if layer:
            raise WorkerLostError("gone")
        return super().solve(layer, *others)


def _one_layer(job: Job, min_replicas: int) -> InlineWorkerGroup:
    return InlineWorkerGroup(lambda stage, replica: _EndsEarly(job, stage, replica), num_stages=1, num_replicas=1)


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A run of which one layer is published."""
    with pytest.raises(WorkerLostError):
        run_inline(small_recipe(tmp_path, num_layers=NUM_LAYERS, parallel={"max_restarts": 0}), make_group=_one_layer)
    assert [path.name for path in (tmp_path / "out" / "manifests").glob("layer-*")] == ["layer-00000.json"]
    return tmp_path


def _as_if(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """From now on this process runs on other software."""
    here = replace(Software.here(), **changes)  # type: ignore[arg-type]  # passed on as they come
    monkeypatch.setattr(Software, "here", classmethod(lambda cls: here))


def test_a_run_is_not_gone_on_with_by_another_version(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with both versions; nothing is published, and the version that began it may go on."""
    config = small_recipe(interrupted)
    with monkeypatch.context() as other:
        _as_if(other, versions={**Software.here().versions, "gs-dist": "9.9.9"})
        with pytest.raises(OutputError, match=r"holds layer 0 made with other software \(gs-dist was .*, is 9\.9\.9\)"):
            run_inline(config)
    assert not list((interrupted / "out" / "compressed-tensors").glob("layer-00001*"))
    run_inline(config)
    whole = small_recipe(interrupted, "whole")
    run_inline(whole)
    assert published_hashes(whole) == published_hashes(config)


def test_layers_of_two_cpu_kernels_are_told_of(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the summary, on the card and in provenance.json, with which layer is of which."""
    _as_if(monkeypatch, kernel="x86_64 Zen")
    config = small_recipe(interrupted)
    summary = run_inline(config)
    (note,) = summary.notes
    assert f"layers 0 on {KERNEL}, layers 1 on x86_64 Zen" in note
    model = interrupted / "out" / "compressed-tensors"
    assert note in (model / "README.md").read_text()
    made_with = json.loads((model / "provenance.json").read_text())["made_with"]
    assert [(entry["kernel"], entry["parts"]) for entry in made_with] == [
        (KERNEL, ["layer-00000", "outer"]),  # carried over while the workers of the first run started
        ("x86_64 Zen", ["layer-00001"]),
    ]
    assert set(made_with[0]["versions"]) == {"gs-dist", "mindspore", "numpy", "scipy"}


def test_where_nothing_was_left_to_do_the_recipe_stays(tmp_path: Path) -> None:
    """Another spread publishes nothing: recipe.yaml and the card tell of the run that did the work."""
    config = small_recipe(tmp_path, num_layers=NUM_LAYERS)
    run_inline(config)
    output = tmp_path / "out"
    card = output / "compressed-tensors" / "README.md"
    before = ((output / "recipe.yaml").read_bytes(), card.read_bytes())
    again = small_recipe(tmp_path, parallel={"pipeline_parallel_size": 2})
    run_inline(again, make_group=no_group)
    assert ((output / "recipe.yaml").read_bytes(), card.read_bytes()) == before
    limited = small_recipe(tmp_path, parallel={"pipeline_parallel_size": 2}, max_perplexity_increase=0.5)
    run_inline(limited, make_group=no_group)
    recipe = read_published_recipe(output / "recipe.yaml")
    assert (recipe.parallel.pipeline_parallel_size, recipe.max_perplexity_increase) == (1, 0.5)


def test_what_a_run_said_of_itself_is_not_believed_once_it_was_changed(tmp_path: Path) -> None:
    """A figure in summary.json, a value in recipe.yaml: the user is told, and both are written anew."""
    config = small_recipe(tmp_path, num_layers=NUM_LAYERS)
    first = run_inline(config)
    output = tmp_path / "out"
    assert first.seconds > 0
    for name, was, becomes in (("summary.json", '"seconds": ', '"seconds": 1'), ("recipe.yaml", "seed: ", "seed: 1")):
        path = output / name
        assert was in path.read_text()
        path.write_text(path.read_text().replace(was, becomes))
    with pytest.raises(DamagedError, match=r"recipe\.yaml: does not hold what was written"):
        read_published_recipe(output / "recipe.yaml")
    messages: list[str] = []
    progress = SilentProgress()
    progress.message = messages.append  # type: ignore[method-assign]  # all that is of interest
    run_inline(config, make_group=no_group, progress=progress)
    told = [text for text in messages if "does not hold what was written" in text]
    assert [text.split(":")[0] for text in told] == ["summary.json", "recipe.yaml"]
    assert "who did the work" in told[0]
    assert "the recipe as it is now stands in its place" in told[1]
    assert read_summary(output).rows == first.rows
    read_published_recipe(output / "recipe.yaml")
    assert check(output).clean


def test_costs_that_are_gone_are_missed(tmp_path: Path) -> None:
    """A finished layer is not judged again: the summary says of which layers nobody knows what schemes cost."""
    config = small_recipe(tmp_path, num_layers=NUM_LAYERS, ptq={"weight_quant_dtype": "int8"}, sensitivity=True)
    assert not run_inline(config).notes
    (tmp_path / "out" / "sensitivity" / "layer-00001.json").write_text("{}")
    (tmp_path / "out" / "summary.json").unlink()
    (note,) = run_inline(config, make_group=no_group).notes
    assert "not known of layer 1: sensitivity/layer-00001.json is gone or was changed" in note


def test_a_probe_that_fails_takes_back_what_an_earlier_one_found(tmp_path: Path) -> None:
    """Neither summary nor card tells of the probe before; the next one that passes is told of."""
    config = small_recipe(tmp_path, num_layers=NUM_LAYERS, max_perplexity_increase=0.5)
    output = tmp_path / "out"
    card = output / "compressed-tensors" / "README.md"
    found = run_inline(config).probes
    assert found
    assert "Before it was published" in card.read_text()
    with pytest.raises(JobFailure, match="max_perplexity_increase"):
        run_inline(small_recipe(tmp_path, max_perplexity_increase=0.0), make_group=no_group)
    assert read_summary(output).probes == ()
    assert card.read_text().startswith("# Not a model: the job was refused")
    assert "Before it was published" not in card.read_text()
    assert run_inline(config, make_group=no_group).probes == found
    assert "Before it was published" in card.read_text()


def test_statistics_that_are_not_there_are_not_promised(tmp_path: Path) -> None:
    """Asked for after the layers were published, they are not declared as kept."""
    run_inline(small_recipe(tmp_path, num_layers=NUM_LAYERS))
    run_inline(small_recipe(tmp_path, keep_statistics=True), make_group=no_group)
    with pytest.raises(OutputError, match="holds no kept statistics"):
        read_origin(tmp_path / "out")
    run_inline(small_recipe(tmp_path, "kept", keep_statistics=True))
    assert read_origin(tmp_path / "kept").versions == Software.here().made_with.versions
