"""One model of one source and one set of samples: what was read is compared, wherever it is read again."""

from __future__ import annotations

import dataclasses
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import (
    inline_group,
    published_hashes,
    run_inline,
    save_samples,
    small_recipe,
)
from workers import InlineWorkerGroup

from gs_dist.checkpoint.check import check, check_all
from gs_dist.checkpoint.finished_model import UNJUDGED, find_models
from gs_dist.checkpoint.header import read_header
from gs_dist.checkpoint.provenance import read_provenance
from gs_dist.checkpoint.run_directory import RunDirectory
from gs_dist.errors import CheckpointError, DatasetError, OutputError, UserError
from gs_dist.progress import SilentProgress
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.results.summary import CalibrationSummary
from gs_dist.runtime.batch_losses import BatchLosses
from gs_dist.runtime.coordinator import quantize
from gs_dist.runtime.evaluation_worker import FLOAT, Evaluation, EvaluationWorker
from gs_dist.runtime.perplexity import perplexity_of
from gs_dist.runtime.stage_worker import Job, StageWorker

NUM_LAYERS = 3
W4 = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def change(path: Path, name: str, by: Callable[[Any], Any] = lambda values: values * 1.5) -> None:
    """Changes a float32 tensor of a safetensors file in place: same names, shapes, size."""
    info = read_header(path, path.name)[0][name]
    data = bytearray(path.read_bytes())
    values = np.frombuffer(data, np.float32, count=int(np.prod(info.shape)), offset=info.offset).copy()
    data[info.offset : info.offset + info.nbytes] = np.asarray(by(values), np.float32).tobytes()
    path.write_bytes(bytes(data))


def flip(path: Path, place: float = 0.9) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(bytes(data))


def unfinish(config: CalibrationConfig, *layers: int) -> None:
    """As a kill leaves an output before these layers were published."""
    for layer in layers:
        (Path(config.output) / f"manifests/layer-{layer:05d}.json").unlink()
        (Path(config.output) / "done").unlink(missing_ok=True)


def run_killed_before_the_merge(config: CalibrationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "merge", killed)
        with pytest.raises(KeyboardInterrupt):
            run_inline(config)


def recipe(directory: Path, output: str = "out", **changes: Any) -> CalibrationConfig:
    return small_recipe(directory, output, num_layers=NUM_LAYERS, **changes)


def run(config: CalibrationConfig, **more: Any) -> tuple[CalibrationSummary, list[str]]:
    heard = Heard()
    return run_inline(config, progress=heard, **more), heard.messages


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished job of each kind in it."""
    directory = tmp_path_factory.mktemp("lineage")
    run_inline(recipe(directory, keep_statistics=True))
    run_inline(recipe(directory, "quantized", propagation="quantized"))
    run_inline(recipe(directory, "auto", bits="auto", size_budget=0.3, ptq=W4))
    return directory


@pytest.fixture
def copied(undisturbed: Path, tmp_path: Path) -> Path:
    shutil.copytree(undisturbed, tmp_path / "copy")
    return tmp_path / "copy"


def assert_as(config: CalibrationConfig, undisturbed: Path) -> None:
    """Done, clean, and with the bytes of the undisturbed run of that name."""
    other = config.model_copy(update={"output": str(undisturbed / Path(config.output).name)})
    assert published_hashes(config) == published_hashes(other)
    assert (Path(config.output) / "done").exists()
    assert all(report.clean for report in check_all(Path(config.output)).values())


@pytest.mark.parametrize(
    ("unfinished", "layer"),
    [((2,), 0), ((2,), 1), ((), 2)],
)
def test_a_model_changed_in_place_between_kill_and_resumption_is_refused(
    copied: Path, unfinished: tuple[int, ...], layer: int
) -> None:
    """Far from what the checkpoint's fingerprint looks at; the message names tensor and layer.

    A finished output stays as it was: the refusal is of the new submission.
    """
    config = recipe(copied)
    unfinish(config, *unfinished)
    change(copied / "model/model.safetensors", f"model.layers.{layer}.mlp.up_proj.weight")
    with pytest.raises(OutputError, match=rf"model differed: model\.layers\.{layer}\.mlp\.up_proj\.weight is not what"):
        run_inline(config)
    assert (copied / "out/done").exists() == (not unfinished)


def test_a_change_of_a_layer_that_is_not_finished_yet_is_noticed_behind_it(copied: Path) -> None:
    """Layer 2 was published and layer 1 was not when layer 1 changed: both exist, and do not belong together."""
    config = recipe(copied)
    unfinish(config, 1)
    change(copied / "model/model.safetensors", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(OutputError, match="layers of two models: layer 2 was observed behind other weights than the"):
        run_inline(config)
    assert not (copied / "out/done").exists()


def test_a_changed_embedding_is_noticed(copied: Path) -> None:
    """It is carried over, and every layer was observed behind it."""
    config = recipe(copied)
    unfinish(config, 2)
    change(copied / "model/model.safetensors", "model.embed_tokens.weight")
    with pytest.raises(OutputError, match="in which the model differed"):
        run_inline(config)


def test_a_model_that_changes_while_it_is_quantized_is_noticed(undisturbed: Path, tmp_path: Path) -> None:
    """Between the pass and the solve."""
    shutil.copytree(undisturbed / "model", tmp_path / "model")
    config = recipe(undisturbed, str(tmp_path / "out")).model_copy(update={"model": str(tmp_path / "model")})

    class Changed(StageWorker):
        def partial_sums(self, layer: int) -> Any:
            raise AssertionError

        def solve(self, layer: int, *others: Any) -> Any:
            change(tmp_path / "model/model.safetensors", "model.layers.0.mlp.up_proj.weight")
            return super().solve(layer, *others)

    def make(job: Job, min_replicas: int) -> InlineWorkerGroup:
        return InlineWorkerGroup(lambda stage, replica: Changed(job, stage, replica), num_stages=1, num_replicas=1)

    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight changed since it was observed"):
        run_inline(config, make)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_node_with_other_samples_publishes_nothing(undisturbed: Path, tmp_path: Path, stages: int) -> None:
    """Neither the stage that reads them nor one behind it publishes a layer; told is the sample, where it is known."""
    spread = {"pipeline_parallel_size": stages, "data_parallel_size": 2, "layers_per_wave": 1}
    config = recipe(undisturbed, str(tmp_path / "out"), parallel=spread)
    other = save_samples(tmp_path / "other.parquet", vocab_size=128, seed=77)
    changed = config.model_copy(update={"calibration": config.calibration.model_copy(update={"data": (str(other),)})})

    def make(job: Job, min_replicas: int) -> InlineWorkerGroup:
        def worker(stage: int, replica: int) -> StageWorker:
            return StageWorker(dataclasses.replace(job, config=changed) if replica else job, stage, replica)

        return InlineWorkerGroup(worker, num_stages=stages, num_replicas=2)

    with pytest.raises(DatasetError, match=r"the samples that replica 0 .*, replica 1 .* fed are not those that were"):
        run_inline(config, make)
    assert published_hashes(config) == {}
    with pytest.raises(DatasetError, match=r"stage 0 of replica 1 .* has other samples than the coordinator"):
        run_inline(config, make, with_samples=True)
    rows = pq.read_table(config.calibration.data[0])
    pq.write_table(pa.concat_tables([rows.slice(0, 1), pq.read_table(other).slice(1)]), other)
    with pytest.raises(DatasetError, match=r"sample 10 of other\.parquet is another one for replica 1 "):
        run_inline(config, make, with_samples=True)


def test_samples_that_are_replaced_after_they_were_fingerprinted_are_noticed(undisturbed: Path, tmp_path: Path) -> None:
    """By a single worker as well."""
    path = save_samples(tmp_path / "samples.parquet", vocab_size=128)
    config = recipe(undisturbed, str(tmp_path / "out"), calibration={"data": str(path)})

    def make(job: Job, min_replicas: int) -> InlineWorkerGroup:
        save_samples(path, vocab_size=128, seed=5)
        return inline_group(job, min_replicas)

    with pytest.raises(DatasetError, match="are not those that were fingerprinted"):
        run_inline(config, make)
    assert published_hashes(config) == {}


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_solved_layer_that_was_changed_is_solved_again(
    undisturbed: Path, tmp_path: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later layers see the quantised ones as they were solved, or these are solved again; and it is said."""
    config = recipe(undisturbed, str(tmp_path / "quantized"), propagation="quantized")
    run_killed_before_the_merge(config, monkeypatch)
    unfinish(config, 2)
    damage(tmp_path / "quantized/solved/layer-00001.safetensors")
    _, told = run(config)
    assert_as(config, undisturbed)
    assert any(text.startswith("layer 1 is done again: layer 2 is to see what") for text in told)


def test_a_solved_layer_of_another_run_is_not_gone_on_from(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole as it is, it is not the one that the manifest tells of."""
    config = recipe(undisturbed, str(tmp_path / "quantized"), propagation="quantized")
    other = recipe(undisturbed, str(tmp_path / "other"), propagation="quantized", ptq={"weight_quant_dtype": "int8"})
    for each in (config, other):
        run_killed_before_the_merge(each, monkeypatch)
    unfinish(config, 2)
    shutil.copy(tmp_path / "other/solved/layer-00000.safetensors", tmp_path / "quantized/solved")
    run_inline(config)
    assert_as(config, undisturbed)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_damaged_shard_of_a_finished_job_is_mended(copied: Path, undisturbed: Path, stages: int) -> None:
    """Under quantised propagation the layers before it are done again as well; all to the same bytes."""
    config = recipe(copied, "quantized", propagation="quantized", parallel={"pipeline_parallel_size": stages})
    flip(copied / "quantized/compressed-tensors/layer-00001.safetensors")
    _, told = run(config)
    assert_as(config, undisturbed)
    assert any("its content changed since it was written" in text and "layer 1 is done again" in text for text in told)


@pytest.mark.parametrize("layer", [0, NUM_LAYERS - 1])
def test_chosen_bits_are_mended_whichever_stage_has_nothing_to_do(copied: Path, undisturbed: Path, layer: int) -> None:
    """Stages without work have their share of idle time, and the rest comes out as it was."""
    config = recipe(copied, "auto", bits="auto", size_budget=0.3, ptq=W4, parallel={"pipeline_parallel_size": 2})
    unfinish(config, layer)
    summary, _ = run(config)
    assert_as(config, undisturbed)
    assert all(0 <= stage.idle_share <= 1 for stage in summary.stages)


def test_a_damaged_manifest_is_no_manifest(copied: Path, undisturbed: Path) -> None:
    """Its layer is done again, and it is said."""
    config = recipe(copied)
    path = copied / "out/manifests/layer-00001.json"
    path.write_text(path.read_text().replace('"num_tokens": 640', '"num_tokens": 641'))
    _, told = run(config)
    assert_as(config, undisturbed)
    assert (
        "manifests/layer-00001.json: does not hold what was written to it, by its checksum: layer 1 is done again"
        in (told)
    )


def test_statistics_damaged_between_judging_and_solving_are_taken_again(undisturbed: Path, tmp_path: Path) -> None:
    """The layer is observed and judged a second time, and the choice is the same."""
    config = recipe(undisturbed, str(tmp_path / "auto"), bits="auto", size_budget=0.3, ptq=W4)
    damaged: list[Path] = []

    def make(job: Job, min_replicas: int) -> InlineWorkerGroup:
        if job.statistics_from is not None and not damaged:
            damaged.append(tmp_path / "auto/statistics/layer-00001.safetensors")
            flip(damaged[0])
        return inline_group(job, min_replicas)

    _, told = run(config, make_group=make)
    assert_as(config, undisturbed)
    assert any("statistics/layer-00001.safetensors" in text and "it is made again" in text for text in told)


def test_damaged_costs_are_found_out_again(copied: Path, undisturbed: Path) -> None:
    """They decide the bits of every layer."""
    config = recipe(copied, "auto", bits="auto", size_budget=0.3, ptq=W4)
    unfinish(config, 2)
    path = copied / "auto/sensitivity/layer-00000.json"
    path.write_text(path.read_text().replace('"error": ', '"error": 1', 1))
    _, told = run(config)
    assert_as(config, undisturbed)
    assert any(text.endswith("layer 0 is judged again") for text in told)


def test_kept_statistics_of_a_model_that_changed_since_are_refused(copied: Path) -> None:
    """By the tensor that changed, whatever the fingerprint of the checkpoint says; damaged ones are refused by file."""
    config = recipe(copied, "second", ptq={"weight_quant_dtype": "int8"})
    flip(copied / "out/statistics/layer-00002.safetensors")
    with pytest.raises(OutputError, match=r"statistics/layer-00002\.safetensors: does not hold what was written"):
        run_inline(config, statistics_from=str(copied / "out"))
    assert (copied / "out/statistics/layer-00002.safetensors").exists()
    change(copied / "model/model.safetensors", "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(OutputError, match=r"of another model: model\.layers\.0\.mlp\.up_proj\.weight changed since"):
        run_inline(recipe(copied, "third", ptq={"weight_quant_dtype": "int8"}), statistics_from=str(copied / "out"))


def test_hidden_states_that_come_back_changed_are_lost_like_a_worker(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of temporary files gave something else: the attempt is made again, and the message names the place."""
    from gs_dist.calibration.activation_store import ActivationStore

    config = recipe(undisturbed, str(tmp_path / "out"), parallel={"layers_per_wave": 1}, keep_statistics=True)
    put, faults = ActivationStore.put, iter([True])

    def faulty(self: ActivationStore, index: int, array: Any) -> None:
        put(self, index, array)
        if next(faults, False):
            checksum = self._checksums[index]
            put(self, index, array + 1)
            self._checksums[index] = checksum

    monkeypatch.setattr(ActivationStore, "put", faulty)
    _, told = run(config)
    assert_as(config, undisturbed)
    assert any("hidden states of micro-batch 0 are not what was kept" in text for text in told)


def test_a_job_killed_between_merge_and_verdict_looks_like_no_model(
    copied: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for loaders, which find no config, nor for `check`; submitted again it is done."""
    config = recipe(copied)

    def killed(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "finish", killed)
        patch.setattr(RunDirectory, "withdraw", lambda self: None)  # a killed process does nothing more
        with pytest.raises(KeyboardInterrupt):
            run_inline(config)
    assert not list((copied / "out").glob("*/config.json"))
    with pytest.raises(UserError, match="is unfinished"):
        check_all(copied / "out")
    with pytest.raises(CheckpointError, match=r"is unfinished .* no finished model"):
        find_models(copied / "out")
    with pytest.raises(UserError, match="is unfinished"):
        check(copied / "out" / "compressed-tensors")
    (told,) = check(copied / "out" / UNJUDGED / "compressed-tensors").problems
    assert (told.rule, told.found[:24]) == ("job-finished", "the job is unfinished (i")
    run_inline(config)
    assert_as(config, undisturbed)
    (copied / "out" / "done").unlink()  # as of a job that was killed before its last word
    assert "the job is unfinished" in check(copied / "out", "vllm").render()
    assert not list((copied / "out").glob(".gs-dist-*"))


def test_a_float_model_that_is_another_is_not_compared_with(copied: Path) -> None:
    """Each of its layers is held against what the published model was made from, as it is loaded."""
    config = recipe(copied)
    told = read_provenance(copied / "out/compressed-tensors")
    assert told is not None
    assert set(told.sources) >= {"layer-00000", "layer-00002", "model.embed_tokens.weight", "model.norm.weight"}
    evaluation = Evaluation(
        model=config.model,
        published={},
        data=config.calibration,
        stages=(((0, NUM_LAYERS),),),
        max_in_flight=2,
        sources=told.sources,
    )
    EvaluationWorker(evaluation, 0, 0).begin(FLOAT, 0)
    change(copied / "model/model.safetensors", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"layer 1 of the float model .* is not what the published model was"):
        EvaluationWorker(evaluation, 0, 0).begin(FLOAT, 0)
    change(copied / "model/model.safetensors", "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of the float model"):
        EvaluationWorker(evaluation, 0, 0).begin(FLOAT, 0)


def test_there_is_no_perplexity_over_no_tokens() -> None:
    """It would be 1, the best there is, and pass every limit."""

    class Model:
        name = "the float model"

        def losses(self, num_micro_batches: int, progress: Any) -> list[BatchLosses]:
            return [BatchLosses(losses=(0.0,), tokens=(0,))] * num_micro_batches

    with pytest.raises(DatasetError, match="the float model predicts nothing on these samples"):
        perplexity_of(Model(), 3, SilentProgress())  # type: ignore[arg-type]  # stands in for one


@pytest.mark.parametrize("stages", [1, 2])
def test_a_worker_that_sees_another_output_is_told_of_before_anything_runs(
    undisturbed: Path, tmp_path: Path, stages: int
) -> None:
    """By worker, node and path; no layer is observed, and nothing is left in the output."""
    config = recipe(undisturbed, str(tmp_path / "out"), parallel={"pipeline_parallel_size": stages})
    elsewhere = config.model_copy(update={"output": str(tmp_path / "own disk")})
    groups: list[InlineWorkerGroup] = []

    def make(job: Job, min_replicas: int) -> InlineWorkerGroup:
        def worker(stage: int, replica: int) -> StageWorker:
            last = stage == stages - 1
            return StageWorker(dataclasses.replace(job, config=elsewhere) if last else job, stage, replica)

        groups.append(InlineWorkerGroup(worker, num_stages=stages, num_replicas=1))
        return groups[-1]

    with pytest.raises(OutputError, match=rf"stage {stages - 1} of replica 0 .node .*does not see .*/out': .* share"):
        run_inline(config, make)
    assert {method for _, method in groups[0].calls} == {"software", "source", "sight"}
    assert not list((tmp_path / "out").glob(".gs-dist-*"))


def test_a_worker_with_other_samples_or_none_is_told_of_before_anything_runs(undisturbed: Path, tmp_path: Path) -> None:
    """With its node."""
    config = recipe(undisturbed, str(tmp_path / "out"))
    for data, says in (
        (save_samples(tmp_path / "samples.parquet", 128, seed=3), r"stage 0 of replica 0 .* has other samples"),
        (tmp_path / "missing.parquet", rf"node {re.escape(platform.node())}: .*missing\.parquet"),
    ):
        calibration = config.calibration.model_copy(update={"data": (str(data),)})
        changed = config.model_copy(update={"calibration": calibration})

        def make(job: Job, min_replicas: int, changed: CalibrationConfig = changed) -> InlineWorkerGroup:
            def worker(stage: int, replica: int) -> StageWorker:
                return StageWorker(dataclasses.replace(job, config=changed), stage, replica)

            return InlineWorkerGroup(worker, num_stages=1, num_replicas=1)

        with pytest.raises(DatasetError, match=says):
            run_inline(config, make, with_samples=True)


def test_an_output_in_rays_copy_of_the_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go with the pod; told before a sample is read."""
    inside = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    inside.mkdir(parents=True)
    config = recipe(tmp_path).model_copy(update={"output": "out"})
    monkeypatch.chdir(inside)
    with pytest.raises(OutputError, match=r"copy of the working directory that Ray makes .* absolute path"):
        quantize(config, progress=SilentProgress())
    assert not list(inside.iterdir())
