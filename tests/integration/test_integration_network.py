"""A job over two nodes with addresses and networks of their own, and what becomes of it when the cable is out.

Needs the right to make namespaces; the reason of a skip says what is missing:
`pytest -m slow tests/integration/test_integration_network.py -rs`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from faults import (
    LIMIT,
    NUM_LAYERS,
    Submission,
    done,
    leftovers,
    marked_processes,
    published_files,
    save_recipe,
    wait_until,
)
from namespaces import HEAD, Network, network, why_not
from runs import run_inline, save_samples, small_recipe

from gs_dist.recipe.config import CalibrationConfig

_REASON = why_not()
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(bool(_REASON), reason=_REASON)]

NUM_SAMPLES = 80


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a model and enough samples for a pass over them to last a while; every node sees it."""
    directory = tmp_path_factory.mktemp("network")
    tiny_checkpoint(directory / "model", num_layers=NUM_LAYERS)
    save_samples(directory / "samples.parquet", vocab_size=128, num_samples=NUM_SAMPLES)
    return directory


def recipe(directory: Path, output: str, stages: int, replicas: int, **parallel: Any) -> CalibrationConfig:
    spread = {"pipeline_parallel_size": stages, "data_parallel_size": replicas, "layers_per_wave": 1, "timeout": 60.0}
    return small_recipe(directory, output, calibration={"num_samples": NUM_SAMPLES}, parallel={**spread, **parallel})


@pytest.fixture(scope="module")
def undisturbed(directory: Path) -> dict[str, str]:
    config = recipe(directory, "undisturbed", 1, 1)
    run_inline(config)
    return published_files(config)


@pytest.fixture
def two_nodes() -> Iterator[Network]:
    """Two machines of one CPU each, a Ray node on either."""
    mark = secrets.token_hex(8)
    with network(mark) as machines:
        machines.first.start_ray()
        machines.second.start_ray()
        yield machines
    for machine in (machines.first, machines.second):
        wait_until("processes are left behind", lambda machine=machine: not marked_processes(machine.mark))


def submit(config: CalibrationConfig, machines: Network, number: int = 1) -> Submission:
    """A submission on the head's machine."""
    output = Path(config.output)
    log = output.with_name(f"{output.name}-{number}.log")
    path = save_recipe(config, output.with_suffix(".yaml"))
    return Submission.start(path, log, machines.first.mark, HEAD, machines.first.inside())


def wait_for_workers(job: Submission, machines: Network, config: CalibrationConfig, num_layers: int) -> None:
    """Until each machine holds a worker, and some layers are published."""
    manifests = Path(config.output) / "manifests"

    def reached() -> bool:
        spread = machines.first.workers() and machines.second.workers()
        return job.ended or bool(spread and len(list(manifests.glob("layer-*"))) >= num_layers)

    wait_until("workers on both machines are awaited", reached, LIMIT)
    assert not job.ended, job.said()


def end_of(job: Submission) -> tuple[int, str]:
    """Exit code and what was said, once the job has ended by itself."""
    wait_until("the job goes on", lambda: job.ended, LIMIT)
    return job.process.returncode, job.said()


def check(config: CalibrationConfig, undisturbed: dict[str, str]) -> None:
    assert published_files(config) == undisturbed
    assert done(config)["layers"] == NUM_LAYERS
    assert leftovers(config) == []


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (1, 2)])
def test_two_nodes_that_know_each_other_by_address_publish_the_bytes_of_one(
    directory: Path, undisturbed: dict[str, str], two_nodes: Network, stages: int, replicas: int
) -> None:
    """Activations from stage to stage, and partial sums from replica to owner, go over the network."""
    config = recipe(directory, f"both-{stages}x{replicas}", stages, replicas)
    job = submit(config, two_nodes)
    try:
        wait_for_workers(job, two_nodes, config, 0)
        code, said = end_of(job)
    finally:
        job.kill_group()
    assert code == 0, said
    check(config, undisturbed)
    workers = json.loads((Path(config.output) / "summary.json").read_text())["stages"]
    assert {(worker["stage"], worker["replica"]) for worker in workers} == {(0, 0), (stages - 1, replicas - 1)}


def test_a_cable_that_is_out_for_a_moment_is_no_loss(
    directory: Path, undisturbed: dict[str, str], two_nodes: Network
) -> None:
    """What was sent meanwhile is sent again, and no worker is started anew."""
    config = recipe(directory, "moment", 1, 2)
    job = submit(config, two_nodes)
    try:
        wait_for_workers(job, two_nodes, config, 2)
        two_nodes.cut()
        time.sleep(1.0)
        two_nodes.mend()
        code, said = end_of(job)
    finally:
        job.kill_group()
    assert code == 0, said
    assert "starting the workers again" not in said
    check(config, undisturbed)


def test_a_node_that_cannot_be_reached_leaves_its_samples_to_the_other(
    directory: Path, undisturbed: dict[str, str], two_nodes: Network
) -> None:
    """Its processes are alive and nobody hears of them: the job goes on with one replica, to the same bytes."""
    config = recipe(directory, "one-left", 1, 2, min_data_parallel_size=1)
    job = submit(config, two_nodes)
    try:
        wait_for_workers(job, two_nodes, config, 2)
        two_nodes.cut()
        code, said = end_of(job)
    finally:
        job.kill_group()
    assert code == 0, said
    assert "room for 1 of 2 replicas" in said
    check(config, undisturbed)


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (1, 2)])
def test_without_the_node_that_it_needs_a_job_ends_and_goes_on_once_the_cable_is_back(
    directory: Path, undisturbed: dict[str, str], two_nodes: Network, stages: int, replicas: int
) -> None:
    """It says what the cluster lacks, after parallel.timeout; submitted again it takes what is published."""
    spread = {"min_data_parallel_size": replicas, "timeout": 40.0}
    config = recipe(directory, f"apart-{stages}x{replicas}", stages, replicas, **spread)
    job = submit(config, two_nodes)
    try:
        wait_for_workers(job, two_nodes, config, 2)
        two_nodes.cut()
        code, said = end_of(job)
    finally:
        job.kill_group()
    assert code == 2, said
    assert said.splitlines()[-1].startswith(f"gs-dist: the cluster has no room for {stages} stages x {replicas} rep")
    assert not (Path(config.output) / "done").exists()

    two_nodes.mend()
    wait_until("the old node lives on", lambda: not two_nodes.second.has_node, LIMIT)  # it learns that it was given up
    two_nodes.second.start_ray()
    job = submit(config, two_nodes, 2)
    try:
        code, said = end_of(job)
    finally:
        job.kill_group()
    assert code == 0, said
    assert "resuming: " in said
    check(config, undisturbed)
