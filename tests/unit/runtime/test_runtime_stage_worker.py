from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import inline_group, published_hashes, run_inline, small_recipe
from workers import InlineWorkerGroup

from gs_dist.checkpoint.kept_statistics import read_statistics
from gs_dist.errors import LayerError, OutputError, WorkerLostError
from gs_dist.runtime.stage_worker import Job, StageWorker
from gs_dist.runtime.workers import WorkerKey

LAYOUTS = [(2, 1, "auto"), (3, 1, "auto"), (1, 2, "auto"), (2, 2, "auto"), (2, 3, 1), (1, 1, 1), (1, 1, 4)]


def _layout(pp: int, dp: int, wave: int | str) -> dict[str, int | str]:
    return {"pipeline_parallel_size": pp, "data_parallel_size": dp, "layers_per_wave": wave}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    config = small_recipe(directory)
    run_inline(config)
    return directory, published_hashes(config)


@pytest.mark.parametrize(("pp", "dp", "wave"), LAYOUTS)
def test_published_bytes_do_not_depend_on_stages_replicas_and_waves(
    undisturbed: tuple[Path, dict[str, str]], pp: int, dp: int, wave: int | str
) -> None:
    """Every layout publishes the bytes of one worker with one wave."""
    directory, expected = undisturbed
    config = small_recipe(directory, f"out-{pp}-{dp}-{wave}", parallel=_layout(pp, dp, wave))
    summary = run_inline(config)
    assert published_hashes(config) == expected
    assert len(expected) == 7, "six layers and the outer tensors"
    assert {row.num_tokens for row in summary.rows if row.name != "lm_head"} == {20 * 32}
    assert len(summary.stages) == pp * dp


def test_published_bytes_do_not_depend_on_micro_batches_in_flight(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """One micro-batch at a time gives what many in flight give."""
    directory, expected = undisturbed
    config = small_recipe(directory, "out-flight", parallel={**_layout(2, 1, "auto"), "max_in_flight": 1})
    run_inline(config)
    assert published_hashes(config) == expected


def test_quantized_propagation_gives_the_same_bytes_on_any_layout_and_after_a_loss(tmp_path: Path) -> None:
    """With quantised propagation, too, bytes do not depend on the layout, nor on a loss on the way."""
    config = small_recipe(tmp_path, num_layers=4, propagation="quantized")
    run_inline(config)
    expected = published_hashes(config)
    original = small_recipe(tmp_path, "out-original")
    run_inline(original)
    assert published_hashes(original) != expected, "it makes a difference"

    config = small_recipe(tmp_path, "out-2-2", propagation="quantized", parallel=_layout(2, 2, "auto"))
    losses = iter([True])

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        solves: list[WorkerKey] = []

        def loses(key: WorkerKey, method: str) -> bool:
            solves.extend([key] if method == "solve" else [])
            return len(solves) == 3 and next(losses, False)

        return InlineWorkerGroup(partial(StageWorker, job), num_stages=2, num_replicas=2, loses_worker_at=loses)

    run_inline(config, make_group)
    assert next(losses, None) is None, "a worker was lost"
    assert published_hashes(config) == expected
    assert not (Path(config.output) / "solved").exists()


def test_a_lost_worker_costs_only_unfinished_layers(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """After a worker is lost, finished layers are not solved again, and the bytes are the undisturbed ones."""
    directory, expected = undisturbed
    config = small_recipe(directory, "out-lost", parallel=_layout(2, 2, 1))
    groups: list[InlineWorkerGroup] = []

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        first = not groups
        solved: list[str] = []

        def loses(key: WorkerKey, method: str) -> bool:
            solved.extend(["solve"] if method == "solve" else [])
            return first and len(solved) > 2

        group = InlineWorkerGroup(partial(StageWorker, job), num_stages=2, num_replicas=2, loses_worker_at=loses)
        groups.append(group)
        return group

    run_inline(config, make_group)
    assert published_hashes(config) == expected
    assert len(groups) == 2
    solves = [sum(method == "solve" for _, method in group.calls) for group in groups]
    assert solves[1] < 6, "layers finished before the loss were kept"


def test_a_job_that_keeps_losing_workers_ends_and_says_what_was_kept(
    undisturbed: tuple[Path, dict[str, str]],
) -> None:
    """Losses without progress between them end the job after max_restarts attempts, with no `done`."""
    directory, _ = undisturbed
    config = small_recipe(directory, "out-hopeless", parallel={"max_restarts": 1})
    attempts = []

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        attempts.append(1)
        return InlineWorkerGroup(
            partial(StageWorker, job),
            num_stages=1,
            num_replicas=1,
            loses_worker_at=lambda key, method: method == "step",
        )

    with pytest.raises(
        WorkerLostError,
        match=r"2 attempts in a row .* 0 of 6 layers .*memory_per_worker to less",
    ):
        run_inline(config, make_group)
    assert len(attempts) == 2
    assert not (Path(config.output) / "done").exists()


def test_fewer_replicas_than_asked_give_the_same_bytes(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """Where the cluster has room for fewer replicas, their samples are dealt to those there are."""
    directory, expected = undisturbed
    config = small_recipe(directory, "out-fewer", parallel={"data_parallel_size": 4})

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        assert min_replicas == 1
        return InlineWorkerGroup(partial(StageWorker, job), num_stages=1, num_replicas=3)

    run_inline(config, make_group)
    assert published_hashes(config) == expected


def test_submitting_again_does_nothing_that_was_done(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """A finished run submitted again makes no workers and leaves its shards alone."""
    directory, expected = undisturbed
    config = small_recipe(directory)
    before = {p.name: p.stat().st_mtime_ns for p in (directory / "out" / "compressed-tensors").glob("*.safetensors")}

    def no_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        raise AssertionError("no worker is needed")

    run_inline(config, no_group)
    after = {p.name: p.stat().st_mtime_ns for p in (directory / "out" / "compressed-tensors").glob("*.safetensors")}
    assert before == after
    assert published_hashes(config) == expected


def test_a_changed_shard_is_done_again(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """A shard whose bytes changed since its manifest was written is noticed, and its layer observed again."""
    directory, expected = undisturbed
    config = small_recipe(directory, "out-changed")
    run_inline(config)
    shard = Path(config.output) / "compressed-tensors" / "layer-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    groups = []

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        groups.append(inline_group(job, min_replicas))
        return groups[-1]

    run_inline(config, make_group)
    assert [method for _, method in groups[0].calls].count("solve") == 1
    assert published_hashes(config) == expected


def test_another_recipe_in_the_same_output_is_refused(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """An output that holds a run of another recipe is refused, says what differs, and stays as it was."""
    directory, expected = undisturbed
    other = small_recipe(directory, ptq={"weight_quant_dtype": "int8"})
    with pytest.raises(OutputError, match="the recipe differed"):
        run_inline(other)
    assert published_hashes(other) == expected


def test_an_output_with_foreign_files_is_refused(tmp_path: Path) -> None:
    """A directory that holds something else is not written to."""
    config = small_recipe(tmp_path, num_layers=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        run_inline(config)


def test_kept_statistics_are_those_that_were_solved(tmp_path: Path) -> None:
    """With keep_statistics each layer's merged statistics are on disk, with every token counted."""
    config = small_recipe(tmp_path, num_layers=2, keep_statistics=True, parallel=_layout(1, 2, "auto"))
    run_inline(config)
    statistics = read_statistics(Path(config.output), 1)
    assert set(statistics) == {
        "attention_input",
        "attention_output",
        "mlp_input",
        "mlp_activation",
        "key",
        "value",
    }
    seen = statistics["mlp_activation"]
    assert seen.num_tokens == 20 * 32
    np.testing.assert_allclose(np.diag(seen.gram), seen.sum_squares, rtol=1e-5)


SECOND_RECIPES = [
    {"weight_quant_dtype": "int8", "act_quant_dtype": "int8", "act_quant_granularity": "per_token"},
    {
        "weight_quant_dtype": "qint4x2",
        "weight_quant_granularity": "per_group",
        "group_size": 64,
        "outliers_suppression": "awq",
        "precision_recovery": "gptq",
    },
    {"weight_quant_dtype": "int8", "act_quant_dtype": "int8", "act_range": "mse"},
]


@pytest.mark.parametrize("second", SECOND_RECIPES, ids=["dynamic", "awq-gptq", "static-mse"])
@pytest.mark.parametrize("dp", [1, 2])
def test_solving_from_kept_statistics_gives_the_bytes_of_a_full_run(
    tmp_path: Path, dp: int, second: dict[str, Any]
) -> None:
    """A second recipe solved from kept statistics runs no micro-batch and publishes what a full run of it would."""
    # Sketches of every input; GPTQ solves with the matrices that gram: on keeps.
    taken: dict[str, Any] = {"gram": "on"} if "precision_recovery" in second else {"sketch_rows": 16}
    kept = small_recipe(tmp_path, num_layers=3, keep_statistics=True, **taken)
    run_inline(kept)
    full = small_recipe(tmp_path, "out-full", ptq=second, **taken)
    run_inline(full)
    resolved = small_recipe(tmp_path, "out-resolved", ptq=second, parallel={"data_parallel_size": dp}, **taken)
    groups = []

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        groups.append(inline_group(job, min_replicas))
        return groups[-1]

    run_inline(resolved, make_group, statistics_from=kept.output)
    assert published_hashes(resolved) == published_hashes(full)
    assert not any(method == "step" for _, method in groups[0].calls)


def test_statistics_that_lack_what_a_recipe_solves_from_are_refused(tmp_path: Path) -> None:
    """GPTQ needs a matrix that a job without it does not keep, and sketches of another size are other statistics."""
    kept = small_recipe(tmp_path, num_layers=2, keep_statistics=True, sketch_rows=16)
    run_inline(kept)
    by_gptq = small_recipe(tmp_path, "out-gptq", ptq=SECOND_RECIPES[1], sketch_rows=16)
    with pytest.raises(OutputError, match=r"lack blended_gram of layer 0's attention_input, .* gram, sketch_rows or"):
        run_inline(by_gptq, statistics_from=kept.output)
    finer = small_recipe(tmp_path, "out-finer", ptq=SECOND_RECIPES[0], sketch_rows=32)
    with pytest.raises(OutputError, match="lack sketch_rows: 32 of"):
        run_inline(finer, statistics_from=kept.output)


def test_not_a_number_in_the_weights_is_named(tmp_path: Path) -> None:
    """A checkpoint whose weights hold NaN ends the job with the layer's name, and nothing looks finished."""
    config = small_recipe(tmp_path, num_layers=3)
    _poison(Path(config.model) / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises((LayerError, ValueError), match=r"layers\.1|layer 1"):
        run_inline(config)
    assert not (tmp_path / "out" / "done").exists()


def _poison(path: Path, name: str) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + begin : 8 + length + begin + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(bytes(data))
