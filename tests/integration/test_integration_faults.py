"""Real processes killed at moments that a seed gives: the job ends with the bytes of an undisturbed run.

The short version kills one of each kind. The long one repeats it over seeds, as often as
GS_DIST_FAULT_RUNS says (default 5): `GS_DIST_FAULT_RUNS=100 pytest -m slow tests/integration -s`.
"""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from faults import (
    KINDS,
    NUM_LAYERS,
    FaultCluster,
    done,
    fault_cluster,
    leftovers,
    marked_processes,
    published_files,
    run_with_kills,
    shared_memory,
    wait_until,
    worker_processes,
)
from runs import run_inline, save_samples, small_recipe

from gs_dist.config import CalibrationConfig

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
    spread = {"pipeline_parallel_size": stages, "data_parallel_size": replicas, "layers_per_wave": 1, "timeout": 60.0}
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


@pytest.mark.parametrize(("seed", "kinds"), [(1, ("worker", "coordinator")), (2, ("workers", "node"))])
def test_kills_of_each_kind_leave_the_bytes_of_an_undisturbed_run(
    directory: Path, undisturbed: dict[str, str], mark: str, cluster: FaultCluster, seed: int, kinds: tuple[str, ...]
) -> None:
    """Workers, the coordinator and a node die; the job, submitted again where need be, ends as if nothing had been."""
    config = recipe(directory, f"short-{seed}", *STAGES_BY_REPLICAS[seed % 2])
    outcome = run_with_kills(seed, kinds, config, mark, cluster)
    print(outcome.line())
    assert len(outcome.kills) == len(kinds)
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
