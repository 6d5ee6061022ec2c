"""The Ray cluster that a job runs on: joined or started, and what it holds."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from gs_dist.errors import ClusterError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.recipe.sizes import format_bytes
from gs_dist.wording import counted

__all__ = ["cluster", "nodes_now"]

_PATIENCE = 10.0  # seconds for a cluster's head to take a connection
_LOOK_INTERVAL = 1.0  # seconds between two looks for nodes
_SETTLE = 15.0  # seconds without another node, where the first one was waited for: pods start one after another

_ALIKE = 0.95  # of what a node holds: the memory that Ray finds free differs a little from node to node

_START = "start one with `ray start --head`, check --address, or leave it out to run on this machine"


def _refuse_silence(address: str) -> None:
    """Ray tries for minutes to reach a head; whether anything listens is known in a moment."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d{1,5})", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_PATIENCE).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ClusterError(f"no Ray cluster answers at {address!r} ({reason}): {_START}") from error


def nodes_now(device: DeviceKind | None) -> ClusterFacts | None:
    """What the nodes of the cluster that was joined hold now for workers on a device; None where none can hold one.

    Args:
        device: None for cards where there are any.
    """
    return _held(device, lambda text: None)


def _held(device: DeviceKind | None, tell: Callable[[str], None]) -> ClusterFacts | None:
    """What the nodes hold that workers may be placed on; None where there is no such node.

    Those with cards where there are any, else those with cores; a job for CPUs takes all with cores. A head that is
    kept free of workers (KubeRay's, with `num-cpus: "0"`) has memory that no worker can use. Nodes that are unlike
    count as the least of them, since Ray decides which worker comes to lie where.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    with_cards = [node for node in nodes if node.get("NPU", 0) >= 1]
    if device is DeviceKind.ASCEND or (device is None and with_cards):
        nodes = with_cards
    if not nodes:
        return None
    least = {name: int(min(node.get(name, 0) for node in nodes)) for name in ("CPU", "NPU", "memory")}
    unlike = [name for name in least if any(_ALIKE * node.get(name, 0) > least[name] for node in nodes)]
    if unlike:
        shown = {"CPU": f"{least['CPU']} CPU", "NPU": f"{least['NPU']} NPU", "memory": format_bytes(least["memory"])}
        tell(f"the nodes are unlike: each is planned for as the least of them, {', '.join(shown[n] for n in unlike)}")
    count = len(nodes)
    return ClusterFacts(
        num_cpus=count * least["CPU"],
        num_npus=count * least["NPU"],
        memory_bytes=count * least["memory"],
        num_nodes=count,
    )


def _wait_for_nodes(
    device: DeviceKind | None, patience: float, tell: Callable[[str], None], num_nodes: int | None = None
) -> ClusterFacts:
    """What the cluster holds, once it holds a node that a worker can run on, or `num_nodes` of them.

    Raises:
        ClusterError: none came within `patience` seconds.
    """
    found = nodes_now(device)
    count = 0 if found is None else found.num_nodes
    needed = "an Ascend card" if device is DeviceKind.ASCEND else "a CPU"
    if count < (num_nodes or 1) and patience:
        has = f"{count} of {counted(num_nodes, 'node')}" if num_nodes else "no node"
        for_what = "the others" if count else "the first ones"
        tell(f"the cluster has {has} with {needed} yet: waiting up to {patience:g} s for {for_what}")
        _await_nodes(device, patience, num_nodes)
    facts = _held(device, tell)
    if facts is not None and facts.num_nodes < (num_nodes or 1):
        tell(f"{facts.num_nodes} of {counted(num_nodes or 1, 'node')} came: planned is for them, until more come")
    if facts is None:
        raise ClusterError(
            f"the cluster has no node with {needed} that a worker could run on: start worker nodes, or wait for them; "
            "to plan for nodes that are still to come describe them with --nodes and the options beside it"
        )
    return facts


def _await_nodes(device: DeviceKind | None, patience: float, num_nodes: int | None) -> None:
    """Until `num_nodes` are there; where their number is not known, until a while after the last one came."""
    deadline = time.monotonic() + patience
    last_change, count = time.monotonic(), 0
    while time.monotonic() < deadline:
        time.sleep(_LOOK_INTERVAL)
        found = nodes_now(device)
        if found is not None and found.num_nodes != count:
            last_change, count = time.monotonic(), found.num_nodes
        if (count >= num_nodes) if num_nodes else (count and time.monotonic() - last_change > _SETTLE):
            return


@contextmanager
def _own_environment() -> Iterator[None]:
    """What a cluster of this process's own is started in: nobody without its token may do anything in it.

    Whatever the surroundings say: with RAY_AUTH_MODE=disabled anyone who reaches the machine could run code here, since
    Ray's servers listen on all of its addresses. The token stands in the environment of the cluster's processes, which
    their user alone can read, and in no file.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    _read_environment_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_environment_again()


def _read_environment_again() -> None:
    # Ray reads these variables once a process, and nothing public makes it read them again.
    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _reason(address: str | None, error: Exception) -> str:
    """One sentence of what Ray failed for, with the setting that mends it."""
    text = " ".join(str(error).split())
    if "AF_UNIX path length" in text:
        return f"Ray's sockets have too long a path ({text:.200}): set RAY_TMPDIR to a short one, such as /tmp/r"
    if isinstance(error, PermissionError) or "Permission denied" in text:
        return f"Ray cannot write its files ({text:.200}): set RAY_TMPDIR and HOME to directories that you may write to"
    if "ersion mismatch" in text:
        return f"Ray or Python is of another version on the cluster ({text:.400}): install the cluster's versions here"
    if type(error).__name__ == "AuthenticationError" or "nauthenticated" in text or "auth token" in text.lower():
        return (
            f"the cluster wants a token, or another one ({text:.200}): `ray get-auth-token --generate` on the head "
            "makes one; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here to a copy of it"
        )
    if address is None:
        return f"Ray cannot be started on this machine ({text:.300}): see its logs in /tmp/ray/session_latest/logs"
    return f"no Ray cluster answers at {address!r} ({text:.300}): {_START}"


@contextmanager
def cluster(
    address: str | None,
    num_cpus: int | None,
    *,
    device: DeviceKind | None = None,
    patience: float = 0.0,
    num_nodes: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[ClusterFacts]:
    """Joins the Ray cluster at `address`, or starts one here; gives what it holds.

    A cluster that is started here takes no work from anyone else: it has a token of its own. It does listen: Ray's
    control service, its node manager and two exporters of metrics do so on all addresses of the machine, whatever they
    are told; without the token they serve figures and nothing else.

    Args:
        address: None to start one.
        num_cpus: CPUs of a cluster started here; may be more than the machine has, then workers share them.
        device: what the job asks for; None where it takes cards if there are any.
        patience: seconds to wait for nodes that a worker can run on.
        num_nodes: how many to wait for; None for the first one and those that follow it at once.
        tell: told of that, and of nodes that are unlike.

    Raises:
        ClusterError: nothing answers at `address`, or no node comes.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    already = ray.is_initialized()
    if already:
        yield _wait_for_nodes(device, patience, tell, num_nodes)
        return
    if address is not None:
        _refuse_silence(address)
        with _initialized(address, {**options, "address": address}):
            yield _wait_for_nodes(device, patience, tell, num_nodes)
        return
    if os.environ.get("RAY_ADDRESS"):
        tell(
            f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']!r}, which is not joined without --address: a cluster of this "
            "job's own is started on this machine"
        )
    options |= {"address": "local", "include_dashboard": False}
    options |= {"num_cpus": max(num_cpus or 1, ClusterFacts.of_this_machine().num_cpus)}
    with _own_environment(), _initialized(None, options):
        facts = _wait_for_nodes(None, 0.0, tell)
        yield dataclasses.replace(facts, memory_bytes=ClusterFacts.of_this_machine().memory_bytes)


@contextmanager
def _initialized(address: str | None, options: dict[str, Any]) -> Iterator[None]:
    try:
        ray.init(**options)
    except Exception as error:
        raise ClusterError(_reason(address, error)) from error
    try:
        with _stopped_by_signal():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _stopped_by_signal() -> Iterator[None]:
    """SIGTERM, by which `ray job stop` and Kubernetes end a job, interrupts it as Ctrl-C does, so that it says how to
    go on; Ray's own handler prints a stack trace in C++ and ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
