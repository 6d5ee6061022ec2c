"""What a process runs on: versions that must be the same everywhere, and the CPU that the sums come from."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from threadpoolctl import threadpool_info

from gs_dist import __version__
from gs_dist.checkpoint.manifest import LayerManifest, MadeWith
from gs_dist.errors import CheckpointError, ClusterError
from gs_dist.processor import multiplies_bfloat16

__all__ = ["Software", "check_sources", "check_versions", "kernel_note", "mixture_note", "package_version"]

_VERSIONED = ("mindspore", "numpy", "scipy")


@dataclass(frozen=True, kw_only=True)
class Software:
    """Versions by name, CPU kernels, and the machine's name.

    Of the kernels, what decides the last bits: BLAS's, and products of bfloat16 (`x86_64 SkylakeX bfloat16`).
    """

    versions: Mapping[str, str]
    kernel: str
    node: str

    @property
    def made_with(self) -> MadeWith:
        """What of it decides the bytes of a layer; nothing that tells of the machine."""
        versions = {name: version for name, version in self.versions.items() if name != "python"}
        return MadeWith(versions=versions, kernel=self.kernel)

    @classmethod
    def here(cls) -> Software:
        """Of this process."""
        versions = {"gs-dist": __version__, "python": ".".join(platform.python_version_tuple()[:2])}
        versions |= {name: package_version(name) for name in _VERSIONED}
        kernels = {str(library["architecture"]) for library in threadpool_info() if "architecture" in library}
        products = ["bfloat16"] if multiplies_bfloat16() else []
        kernel = " ".join([platform.machine(), *sorted(kernels), *products])
        return cls(versions=versions, kernel=kernel, node=platform.node())


@cache
def package_version(name: str) -> str:
    """Of an installed package; read from its files once a process."""
    return importlib.metadata.version(name)


def mixture_note(parts: Mapping[int, LayerManifest]) -> str | None:
    """What to tell of layers that were published on different CPU kernels, None where they are alike."""
    layers: dict[str, list[int]] = {}
    for layer, part in sorted(parts.items()):
        layers.setdefault(part.made_with.kernel or "unknown kernels", []).append(layer)
    if len(layers) < 2:
        return None
    told = ", ".join(f"layers {', '.join(map(str, found))} on {kernel}" for kernel, found in layers.items())
    return f"published on different CPU kernels ({told}): on other hardware the last bits of a layer may differ"


def check_versions(mine: Software, workers: Mapping[Any, Software]) -> None:
    """Compares the workers' versions with the coordinator's.

    Raises:
        ClusterError: a worker's differ.
    """
    for worker, software in workers.items():
        names = sorted(mine.versions.keys() | software.versions.keys())
        pairs = [(name, software.versions.get(name), mine.versions.get(name)) for name in names]
        differing = [(name, theirs, ours) for name, theirs, ours in pairs if theirs != ours]
        if differing:
            told = ", ".join(
                f"{name} {theirs or '(none)'}, and the coordinator {name} {ours or '(none)'}"
                for name, theirs, ours in differing
            )
            raise ClusterError(
                f"{worker} (node {software.node}) has {told}: install the same versions on every node, or have Ray do "
                "so with a runtime_env or one image for all nodes"
            )


def check_sources(source: str, workers: Mapping[Any, str], software: Mapping[Any, Software]) -> None:
    """Compares the float checkpoint that each worker reads with the coordinator's, by fingerprint.

    Raises:
        CheckpointError: a worker reads another one, or another state of it.
    """
    for worker, found in workers.items():
        if found != source:
            raise CheckpointError(
                f"{worker} (node {software[worker].node}) reads another checkpoint than the coordinator (fingerprint "
                f"{found[:12]}, and {source[:12]} here): `model` must name the same files on every node; copy them "
                "anew, or put them on a file system that all nodes share"
            )


def kernel_note(workers: Mapping[Any, Software]) -> str | None:
    """What to tell where workers sum on different CPU kernels, None where they are alike."""
    first_of: dict[str, Any] = {}
    for worker, software in workers.items():
        first_of.setdefault(software.kernel, worker)
    if len(first_of) < 2:
        return None
    told = ", ".join(f"{worker} has {kernel}" for kernel, worker in first_of.items())
    return (
        f"workers run on different CPU kernels ({told}): published bytes may depend on which worker observes and "
        "solves a layer; they are promised to be the same on like hardware"
    )
