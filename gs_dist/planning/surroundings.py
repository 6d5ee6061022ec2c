"""What this process may use of its machine: memory and cores, by the smallest limit that stands anywhere around it.

A container, a Slurm step and a systemd unit each limit by a control group, groups lie in groups, and the kernel ends a
process at the smallest limit on the way up. Version 1 has a hierarchy for each controller, version 2 one for all, and a
machine may have both.

Formats: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, cpu.max) and cgroup-v1/memory.html,
scheduler/sched-bwc.html (memory.limit_in_bytes, cpu.cfs_quota_us); proc_pid_mountinfo(5), cgroups(7).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["Surroundings", "memory_kills"]

_NO_LIMIT = 1 << 60  # version 1 writes the largest number of pages where there is none


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Memory and cores of this process.

    Attributes:
        memory_bytes: of the machine, or the smallest limit.
        num_cpus: cores that it may run on, or as many as its quota of their time comes to; at least 1.
    """

    memory_bytes: int
    num_cpus: int

    @classmethod
    def of_this_process(cls, root: Path = Path("/")) -> Surroundings:
        """As they are now.

        Args:
            root: where proc and sys are; another one in tests.
        """
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        groups = list(dict.fromkeys(_groups(root)))
        limits = [limit for group in groups if (limit := _memory_limit(group)) is not None]
        quotas = [quota for group in groups if (quota := _quota(group)) is not None]
        return cls(memory_bytes=min([memory, *limits]), num_cpus=max(1, int(min([cores, *quotas]))))


def memory_kills(root: Path = Path("/")) -> int:
    """How many processes of this one's groups the kernel has ended for lack of memory, as far as it tells.

    Args:
        root: where proc and sys are; another one in tests.
    """
    files = ("memory.events", "memory.oom_control")
    told = [_read(group / name) for group in dict.fromkeys(_groups(root)) for name in files]
    counts = [found for text in told for found in re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE)]
    return max(map(int, counts), default=0)  # version 2 counts a kill in every group around it


def _groups(root: Path) -> Iterator[Path]:
    """Directories of this process's groups and of all that these lie in, as far as they are mounted."""
    own = dict(_own_groups(_read(root / "proc/self/cgroup")))
    for controllers, within, mounted in _mounts(_read(root / "proc/self/mountinfo")):
        base = root / mounted.lstrip("/")
        for controller in controllers:
            group = own.get(controller)
            if group is None:
                continue
            # A container's mount begins at its own group; what lies outside of the mount cannot be seen.
            inner = PurePosixPath(group)
            parts = inner.relative_to(within).parts if inner.is_relative_to(within) else ()
            for end in range(len(parts), -1, -1):
                yield base.joinpath(*parts[:end])
    for usual in ("", "memory", "cpu", "cpu,cpuacct"):  # where mounts tell nothing, as in some sandboxes
        yield root / "sys/fs/cgroup" / usual


def _own_groups(text: str) -> Iterator[tuple[str, str]]:
    """Controller ("" for version 2) and path of each line of /proc/self/cgroup."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        yield from ((controller, path) for controller in controllers.split(","))


def _mounts(text: str) -> Iterator[tuple[list[str], str, str]]:
    """Controllers, path within their hierarchy and place of each mount of control groups."""
    for line in text.splitlines():
        before, _, behind = line.partition(" - ")
        fields, kind = before.split(" "), behind.split(" ")
        if len(fields) < 5 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = [""] if kind[0] == "cgroup2" else kind[-1].split(",")
        yield controllers, _unescaped(fields[3]), _unescaped(fields[4])


def _unescaped(path: str) -> str:
    """The kernel writes a blank as a backslash and 040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _memory_limit(group: Path) -> int | None:
    """Bytes, None for no limit."""
    found = [_number(_read(group / name)) for name in ("memory.max", "memory.limit_in_bytes")]
    limits = [number for number in found if number is not None and 0 < number < _NO_LIMIT]
    return min(limits, default=None)


def _quota(group: Path) -> float | None:
    """Cores that the group's share of time comes to, None for no limit."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    share, whole = _number(quota), _number(period)
    return share / whole if share is not None and whole and share > 0 else None


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text.strip()) else None


def _read(path: Path) -> str:
    """A small file, "" where it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
