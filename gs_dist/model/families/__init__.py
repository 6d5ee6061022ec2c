"""Model families, one file each: what its config.json means as a `DecoderArchitecture`.

A module of this folder is a family. It has `MODEL_TYPES`, the values of `model_type` that it reads, `read(keys)`, and
`KEYS`, what it makes of every key of its configuration class (`known_keys`). Adding one takes its file and its tests;
nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from gs_dist.errors import CheckpointError
from gs_dist.model.config_keys import ConfigKeys
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.known_keys import KnownKeys

__all__ = ["FAMILIES", "KNOWN_KEYS", "find_families", "read_architecture", "unknown_keys"]


def find_families() -> dict[str, Callable[[ConfigKeys], DecoderArchitecture]]:
    """The families of this folder: `model_type` to what reads a config.json of that type."""
    readers = {}
    for module_info in pkgutil.iter_modules(__path__):
        family = importlib.import_module(f"{__name__}.{module_info.name}")
        readers.update(dict.fromkeys(family.MODEL_TYPES, family.read))
    return readers


def _known_keys() -> dict[str, KnownKeys]:
    found: dict[str, KnownKeys] = {}
    for module_info in pkgutil.iter_modules(__path__):
        family = importlib.import_module(f"{__name__}.{module_info.name}")
        found.update(dict.fromkeys(family.MODEL_TYPES, getattr(family, "KEYS", KnownKeys())))
    return found


FAMILIES: Mapping[str, Callable[[ConfigKeys], DecoderArchitecture]] = find_families()
"""`model_type` to what reads a config.json of that type."""

KNOWN_KEYS: Mapping[str, KnownKeys] = _known_keys()
"""`model_type` to what is known of the keys of such a config.json."""


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
    KNOWN_KEYS.get(model_type, KnownKeys()).refuse_others(keys)
    keys.choice("hidden_act", ("silu",), default="silu")
    return FAMILIES[model_type](keys)


def unknown_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a config.json that was read, of which nothing is known: no class of its type in transformers has them."""
    return KNOWN_KEYS.get(str(config["model_type"]), KnownKeys()).unknown(ConfigKeys(config))
