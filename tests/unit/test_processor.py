"""BLAS gets the kernels that the processor has, whatever its model."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gs_dist.processor import CORE_SETTING, blas_core, choose_blas_core

AVX512 = frozenset({"avx2", "fma", "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "amx_bf16"})


@pytest.mark.parametrize(
    ("machine", "flags", "core"),
    [
        ("x86_64", AVX512, "SkylakeX"),
        ("x86_64", AVX512 - {"avx512vl"}, "Haswell"),
        ("x86_64", frozenset({"avx2", "fma"}), "Haswell"),
        ("x86_64", frozenset({"avx2"}), None),
        ("x86_64", frozenset[str](), None),
        ("aarch64", frozenset({"asimd", "sve"}), None),
    ],
)
def test_kernels_are_chosen_by_instruction_set(machine: str, flags: frozenset[str], core: str | None) -> None:
    """The widest vectors that the processor has; other architectures are left to OpenBLAS."""
    assert blas_core(machine, flags) == core


def test_a_core_that_the_environment_names_stays() -> None:
    environment = {CORE_SETTING: "Zen"}
    choose_blas_core(environment)
    assert environment == {CORE_SETTING: "Zen"}


def test_numpy_and_scipy_run_the_chosen_kernels_in_a_process_that_imports_the_package() -> None:
    """Seen in the libraries themselves, in a process as a worker is one."""
    chosen: dict[str, str] = {}
    choose_blas_core(chosen)
    if not chosen:
        pytest.skip("this processor has no vectors that the package chooses by; run it on x86-64 with AVX2")
    asked = (
        "import gs_dist.solvers.blas, threadpoolctl\n"
        "found = threadpoolctl.threadpool_info()\n"
        "print(*{library['architecture'] for library in found if library['user_api'] == 'blas'})"
    )
    environment = {name: value for name, value in os.environ.items() if name != CORE_SETTING}
    told = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [chosen[CORE_SETTING]]
