"""Distributed post-training quantisation of large language models on Ray and MindSpore.

`quantize`, `plan`, `evaluate`, `load_summary` and `show_report` are the commands for Python; `__init__.pyi` has their
types.
"""

from importlib import import_module
from typing import Any

from gs_dist.processor import choose_blas_core

__version__ = "0.1.0"
__all__ = ["JobStatus", "evaluate", "load_summary", "plan", "quantize", "show_report"]

choose_blas_core()  # here, since no module of the package can import NumPy before this one

_HOMES = {
    "JobStatus": "gs_dist.progress",
    "evaluate": "gs_dist.terminal.library",
    "load_summary": "gs_dist.terminal.library",
    "plan": "gs_dist.terminal.library",
    "quantize": "gs_dist.terminal.library",
    "show_report": "gs_dist.terminal.library",
}


def __getattr__(name: str) -> Any:
    """The commands, imported when they are asked for: the package itself imports nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """With the names that are found when they are asked for."""
    return sorted({*globals(), *_HOMES})
