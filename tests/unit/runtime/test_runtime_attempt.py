"""Attempts that end so that more replicas can join."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from runs import fingerprints_of, inline_evaluation_group, plan_of, published_hashes, run_inline, small_recipe
from workers import InlineWorkerGroup

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.progress import SilentProgress
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.results.summary import CalibrationSummary
from gs_dist.runtime import attempt
from gs_dist.runtime.job_run import run_job
from gs_dist.runtime.stage_worker import Job, StageWorker

NUM_LAYERS = 6


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


class GrowingCluster:
    """Has room for one replica at first, and for `later` once `layers` were solved; holds every group it made."""

    def __init__(self, *, layers: int, later: int, placed: int | None = None) -> None:
        self._layers, self._later = layers, later
        self._placed = later if placed is None else placed
        self.groups: list[InlineWorkerGroup] = []

    @property
    def solved(self) -> list[int]:
        """Layers solved by each group."""
        return [sum(method == "solve" for _, method in group.calls) for group in self.groups]

    def make(self, job: Job, min_replicas: int) -> InlineWorkerGroup:
        held = self._placed if sum(self.solved) >= self._layers else 1
        group = InlineWorkerGroup(
            partial(StageWorker, job),
            num_stages=job.plan.pipeline_parallel_size,
            num_replicas=min(held, job.plan.data_parallel_size),
            room=lambda: self._later - held if sum(self.solved) >= self._layers else 0,
        )
        self.groups.append(group)
        return group


def run(config: CalibrationConfig, cluster: GrowingCluster) -> tuple[CalibrationSummary, list[str]]:
    prints = fingerprints_of(config)
    progress = Heard()
    summary = run_job(
        Job(config=config, plan=plan_of(config), fingerprints=prints),
        CheckpointReader(Path(config.model)),
        make_group=cluster.make,
        make_evaluation_group=inline_evaluation_group,
        progress=progress,
    )
    return summary, progress.messages


@pytest.fixture(autouse=True)
def looks_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "_LOOK_INTERVAL", 0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    config = small_recipe(directory, num_layers=NUM_LAYERS)
    run_inline(config)
    return directory, published_hashes(config)


def spread(stages: int, replicas: int, **more: Any) -> dict[str, Any]:
    return {"pipeline_parallel_size": stages, "data_parallel_size": replicas, "layers_per_wave": 1, **more}


@pytest.mark.parametrize("stages", [1, 2])
def test_a_replica_that_finds_room_joins_from_the_next_wave_on(
    undisturbed: tuple[Path, dict[str, str]], stages: int
) -> None:
    """The passes under way are finished, then a second group has both replicas; no layer is solved twice."""
    directory, expected = undisturbed
    config = small_recipe(directory, f"out-joins-{stages}", parallel=spread(stages, 2))
    cluster = GrowingCluster(layers=2, later=2)
    summary, messages = run(config, cluster)
    assert published_hashes(config) == expected
    assert [group.num_replicas for group in cluster.groups] == [1, 2]
    assert sum(cluster.solved) == NUM_LAYERS
    assert cluster.solved[0] < NUM_LAYERS - 1
    assert "room for 1 more replica, joining from the next wave on" in messages
    assert not any("starting the workers again" in message for message in messages)
    assert {(s.stage, s.replica) for s in summary.stages} == {(s, r) for s in range(stages) for r in range(2)}


def test_a_replica_joins_a_quantized_propagation_too(tmp_path: Path) -> None:
    """Where layers run on what the published ones give, the next group goes on from those published."""
    config = small_recipe(tmp_path, num_layers=4, propagation="quantized")
    run_inline(config)
    joined = small_recipe(tmp_path, "out-joins", propagation="quantized", parallel=spread(1, 2))
    cluster = GrowingCluster(layers=2, later=2)
    run(joined, cluster)
    assert [group.num_replicas for group in cluster.groups] == [1, 2]
    assert published_hashes(joined) == published_hashes(config)


def test_room_that_is_seen_only_when_nothing_is_left_to_start_changes_nothing(
    undisturbed: tuple[Path, dict[str, str]],
) -> None:
    """The last pass is not followed by another group."""
    directory, expected = undisturbed
    config = small_recipe(directory, "out-late", parallel=spread(1, 2))
    cluster = GrowingCluster(layers=NUM_LAYERS, later=2)
    _, messages = run(config, cluster)
    assert len(cluster.groups) == 1
    assert not any("joining" in message for message in messages)
    assert published_hashes(config) == expected


def test_room_that_no_replica_can_be_placed_in_cannot_keep_a_job_from_its_end(
    undisturbed: tuple[Path, dict[str, str]],
) -> None:
    """Each group finishes a layer before the next one is tried, and this counts as no failure."""
    directory, expected = undisturbed
    config = small_recipe(directory, "out-illusion", parallel=spread(1, 2, max_restarts=0))
    cluster = GrowingCluster(layers=1, later=2, placed=1)
    run(config, cluster)
    assert cluster.solved == [1] * NUM_LAYERS
    assert published_hashes(config) == expected


def test_nobody_asks_for_room_while_no_replica_is_missing(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """With all replicas at work one group does everything, however much room there is."""
    directory, expected = undisturbed
    config = small_recipe(directory, "out-full", parallel=spread(1, 1))
    cluster = GrowingCluster(layers=0, later=9)
    run(config, cluster)
    assert len(cluster.groups) == 1
    assert published_hashes(config) == expected
