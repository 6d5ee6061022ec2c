"""Typed reads from a config.json, for the files of `families`; a message names the key and what it must be."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from gs_dist.errors import CheckpointError

__all__ = ["ConfigKeys"]

_MAX_SIZE = 2**31 - 1

_MISSING: Any = object()


class ConfigKeys:
    """Typed reads from one (part of a) config.json; `where` prefixes the key in messages."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self.where = where

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The value, or `default` where it is absent or null; a key without default is required."""
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise CheckpointError(
                f"config.json: the key {self.where}{key} is missing; a decoder's own config.json states it. "
                "The text_config of a larger model may leave it out: then save its language model by itself"
            )
        return default

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        """The refusal of a value: `wanted` says what it must be."""
        return CheckpointError(f"config.json: {self.where}{key} is {self.values.get(key)!r:.200}; it must be {wanted}")

    def size(self, key: str, default: Any = _MISSING, maximum: int = _MAX_SIZE) -> int:
        """A whole number above 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= maximum:
            raise self.wrong(key, f"a whole number from 1 to {maximum}")
        return value

    def positive(self, key: str, default: Any = _MISSING) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise self.wrong(key, "a finite number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where it is absent."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, served: tuple[str, ...], default: Any = _MISSING) -> str:
        """One of the words in `served`."""
        value = self.get(key, default)
        if value not in served:
            raise CheckpointError(
                f"config.json: {self.where}{key} is {value!r:.200}, which is not served; served are {', '.join(served)}"
            )
        return str(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or none."""
        value = self.get(key, ())
        ids = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def table(self, key: str) -> ConfigKeys | None:
        """A table under a key, None where it is absent."""
        value = self.get(key, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "a table of keys, or null")
        return ConfigKeys(value, f"{self.where}{key}.")
