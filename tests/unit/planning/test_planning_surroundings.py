from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.surroundings import Surroundings, memory_kills

GIB = 1 << 30
WHOLE = Surroundings(
    memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), num_cpus=len(os.sched_getaffinity(0))
)
V2 = "31 23 0:28 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1 = "\n".join(
    f"{number} 31 0:{number} {{root}} /sys/fs/cgroup/{place} rw - cgroup cgroup rw,{controllers}"
    for number, (place, controllers) in enumerate([("memory", "memory"), ("cpu,cpuacct", "cpu,cpuacct")], 32)
)
SMALL = GIB // 4


def tree(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    """What the kernel shows in /proc and /sys."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n{mountinfo}\n")
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


CASES = {
    "v2, a container": ("0::/", V2.format(root="/"), {"memory.max": str(SMALL), "cpu.max": "100000 100000"}),
    "v2, no limit": ("0::/", V2.format(root="/"), {"memory.max": "max", "cpu.max": "max 100000"}),
    "v2, the outer group is smaller": (
        "0::/slurm/job_7/step_0",
        V2.format(root="/"),
        {
            "slurm/job_7/memory.max": str(SMALL),
            "slurm/job_7/step_0/memory.max": str(2 * GIB),
            "slurm/memory.max": "max",
            "slurm/job_7/cpu.max": "50000 50000",
        },
    ),
    "v2, the inner group is smaller": (
        "0::/user.slice/run-1.scope",
        V2.format(root="/"),
        {
            "user.slice/memory.max": str(3 * GIB),
            "user.slice/run-1.scope/memory.max": str(SMALL),
            "user.slice/run-1.scope/cpu.max": "150000 100000",
        },
    ),
    "v1, a container whose mounts begin at its group": (
        "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/",
        V1.format(root="/docker/abc"),
        {
            "memory/memory.limit_in_bytes": str(SMALL),
            "cpu,cpuacct/cpu.cfs_quota_us": "100000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    ),
    "v1, no limit": (
        "5:memory:/\n4:cpu,cpuacct:/",
        V1.format(root="/"),
        {
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    ),
    "v1, nested": (
        "5:memory:/slurm/uid_0/job_1\n4:cpu,cpuacct:/slurm/uid_0/job_1",
        V1.format(root="/"),
        {
            "memory/slurm/uid_0/memory.limit_in_bytes": str(SMALL),
            "memory/slurm/uid_0/job_1/memory.limit_in_bytes": "9223372036854771712",
            "cpu,cpuacct/slurm/cpu.cfs_quota_us": "100000",
            "cpu,cpuacct/slurm/cpu.cfs_period_us": "100000",
        },
    ),
    "both versions, the limit in the second": (
        "5:memory:/\n4:cpu,cpuacct:/\n0::/job",
        V1.format(root="/") + "\n41 31 0:41 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        {"unified/job/memory.max": str(SMALL), "unified/job/cpu.max": "100000 100000"},
    ),
    "mounts that tell nothing": ("", "", {"memory.max": str(SMALL), "cpu.max": "100000 100000"}),
    "a place with blanks, damaged values": (
        "0::/a b",
        V2.format(root=r"/a\040b"),
        {"memory.max": str(SMALL), "cpu.max": "100000 100000", "memory.limit_in_bytes": "none"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_limit_on_the_way_up_counts(tmp_path: Path, name: str) -> None:
    """Both versions of control groups, nested ones, and mounts that begin within the hierarchy."""
    found = Surroundings.of_this_process(tree(tmp_path, *CASES[name]))
    assert found == (WHOLE if "no limit" in name else Surroundings(memory_bytes=SMALL, num_cpus=1))


def test_part_of_a_core_is_one(tmp_path: Path) -> None:
    """Half a core's time still runs one thread, and one and a half run one too."""
    for quota in ("50000 100000", "150000 100000"):
        root = tree(tmp_path / quota.replace(" ", "-"), "0::/", V2.format(root="/"), {"cpu.max": quota})
        assert Surroundings.of_this_process(root).num_cpus == 1


def test_processes_ended_for_lack_of_memory_are_counted(tmp_path: Path) -> None:
    """Each version tells the kills of a group in a file of its own; none is told where there is no such file."""
    v2 = {"job/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0", "memory.events": "oom 3\noom_kill 2"}
    v1 = {"memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4"}
    assert memory_kills(tree(tmp_path / "2", "0::/job", V2.format(root="/"), v2)) == 2
    assert memory_kills(tree(tmp_path / "1", "5:memory:/job", V1.format(root="/"), v1)) == 4
    assert memory_kills(tree(tmp_path / "0", "0::/job", V2.format(root="/"), {})) == 0


@pytest.fixture
def group() -> Iterator[tuple[Path, Path]]:
    """A real group and one within it, of the version that this machine has for memory."""
    base = next((path for path in map(Path, ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")) if path.is_dir()), None)
    outer = Path("/nowhere") if base is None else base / f"gs-dist-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        outer.mkdir()
        if not (outer / "memory.limit_in_bytes").exists():
            (outer / "cgroup.subtree_control").write_text("+memory")
        inner.mkdir()
        limit = outer / ("memory.limit_in_bytes" if (outer / "memory.limit_in_bytes").exists() else "memory.max")
        limit.write_text(str(GIB))
    except OSError as error:
        with suppress(OSError):
            inner.rmdir()
        with suppress(OSError):
            outer.rmdir()
        pytest.skip(f"control groups may not be made here ({error.strerror}): run it as root, outside of a container")
    yield outer, inner
    inner.rmdir()
    outer.rmdir()


def test_a_real_group_limits_what_is_planned(group: tuple[Path, Path]) -> None:
    """A process in a group within a limited one, as the kernel has them, sees that limit."""
    script = "from gs_dist.planning.cluster_facts import ClusterFacts as C; print(C.of_this_machine().memory_bytes)"
    enter = f"echo $$ > {group[1] / 'cgroup.procs'} && exec {sys.executable} -c '{script}'"
    ran = subprocess.run(["sh", "-c", enter], capture_output=True, text=True, check=True)
    assert int(ran.stdout) == GIB
    assert ClusterFacts.of_this_machine().memory_bytes > GIB
