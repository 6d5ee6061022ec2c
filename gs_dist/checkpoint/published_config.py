"""What of a source's config.json is published: nothing that names code to run, or a path of the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gs_dist.checkpoint.weight_files import CONFIG_FILE
from gs_dist.errors import CheckpointError

__all__ = ["refuse_unwritable", "without_machine", "without_quantization"]

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


def refuse_unwritable(config: Mapping[str, Any]) -> None:
    """Refuses values that no JSON file holds: Python reads Infinity, NaN and 1e999, and cannot publish them again.

    Raises:
        CheckpointError: there is one; the message names the key.
    """
    for key, value in config.items():
        try:
            json.dumps({key: value}, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # half a surrogate pair is a ValueError, too
            raise CheckpointError(
                f"{CONFIG_FILE}: {key!r:.100} holds what JSON cannot ({error!s:.100}): {value!r:.100}; correct the "
                "value, or remove the key if it says nothing of the model"
            ) from error
