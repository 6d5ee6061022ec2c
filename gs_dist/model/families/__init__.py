"""Model families, one file each: what its config.json means as a `DecoderArchitecture`.

A module of this folder is a family. It has `MODEL_TYPES`, the values of `model_type` that it reads, and
`read(keys)`. Adding one takes its file and its tests; nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from gs_dist.errors import CheckpointError
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.decoder import DecoderArchitecture

__all__ = ["FAMILIES", "find_families", "read_architecture"]


def find_families() -> dict[str, Callable[[ConfigKeys], DecoderArchitecture]]:
    """The families of this folder: `model_type` to what reads a config.json of that type."""
    readers = {}
    for module_info in pkgutil.iter_modules(__path__):
        family = importlib.import_module(f"{__name__}.{module_info.name}")
        readers.update(dict.fromkeys(family.MODEL_TYPES, family.read))
    return readers


FAMILIES: Mapping[str, Callable[[ConfigKeys], DecoderArchitecture]] = find_families()
"""`model_type` to what reads a config.json of that type."""


def read_architecture(config: Mapping[str, Any]) -> DecoderArchitecture:
    """Reads a Hugging Face config.json's content.

    Defaults of absent keys are those of the model type's configuration class in transformers.

    Raises:
        CheckpointError: a model type that is not served, a missing or ill-typed key, sizes that
            contradict each other, a checkpoint that is quantised already. The message names the key.
    """
    keys = ConfigKeys(config)
    model_type = keys.choice("model_type", tuple(FAMILIES))
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            "config.json: the key quantization_config is present, so this checkpoint is quantised already; "
            "set model to the directory of the float checkpoint it was made from"
        )
    keys.choice("hidden_act", ("silu",), default="silu")
    return FAMILIES[model_type](keys)
