"""Real processes killed at moments that a seed gives: the job ends with the bytes of an undisturbed run.

The short version kills a worker, the coordinator, a node and a whole job. The long one kills by random choice, over as
many seeds as GS_DIST_FAULT_RUNS says (default 5): `GS_DIST_FAULT_RUNS=100 pytest -m slow tests/integration -s`.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from faults import (
    KINDS,
    LIMIT,
    NUM_LAYERS,
    FaultCluster,
    Submission,
    done,
    environment,
    fault_cluster,
    leftovers,
    marked_processes,
    published_files,
    run_with_kills,
    save_recipe,
    shared_memory,
    wait_until,
    worker_processes,
)
from runs import run_inline, save_samples, small_recipe

from gs_dist.recipe.config import CalibrationConfig, load_recipe

pytestmark = pytest.mark.ray

STAGES_BY_REPLICAS = [(2, 1), (1, 2)]
NUM_SAMPLES = 80
LONG_RUNS = int(os.environ.get("GS_DIST_FAULT_RUNS", "5"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a model and enough samples for a pass over them to last a while."""
    directory = tmp_path_factory.mktemp("faults")
    tiny_checkpoint(directory / "model", num_layers=NUM_LAYERS)
    save_samples(directory / "samples.parquet", vocab_size=128, num_samples=NUM_SAMPLES)
    return directory


def recipe(directory: Path, output: str, stages: int = 2, replicas: int = 1, **parallel: Any) -> CalibrationConfig:
    spread = {"pipeline_parallel_size": stages, "data_parallel_size": replicas, "layers_per_wave": 1, "timeout": 150.0}
    return small_recipe(directory, output, calibration={"num_samples": NUM_SAMPLES}, parallel={**spread, **parallel})


@pytest.fixture(scope="module")
def undisturbed(directory: Path) -> dict[str, str]:
    config = recipe(directory, "undisturbed", 1, 1)
    run_inline(config)
    return published_files(config)


@pytest.fixture(scope="module")
def mark() -> Iterator[str]:
    """Names the processes of this module; none of them may outlive it."""
    before = shared_memory()
    mark = secrets.token_hex(8)
    yield mark
    wait_until("processes are left behind", lambda: not marked_processes(mark))
    assert shared_memory() <= before


@pytest.fixture(scope="module")
def cluster(mark: str) -> Iterator[FaultCluster]:
    with fault_cluster(mark, num_nodes=3) as cluster:
        yield cluster


def check(config: CalibrationConfig, undisturbed: dict[str, str], mark: str, cluster: FaultCluster | None) -> None:
    """The bytes are right, nothing is left, and the model is marked as done."""
    assert published_files(config) == undisturbed
    assert done(config)["layers"] == NUM_LAYERS
    assert leftovers(config) == []
    wait_until("workers are left behind", lambda: not worker_processes(mark))
    if cluster is None:
        wait_until("processes are left behind", lambda: not marked_processes(mark))
    else:
        wait_until("objects are left behind", lambda: cluster.num_objects() == 0)


def test_kills_of_each_kind_leave_the_bytes_of_an_undisturbed_run(
    directory: Path, undisturbed: dict[str, str], mark: str, cluster: FaultCluster
) -> None:
    """A worker, the coordinator and a node die; the job, submitted again where need be, ends as if nothing had been."""
    kinds = ("worker", "coordinator", "node")
    config = recipe(directory, "short")
    outcome = run_with_kills(1, kinds, config, mark, cluster)
    print(outcome.line())
    assert tuple(kind for kind, _ in outcome.kills) == kinds
    check(config, undisturbed, mark, cluster)
    assert outcome.repeated <= 2 * len(kinds), "at most the layers that two workers were at"


def test_a_whole_job_killed_with_its_cluster_goes_on_when_submitted_again(
    directory: Path, undisturbed: dict[str, str]
) -> None:
    """A job that ran a cluster of its own leaves no process behind when its process group is killed, and resumes."""
    mark = secrets.token_hex(8)
    config = recipe(directory, "short-job")
    outcome = run_with_kills(3, ("job",), config, mark, None)
    print(outcome.line())
    assert [kind for kind, _ in outcome.kills] == ["job"]
    check(config, undisturbed, mark, None)
    assert outcome.repeated <= 2


def _lose_a_node_for_good(directory: Path, output: str, min_replicas: int) -> tuple[CalibrationConfig, Submission]:
    """A job of two replicas on two nodes, of which one goes once two layers are published; the job as it ended."""
    mark = secrets.token_hex(8)
    spread = {"min_data_parallel_size": min_replicas, "timeout": 20.0, "max_restarts": 2}
    config = recipe(directory, output, stages=1, replicas=2, **spread)
    with fault_cluster(mark, num_nodes=2) as cluster:
        job = Submission.start(
            save_recipe(config, directory / f"{output}.yaml"), directory / f"{output}.log", mark, cluster.address
        )
        try:
            manifests = Path(config.output) / "manifests"
            wait_until("two layers are awaited", lambda: job.ended or len(list(manifests.glob("layer-*"))) >= 2, LIMIT)
            assert not job.ended, job.said()
            cluster.kill_node(cluster.nodes[0])
            wait_until("the job goes on", lambda: job.ended, LIMIT)
        finally:
            job.kill_group()
    return config, job


def test_a_node_that_leaves_for_good_leaves_its_samples_to_the_others(
    directory: Path, undisturbed: dict[str, str]
) -> None:
    """Where one replica may do, the job goes on with those that stay, and publishes the same bytes."""
    config, job = _lose_a_node_for_good(directory, "fewer", min_replicas=1)
    assert job.process.returncode == 0, job.said()
    assert "room for 1 of 2 replicas" in job.said()
    assert published_files(config) == undisturbed


def test_a_job_submitted_while_pods_start_ends_in_the_bytes_of_a_plain_run(
    directory: Path, undisturbed: dict[str, str]
) -> None:
    """A head without CPUs, workers that join 10 and 20 s later, one that leaves during work; as many stages as nodes.

    The job waits for the first node and for the one that follows it, plans for both, and plans again without the lost
    one. `plan --address` is refused while there is no node, by what is missing.
    """
    mark = secrets.token_hex(8)
    config = load_recipe(
        save_recipe(recipe(directory, "pods"), directory / "pods.yaml"), ["parallel.pipeline_parallel_size=auto"]
    )
    file = save_recipe(config, directory / "pods.yaml")
    with fault_cluster(mark, num_nodes=0) as cluster:
        told = subprocess.run(
            [sys.executable, "-m", "gs_dist", "plan", str(file), "--address", cluster.address],
            env=environment(mark),
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.returncode == 2
        assert "the cluster has no node with a CPU that a worker could run on: start worker nodes" in told.stderr
        job = Submission.start(file, directory / "pods.log", mark, cluster.address)
        try:
            wait_until("the job waits for nodes", lambda: job.ended or "no node with a CPU yet" in job.said(), LIMIT)
            for _ in range(2):
                time.sleep(10)
                assert not job.ended, job.said()
                cluster.add_node()
            manifests = Path(config.output) / "manifests"
            wait_until("two layers are awaited", lambda: job.ended or len(list(manifests.glob("layer-*"))) >= 2, LIMIT)
            assert not job.ended, job.said()
            assert len(worker_processes(mark)) == 2, job.said()
            cluster.kill_node(cluster.nodes[0])
            wait_until("the job goes on", lambda: job.ended, LIMIT)
        finally:
            job.kill_group()
    assert job.process.returncode == 0, job.said()
    assert "the cluster holds 1 node now: planned again, 1 stage x 1 replica, 1 thread a worker" in job.said()
    assert published_files(config) == undisturbed


@pytest.mark.slow
def test_a_node_that_joins_is_used_from_the_next_wave_on(directory: Path, undisturbed: dict[str, str]) -> None:
    """A job that found room for one of two replicas goes on with two once a second node is there, to the same bytes."""
    mark = secrets.token_hex(8)
    config = recipe(directory, "joined", stages=1, replicas=2, min_data_parallel_size=1)
    with fault_cluster(mark, num_nodes=1) as cluster:
        job = Submission.start(
            save_recipe(config, directory / "joined.yaml"), directory / "joined.log", mark, cluster.address
        )
        try:
            wait_until("a worker is awaited", lambda: job.ended or worker_processes(mark), LIMIT)
            assert not job.ended, job.said()
            cluster.add_node()
            wait_until("the job goes on", lambda: job.ended, LIMIT)
        finally:
            job.kill_group()
    said = job.said()
    assert job.process.returncode == 0, said
    assert "room for 1 of 2 replicas" in said
    assert "room for 1 more replica, joining from the next wave on" in said
    stages = json.loads((Path(config.output) / "summary.json").read_text())["stages"]
    assert {(stage["stage"], stage["replica"]) for stage in stages} == {(0, 0), (0, 1)}
    assert published_files(config) == undisturbed


@pytest.mark.slow
def test_a_node_without_which_the_job_may_not_go_on_is_waited_for_and_named(directory: Path) -> None:
    """Where all replicas are asked for, the job ends after parallel.timeout and says what the cluster lacks."""
    config, job = _lose_a_node_for_good(directory, "all-or-none", min_replicas=2)
    assert job.process.returncode == 2, job.said()
    said = job.said().splitlines()[-1]
    assert said.startswith("gs-dist: the cluster has no room for 1 stages x 2 replicas of 1 CPU each: it holds 1 CPU")
    assert "parallel.data_parallel_size" in said
    assert not (Path(config.output) / "done").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 100 + LONG_RUNS))
def test_random_kills(
    directory: Path, undisturbed: dict[str, str], mark: str, cluster: FaultCluster, seed: int
) -> None:
    """Any sequence of kills at any moment ends in the same bytes."""
    rng = random.Random(seed)
    alone = seed % 3 == 2
    kinds = ("job",) * 2 if alone else tuple(rng.sample([kind for kind in KINDS if kind != "job"], k=4))
    own_mark = secrets.token_hex(8) if alone else mark
    config = recipe(directory, f"long-{seed}", *rng.choice(STAGES_BY_REPLICAS))
    outcome = run_with_kills(seed, kinds, config, own_mark, None if alone else cluster)
    print(outcome.line())
    check(config, undisturbed, own_mark, None if alone else cluster)
    assert outcome.repeated <= 2 * len(outcome.kills)
