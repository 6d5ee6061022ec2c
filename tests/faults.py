"""Jobs that are killed while they run: submit one, kill a part of it at a chosen moment, submit again, compare.

What is killed and when comes from a seed. Every process of a run carries `MARK` in its environment, so
that what is left behind is found even after its parent is gone. Linux only: reads /proc.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray.cluster_utils import Cluster

from gs_dist.recipe.config import CalibrationConfig

MARK = "GS_DIST_FAULT_RUN"
KINDS = ("worker", "workers", "coordinator", "job", "node")
LIMIT = 400.0  # seconds for a whole run; it guards against hanging, nothing is measured
NUM_LAYERS = 8


def save_recipe(config: CalibrationConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return path


def environment(mark: str) -> dict[str, str]:
    quiet = {"RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray gives workers a niceness of 15, with which they get next to nothing of a machine that does other things too.
    return {**os.environ, **quiet, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", MARK: mark}


@dataclass
class Submission:
    """A `gs-dist quantize` in a process group of its own; what it prints goes to a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(
        cls, recipe: Path, log: Path, mark: str, address: str | None = None, inside: Sequence[str] = ()
    ) -> Submission:
        """`inside` is a command that runs the one after it."""
        command = [*inside, sys.executable, "-m", "gs_dist", "quantize", str(recipe)]
        command += [] if address is None else ["--address", address]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                env=environment(mark),
                cwd=log.parent,  # which Ray puts first in the workers' search path
                start_new_session=True,
            )
        return cls(process, log)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def marked_processes(mark: str, title: str = "") -> list[int]:
    """Living processes with this mark whose command line begins with `title`."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            # The command line first: of the many processes of a machine, few need a second look.
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if not command.startswith(title) or needle not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(entry.name))
    return sorted(found)


def worker_processes(mark: str) -> list[int]:
    """Processes of stage workers."""
    return marked_processes(mark, "ray::_Worker")


def wait_until(what: str, holds: Any, limit: float = 30.0) -> None:
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, f"{what} for {limit:g} s"
        time.sleep(0.2)


class FaultCluster:
    """A head that runs no worker, and nodes of one CPU each that can die, as processes of this machine."""

    def __init__(self, mark: str, num_nodes: int) -> None:
        self.mark = mark
        saved = dict(os.environ)
        os.environ.update(environment(mark))
        try:
            self._cluster = Cluster(
                initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}, shutdown_at_exit=True
            )
            self.nodes: list[Any] = []
            for _ in range(num_nodes):
                self.add_node()
            self._cluster.wait_for_nodes()
        finally:
            os.environ.clear()
            os.environ.update(saved)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add_node(self, extra: Mapping[str, str] | None = None) -> None:
        """`extra` stands in the environment of the node and its workers."""
        saved = dict(os.environ)
        os.environ.update({**environment(self.mark), **(extra or {})})
        try:
            self.nodes.append(self._cluster.add_node(num_cpus=1, wait=True))
        finally:
            os.environ.clear()
            os.environ.update(saved)

    def kill_node(self, node: Any) -> None:
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def num_objects(self) -> int:
        """Objects in the stores of all living nodes."""
        from ray._private.internal_api import node_stats

        nodes = (self._cluster.head_node, *self.nodes)
        replies = [
            node_stats(node.node_ip_address, node.node_manager_port, include_memory_info=False) for node in nodes
        ]
        return sum(int(reply.store_stats.num_local_objects) for reply in replies)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def fault_cluster(mark: str, num_nodes: int) -> Iterator[FaultCluster]:
    cluster = FaultCluster(mark, num_nodes)
    try:
        yield cluster
    finally:
        cluster.shutdown()


@dataclass
class Outcome:
    """What became of one run: kills as (kind, layers published at that moment), and what was seen at the end."""

    seed: int
    kills: list[tuple[str, int]] = field(default_factory=list)
    submissions: int = 0
    repeated: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        kills = ", ".join(f"{kind}@{layers}" for kind, layers in self.kills)
        return (
            f"seed {self.seed}: {kills or 'no kill'}; {self.submissions} submissions, "
            f"{self.repeated} layers solved again, {self.seconds:.0f} s"
        )


class _Manifests:
    """Counts how often each layer was published, by the identity of its manifest."""

    def __init__(self, output: Path) -> None:
        self._directory = output / "manifests"
        self._seen: dict[str, set[tuple[int, int]]] = {}

    def look(self) -> int:
        """Layers published by now."""
        present = 0
        for path in self._directory.glob("layer-*.json"):
            with suppress(FileNotFoundError):
                status = path.stat()
                self._seen.setdefault(path.name, set()).add((status.st_ino, status.st_mtime_ns))
                present += 1
        return present

    @property
    def repeated(self) -> int:
        return sum(len(times) - 1 for times in self._seen.values())


def run_with_kills(
    seed: int, kinds: tuple[str, ...], config: CalibrationConfig, mark: str, cluster: FaultCluster | None
) -> Outcome:
    """Runs a job to its end, killing as `kinds` say at moments that the seed gives.

    Args:
        seed: of the moments and of what is hit.
        kinds: the kills, in order; each comes once a number of layers is published.
        config: the recipe.
        mark: of all processes.
        cluster: where to run; None lets every submission start a cluster of its own (for the kind "job").
    """
    rng = random.Random(seed)
    output = Path(config.output)
    recipe = save_recipe(config, output.with_suffix(".yaml"))
    outcome = Outcome(seed)
    manifests = _Manifests(output)
    moments = sorted(rng.sample(range(NUM_LAYERS), len(kinds)))
    began = time.monotonic()
    address = None if cluster is None else cluster.address

    def submit() -> Submission:
        outcome.submissions += 1
        log = output.with_name(f"{output.name}-{outcome.submissions}.log")
        return Submission.start(recipe, log, mark, address)

    def check_time() -> None:
        outcome.seconds = time.monotonic() - began
        assert outcome.seconds < LIMIT, f"{outcome.line()}: hangs; {job.said()[-2000:]}"

    job = submit()
    try:
        for kind, moment in zip(kinds, moments, strict=True):
            while not (job.ended or (manifests.look() >= moment and worker_processes(mark))):
                check_time()
                time.sleep(0.1)
            pause = time.monotonic() + rng.random() * 0.5
            while time.monotonic() < pause and not job.ended:
                manifests.look()
                time.sleep(0.02)
            if not job.ended and _kill(kind, rng, job, mark, cluster):
                outcome.kills.append((kind, manifests.look()))
            if kind in ("coordinator", "job"):
                job.process.wait(30)
                job = submit()
        while True:
            while not job.ended:
                check_time()
                manifests.look()
                time.sleep(0.1)
            if job.process.returncode == 0:
                break
            # A node may have held the raylet that the coordinator spoke to; then the job is submitted again.
            assert outcome.submissions <= 2 * len(kinds) + 1, f"{outcome.line()}: {job.said()[-2000:]}"
            assert any(kind == "node" for kind, _ in outcome.kills), job.said()[-3000:]
            job = submit()
    finally:
        job.kill_group()
    manifests.look()
    outcome.repeated = manifests.repeated
    outcome.seconds = time.monotonic() - began
    return outcome


def _kill(kind: str, rng: random.Random, job: Submission, mark: str, cluster: FaultCluster | None) -> bool:
    """Whether there was something to kill."""
    if kind in ("worker", "workers"):
        alive = worker_processes(mark)
        victims = rng.sample(alive, min(len(alive), 1 if kind == "worker" else rng.randint(2, 4)))
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(victims)
    if kind == "coordinator":
        os.kill(job.process.pid, signal.SIGKILL)
        return True
    if kind == "job":
        job.kill_group()
        return True
    assert cluster is not None, "nodes die in a cluster only"
    cluster.kill_node(rng.choice(cluster.nodes))
    cluster.add_node()
    return True


def published_files(config: CalibrationConfig) -> dict[str, str]:
    """Relative name to sha256 of all that a loader reads: weights, index, configuration.

    No loader reads provenance.json, and a run in the test's own process has made-up fingerprints in it.
    """
    output = Path(config.output)
    files = sorted(
        p
        for name in config.dialects
        for p in (output / name).iterdir()
        if p.suffix in (".safetensors", ".json") and p.name != "provenance.json"
    )
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(config: CalibrationConfig) -> list[str]:
    """Files in the output that a finished job should not leave."""
    output = Path(config.output)
    return sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.name.startswith(".") and p.name != ".lock")


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def done(config: CalibrationConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(config.output) / "done").read_text())
    return content
