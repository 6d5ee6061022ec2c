"""What a job learns of the cluster that it joins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from gs_dist.errors import ClusterError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.runtime import cluster as module
from gs_dist.runtime.cluster import cluster

GIB = 1 << 30


def node(*, alive: bool = True, **resources: float) -> dict[str, Any]:
    """As `ray.nodes()` tells of it."""
    return {"Alive": alive, "Resources": {"object_store_memory": 1e9, "node:10.0.0.1": 1.0, **resources}}


HEAD = node(memory=32 * GIB)  # KubeRay's with `num-cpus: "0"`
ASCEND = node(CPU=160.0, NPU=8.0, memory=768.0 * GIB)
PLAIN = node(CPU=16.0, memory=64.0 * GIB)


SMALL = node(CPU=8.0, memory=16.0 * GIB)


def joined(monkeypatch: pytest.MonkeyPatch, *looks: list[dict[str, Any]]) -> None:
    """A cluster that holds these nodes, look by look; the last ones stay."""
    held = iter(looks)
    now = [next(held)]

    def nodes() -> list[dict[str, Any]]:
        found = now[0]
        now[0] = next(held, found)
        return found

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(module, "_LOOK_INTERVAL", 0.0)
    monkeypatch.setattr(module, "_SETTLE", 0.05)


@pytest.mark.parametrize(
    ("device", "nodes", "found"),
    [
        (None, [HEAD, ASCEND, ASCEND], ClusterFacts(num_cpus=320, num_npus=16, memory_bytes=1536 * GIB, num_nodes=2)),
        (None, [PLAIN, ASCEND], ClusterFacts(num_cpus=160, num_npus=8, memory_bytes=768 * GIB)),
        (
            None,
            [HEAD, PLAIN, PLAIN, node(alive=False, CPU=16.0, memory=64.0 * GIB)],
            ClusterFacts(num_cpus=32, num_npus=0, memory_bytes=128 * GIB, num_nodes=2),
        ),
        (
            DeviceKind.CPU,
            [PLAIN, ASCEND],
            ClusterFacts(num_cpus=32, num_npus=0, memory_bytes=128 * GIB, num_nodes=2),
        ),
    ],
)
def test_only_nodes_that_hold_workers_are_counted(
    monkeypatch: pytest.MonkeyPatch, device: DeviceKind | None, nodes: list[dict[str, Any]], found: ClusterFacts
) -> None:
    """Neither a head without cores nor dead nodes; nodes without cards only where CPUs are asked for."""
    joined(monkeypatch, nodes)
    with cluster("10.0.0.1:6379", None, device=device) as facts:
        assert facts == found


def test_unlike_nodes_count_as_the_least_of_them_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean would promise the small one's workers what it does not have."""
    joined(monkeypatch, [PLAIN, SMALL])
    told: list[str] = []
    with cluster("10.0.0.1:6379", None, tell=told.append) as facts:
        assert facts == ClusterFacts(num_cpus=16, num_npus=0, memory_bytes=32 * GIB, num_nodes=2)
    assert told == ["the nodes are unlike: each is planned for as the least of them, 8 CPU, 16.0 GiB"]


def test_a_job_waits_for_the_first_nodes_and_those_that_follow_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned is for all that came; a head that no worker can run on is no reason to give up."""
    joined(monkeypatch, [HEAD], [HEAD], [HEAD, PLAIN], [HEAD, PLAIN, PLAIN])
    told: list[str] = []
    with cluster("10.0.0.1:6379", None, patience=30.0, tell=told.append) as facts:
        assert facts.num_nodes == 2
    assert told == ["the cluster has no node with a CPU yet: waiting up to 30 s for the first ones"]


@pytest.mark.parametrize(("device", "needed"), [(None, "a CPU"), (DeviceKind.ASCEND, "an Ascend card")])
def test_a_cluster_without_workers_is_refused_by_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, device: DeviceKind | None, needed: str
) -> None:
    """Once the patience is over, at once where there is none; a division by zero it was."""
    joined(monkeypatch, [HEAD])
    for patience in (0.0, 0.05):
        with (
            pytest.raises(ClusterError, match=f"no node with {needed} that a worker could run on: .*--nodes"),
            cluster("10.0.0.1:6379", None, device=device, patience=patience),
        ):
            raise AssertionError


@pytest.mark.parametrize(
    ("address", "error", "says"),
    [
        (None, PermissionError(13, "Permission denied", "/tmp/ray"), "Ray cannot write its files .*set RAY_TMPDIR"),
        (None, OSError("AF_UNIX path length cannot exceed 107 bytes: '/a'"), "too long a path .*set RAY_TMPDIR"),
        (
            "auto",
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.11.4"),
            r"another version .*Ray: 2\.59\.0 Python: 3\.11\.4",
        ),
        ("auto", AuthenticationError("Token authentication is enabled"), "wants a token.*RAY_AUTH_TOKEN_PATH"),
        ("auto", ConnectionError("Could not find any running Ray instance."), "no Ray cluster answers at 'auto'"),
        (None, RuntimeError("the raylet died\nmany lines"), "Ray cannot be started on this machine .the raylet died"),
    ],
)
def test_each_failure_of_ray_has_its_sentence(
    monkeypatch: pytest.MonkeyPatch, address: str | None, error: Exception, says: str
) -> None:
    """With what was found and the setting that mends it."""

    def fails(**options: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(ClusterError, match=says), cluster(address, 1):
        raise AssertionError


def test_a_cluster_of_ones_own_has_a_token_of_its_own_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stands in the environment while the cluster runs, another one each time, and what was there comes back."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    seen: list[dict[str, str]] = []
    told: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **options: seen.append({**os.environ, "address": options["address"]}))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [PLAIN])
    for _ in range(2):
        with cluster(None, 1, tell=told.append):
            assert os.environ["RAY_AUTH_MODE"] == "token"
    assert [(e["RAY_AUTH_MODE"], len(e["RAY_AUTH_TOKEN"]), e["address"]) for e in seen] == [("token", 64, "local")] * 2
    assert seen[0]["RAY_AUTH_TOKEN"] != seen[1]["RAY_AUTH_TOKEN"]
    assert "RAY_AUTH_TOKEN_PATH" not in seen[0]
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]) == ("disabled", "/nowhere")
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert "RAY_ADDRESS is '10.0.0.1:6379', which is not joined without --address" in told[0]


_HOLDS_A_CLUSTER = """
import sys
from gs_dist.runtime.cluster import cluster
import ray
with cluster(None, 1):
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
"""
_RUNS_A_TASK = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("ran", ray.get(ray.remote(lambda: 1).remote()))
"""


@pytest.mark.ray
def test_a_stranger_without_the_token_can_do_nothing_in_a_cluster_that_listens(tmp_path: Path) -> None:
    """Ray's servers listen on all addresses, as the comment says; a token is asked for where none was wanted."""
    ss = shutil.which("ss")
    if ss is None:
        pytest.skip("ss, of iproute2, lists listening sockets: install it")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDS_A_CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        address = holder.stdout.readline().strip()
        port = address.rpartition(":")[2]
        listening = subprocess.run([ss, "-ltn"], capture_output=True, text=True, check=True).stdout
        local = [line.split()[3] for line in listening.splitlines() if line.split()[3].endswith(f":{port}")]
        assert local, "the control service listens"
        assert {place.rpartition(":")[0] for place in local} <= {"*", "0.0.0.0", "[::]"}, "on all addresses"
        stranger = subprocess.run(
            [sys.executable, "-c", _RUNS_A_TASK, address],
            env={**environment, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        holder.communicate("\n", timeout=60)
    assert stranger.returncode != 0
    assert "ran" not in stranger.stdout
    assert not list(tmp_path.rglob("auth_token")), "no token is left behind"
