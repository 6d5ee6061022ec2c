"""Names of Golden Stick that are not here, and what to use in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["missing_names"]


def missing_names(module: str, instead: Mapping[str, str]) -> Callable[[str], object]:
    """A module's `__getattr__` that tells what takes the place of names that it lacks.

    Args:
        module: the module's `__name__`.
        instead: name to what to do in its place.
    """

    def missing(name: str) -> object:
        if name in instead:
            raise ImportError(f"{module} has no {name}: {instead[name]}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return missing
