"""A job's plan follows the nodes of its cluster, to the same bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from runs import (
    fingerprints_of,
    inline_evaluation_group,
    inline_group,
    published_hashes,
    reader_of,
    run_inline,
    small_recipe,
)
from workers import InlineWorkerGroup

from gs_dist.errors import PlanError, WorkerLostError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.progress import SilentProgress
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.runtime import attempt, replanning
from gs_dist.runtime.job import Job
from gs_dist.runtime.job_run import run_job
from gs_dist.runtime.planned import plan_job
from gs_dist.runtime.replanning import PlanOfNodes
from gs_dist.runtime.stage_worker import StageWorker

NUM_LAYERS = 6
NODE = ClusterFacts(num_cpus=1, num_npus=0, memory_bytes=4 << 30)


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


class Nodes:
    """A cluster of `held` nodes of one core each, as many as `then` once `layers` were solved or workers started."""

    def __init__(self, held: int, then: int, *, layers: int | None = None) -> None:
        self._held, self._then, self._layers = held, then, layers
        self.groups: list[InlineWorkerGroup] = []
        self.workers: list[int] = []
        self.looks: list[DeviceKind | None] = []

    @property
    def solved(self) -> list[int]:
        """Layers solved by each group."""
        return [sum(method == "solve" for _, method in group.calls) for group in self.groups]

    def now(self, device: DeviceKind | None) -> ClusterFacts:
        self.looks.append(device)
        changed = bool(self.groups) if self._layers is None else sum(self.solved) >= self._layers
        return NODE.of_nodes(self._then if changed else self._held)

    def make(self, job: Job, min_replicas: int) -> InlineWorkerGroup:
        return self.add(job, inline_group(job, min_replicas))

    def add(self, job: Job, group: InlineWorkerGroup) -> InlineWorkerGroup:
        self.groups.append(group)
        self.workers.append(job.plan.num_workers)
        return group


@pytest.fixture(autouse=True)
def looks_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "_LOOK_INTERVAL", 0.0)
    monkeypatch.setattr(replanning, "_LOOK_INTERVAL", 0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    config = small_recipe(directory, num_layers=NUM_LAYERS)
    run_inline(config)
    return directory, published_hashes(config)


def automatic(directory: Path, output: str, **parallel: Any) -> CalibrationConfig:
    """Stages and replicas are left to the nodes."""
    sizes = {"pipeline_parallel_size": "auto", "data_parallel_size": "auto", "layers_per_wave": 1}
    return small_recipe(directory, output, parallel={**sizes, **parallel})


def run(config: CalibrationConfig, nodes: Nodes, make: Any = None) -> list[str]:
    reader, heard = reader_of(config), Heard()
    of_nodes = PlanOfNodes(
        partial(plan_job, config, reader), nodes.now, nodes.now(None), asked=None, tell=heard.messages.append
    )
    planned = of_nodes.first(0.0)
    run_job(
        Job(config=config, plan=planned.plan, fingerprints=fingerprints_of(config)),
        reader,
        make_group=make or nodes.make,
        make_evaluation_group=inline_evaluation_group,
        replanning=of_nodes,
        progress=heard,
    )
    return heard.messages


def test_a_node_that_comes_while_workers_start_is_planned_with(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """The workers that were started for one node end before they compute, and those for two do everything."""
    directory, expected = undisturbed
    config = automatic(directory, "out-starts")
    nodes = Nodes(1, 2)
    messages = run(config, nodes)
    assert published_hashes(config) == expected
    assert nodes.solved == [0, NUM_LAYERS]
    assert nodes.workers == [1, 2]
    assert "more nodes have come while the workers started" in messages
    assert any(message.startswith("the cluster holds 2 nodes now: planned again, ") for message in messages)


def test_a_node_that_comes_during_work_is_used_from_the_next_wave_on(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """Also where no replica was missing, since the sizes were left to the nodes that were there; no layer twice."""
    directory, expected = undisturbed
    config = automatic(directory, "out-grows")
    nodes = Nodes(1, 2, layers=2)
    messages = run(config, nodes)
    assert published_hashes(config) == expected
    assert sum(nodes.solved) == NUM_LAYERS
    assert 0 < nodes.solved[0] < NUM_LAYERS
    assert "room for more workers, joining from the next wave on" in messages
    assert nodes.looks[-1] is DeviceKind.CPU, "what is begun on CPUs is not gone on with on cards"


def test_a_node_that_leaves_during_work_is_planned_without(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """Workers for it would wait for room in vain; the one that stays does the rest."""
    directory, expected = undisturbed
    config = automatic(directory, "out-leaves")
    nodes = Nodes(2, 1, layers=2)

    class Dying(InlineWorkerGroup):
        def get(self, reference: Any) -> Any:
            if nodes.now(None).num_nodes == 1:
                raise WorkerLostError("its node has died")
            return super().get(reference)

    def make(job: Job, min_replicas: int) -> InlineWorkerGroup:
        kind = InlineWorkerGroup if nodes.groups else Dying
        plan = job.plan
        stages, replicas = plan.pipeline_parallel_size, plan.data_parallel_size
        return nodes.add(job, kind(partial(StageWorker, job), num_stages=stages, num_replicas=replicas))

    messages = run(config, nodes, make)
    assert published_hashes(config) == expected
    assert nodes.workers == [2, 1]
    assert any(
        message.startswith("the cluster holds 1 node now: planned again, 1 stage x 1 rep") for message in messages
    )


def test_nodes_that_come_and_go_cannot_keep_a_job_from_its_work(undisturbed: tuple[Path, dict[str, str]]) -> None:
    """Workers are started again for a larger cluster than any before, and for no other."""
    directory, expected = undisturbed
    config = automatic(directory, "out-flaps")
    nodes, count = Nodes(1, 1), iter([1, 1, 2, 1, 2, 2])
    nodes.now = lambda device: NODE.of_nodes(next(count, 1))  # type: ignore[method-assign]  # a cluster that grows
    run(config, nodes)
    assert published_hashes(config) == expected
    assert sum(solved == 0 for solved in nodes.solved) == 1


def test_a_job_that_fits_on_more_nodes_waits_for_them_and_one_that_fits_on_none_does_not(tmp_path: Path) -> None:
    """A recipe with two threads a worker and two stages, while one node of two cores is there."""
    config = small_recipe(tmp_path, parallel={"pipeline_parallel_size": 2, "threads_per_worker": 2})
    make = partial(plan_job, config, reader_of(config))
    node = ClusterFacts(num_cpus=2, num_npus=0, memory_bytes=4 << 30)
    looks = iter([node, node])
    told: list[str] = []

    def now(device: DeviceKind | None) -> ClusterFacts:
        return next(looks, node.of_nodes(2))

    planned = PlanOfNodes(make, now, node, asked=None, tell=told.append).first(30.0)
    assert planned.plan.threads_per_worker == 2
    assert told == [
        "the job does not fit on the 1 node that the cluster holds, and would on 2 like them: waiting up to 30 s for "
        "more"
    ]
    with pytest.raises(PlanError, match="threads_per_worker is 2"):
        PlanOfNodes(make, lambda device: node, node, asked=None, tell=told.append).first(0.01)
    small = ClusterFacts(num_cpus=2, num_npus=0, memory_bytes=1 << 20)
    told.clear()
    with pytest.raises(PlanError):
        PlanOfNodes(make, lambda device: small, small, asked=None, tell=told.append).first(30.0)
    assert not told


def test_workers_that_wait_for_cards_leave_their_threads_to_those_that_run() -> None:
    """16 workers while one of two nodes of 8 cards is there: 8 run on it at a time, on 20 of its 160 cores each."""
    facts = ClusterFacts(num_cpus=160, num_npus=8, memory_bytes=896 << 30)
    assert facts.threads_share(16, npus=1) == facts.of_nodes(2).threads_share(16, npus=1) == 20
    assert facts.threads_share(16, npus=0) == 10
