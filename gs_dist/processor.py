"""What this machine's processor multiplies matrices with, as its instruction sets tell."""

from __future__ import annotations

import os
import platform
from collections.abc import MutableMapping
from functools import cache
from pathlib import Path

__all__ = ["CORE_SETTING", "blas_core", "choose_blas_core", "multiplies_bfloat16"]

CORE_SETTING = "OPENBLAS_CORETYPE"
"""Read by OpenBLAS when it is loaded (its `driver/others/dynamic.c`)."""

_X86 = ("x86_64", "AMD64")

# What a core's kernels need, the widest vectors first (`cpu_features` of the same file).
_CORES = (
    ("SkylakeX", frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"})),
    ("Haswell", frozenset({"avx2", "fma"})),
)


def blas_core(machine: str, flags: frozenset[str]) -> str | None:
    """OpenBLAS's name for the core whose kernels such a processor runs, None to leave the choice to OpenBLAS.

    Args:
        machine: such as `x86_64`, from `platform.machine()`.
        flags: the instruction sets that the processor and the system offer, as `/proc/cpuinfo` names them.
    """
    if machine not in _X86:
        return None
    return next((core for core, needed in _CORES if needed <= flags), None)


def multiplies_bfloat16() -> bool:
    """Whether this processor has products of bfloat16, summed in float32: AVX-512 BF16 or AMX."""
    return platform.machine() in _X86 and not {"avx512_bf16", "amx_bf16"}.isdisjoint(_flags_here())


def choose_blas_core(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has OpenBLAS choose by instruction set, unless the environment names a core already.

    By itself it goes by the processor's model, and for a model younger than it takes kernels from 2004: the
    OpenBLAS 0.3.23 of NumPy 1.26 multiplies six times slower on an Emerald Rapids. One choice for all processors
    with the same vectors also gives a layer the same last bits on more of them.

    It must run before NumPy is first imported: libraries that are loaded keep their kernels.
    """
    if CORE_SETTING in environment:
        return
    core = blas_core(platform.machine(), _flags_here())
    if core is not None:
        environment[CORE_SETTING] = core


@cache
def _flags_here() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())
