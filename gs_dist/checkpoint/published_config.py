"""What of a source's config.json is published: nothing that names code to run, or a path of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["without_machine", "without_quantization"]

_OF_THE_MACHINE = ("auto_map", "_name_or_path")  # code to run, and what may be a path


def without_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json's content without `auto_map` and `_name_or_path`."""
    return {key: value for key, value in config.items() if key not in _OF_THE_MACHINE}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same without `quantization_config` too, nested or not, which engines would take for another method's."""
    kept = {key: value for key, value in without_machine(config).items() if key != "quantization_config"}
    for key, value in kept.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            kept[key] = without_quantization(value)
    return kept
