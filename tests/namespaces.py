"""Two machines that are none: namespaces of this machine with a cable between them, and a Ray node on each.

A machine has its own network, processes, host name, /tmp/ray and /dev/shm; files are shared, as on a cluster's storage.
All of it hangs on one process, which ends when the test's does: nothing is seen in the host's network, nothing is left.
Linux only, and only with the right to make namespaces.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray
from faults import MARK, environment, marked_processes, worker_processes

PORT = 6379
ADDRESSES = {"first": "10.77.0.1", "second": "10.77.0.2"}
HEAD = f"{ADDRESSES['first']}:{PORT}"
# Ray gives a node that is silent about a minute; here a few seconds.
_IMPATIENCE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
_APART = ("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")


def why_not() -> str:
    """What keeps machines from being made here, "" where nothing does."""
    missing = [name for name in ("ip", "unshare", "nsenter", "mount", "hostname") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (iproute2, util-linux, hostname)"
    cable = "ip link add name end0 type veth peer name end1"
    trial = subprocess.run(["unshare", *_APART, "sh", "-c", cable], capture_output=True, text=True, check=False)
    if trial.returncode == 0:
        return ""
    said = next(iter(trial.stderr.splitlines()), "no reason given")
    return (
        f"namespaces may not be made here ({said}): run it as root, in a container with --privileged, or under "
        "`unshare --map-root-user --mount`"
    )


class Machine:
    """Namespaces that live as long as this object is open; `mark` is in the environment of all that runs there."""

    def __init__(self, name: str, mark: str, directory: Path) -> None:
        self.name = name
        self.mark = f"{mark}-{name}"
        self.address = ADDRESSES[name]
        Path("/tmp/ray").mkdir(exist_ok=True)
        setup = (
            f"hostname {name} && ip link set lo up && mount --bind {directory} /tmp/ray "
            "&& mount -t tmpfs tmpfs /dev/shm && echo ready && cat; true"  # a shell as first process, to reap
        )
        self._process = subprocess.Popen(
            ["unshare", *_APART, "sh", "-c", setup], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "what it misses is on stderr"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(children.read_text())

    def inside(self, *command: str) -> list[str]:
        """The command as one that runs on the machine."""
        entering = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--pid", "--"]
        # Ray asks for a token where the user happens to have one, and not on every node.
        return [*entering, "env", f"{MARK}={self.mark}", "RAY_AUTH_MODE=disabled", *command]

    def ip(self, *arguments: str) -> None:
        """Runs `ip` in the machine's network; a process named by its id is one of the host's."""
        subprocess.run(["nsenter", f"--target={self.pid}", "--net", "--", "ip", *arguments], check=True)

    def start_ray(self, extra: Mapping[str, str] | None = None, *, num_cpus: int = 1) -> None:
        """Starts a Ray node: the first machine's is the head, which the second's joins."""
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"] if self.name == "first" else []
        where += [] if where else [f"--address={HEAD}"]
        options = [f"--node-ip-address={self.address}", f"--num-cpus={num_cpus}", f"--object-store-memory={128 << 20}"]
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", *where, *options]
        started = subprocess.run(
            self.inside(*command),
            env={**environment(self.mark), **_IMPATIENCE, **(extra or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert started.returncode == 0, started.stdout + started.stderr

    @property
    def has_node(self) -> bool:
        """Whether a Ray node lives here."""
        return bool(marked_processes(self.mark, str(Path(ray.__file__).parent / "core/src/ray/raylet/raylet")))

    def workers(self) -> list[int]:
        """Processes of stage workers."""
        return worker_processes(self.mark)

    def close(self) -> None:
        """Ends all that runs on the machine."""
        assert self._process.stdin is not None
        self._process.stdin.close()  # what the first process waits for; with it go all the others
        try:
            self._process.wait(30)
        finally:
            self._process.kill()


class Network:
    """Two machines and a cable."""

    def __init__(self, first: Machine, second: Machine) -> None:
        self.first = first
        self.second = second
        first.ip("link", "add", "name", "cable", "type", "veth", "peer", "name", "cable", "netns", str(second.pid))
        for machine in (first, second):
            machine.ip("address", "add", f"{machine.address}/24", "dev", "cable")
            machine.ip("link", "set", "cable", "up")

    def cut(self) -> None:
        """Takes the cable out: what is sent is lost, and nobody is told."""
        self.second.ip("link", "set", "cable", "down")

    def mend(self) -> None:
        self.second.ip("link", "set", "cable", "up")

    def ray(self, code: str) -> str:
        """What a script prints that runs on the first machine, `ray` joined to the cluster."""
        script = f"import ray\nray.init(address={HEAD!r}, log_to_driver=False, logging_level='ERROR')\n{code}"
        return subprocess.run(
            self.first.inside(sys.executable, "-c", script),
            env=environment(self.first.mark),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout.strip()


@contextmanager
def network(mark: str) -> Iterator[Network]:
    """Two machines that reach each other, without Ray."""
    with ExitStack() as stack:
        machines = []
        for name in ADDRESSES:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="gs-dist-ray-"))
            machines.append(Machine(name, mark, Path(directory)))
            stack.callback(machines[-1].close)
        yield Network(*machines)
