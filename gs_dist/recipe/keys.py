"""Every key of a recipe with its values, default and meaning, from the models that check recipes."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

__all__ = ["RecipeKey", "Values", "recipe_keys"]

_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_BOUNDS = (("ge", "from {}"), ("gt", "above {}"), ("le", "to {}"))


@dataclass(frozen=True)
class Values:
    """Beside a type: what may be written, where the type alone does not tell."""

    text: str


@dataclass(frozen=True, kw_only=True)
class RecipeKey:
    """A key: dotted path, what may be written, its default as YAML (None where it is required), and what it does."""

    path: str
    values: str
    default: str | None
    description: str

    def __str__(self) -> str:
        default = "required" if self.default is None else f"default {self.default}"
        return f"{self.path}: {self.values}; {default}\n    {self.description}"


def recipe_keys(model: type[BaseModel], prefix: str = "") -> Iterator[RecipeKey]:
    """The keys of a model and of the sections in it, in the order of their definition.

    Args:
        model: such as `CalibrationConfig`.
        prefix: of their paths.
    """
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from recipe_keys(section, f"{prefix}{name}.")
        else:
            yield RecipeKey(
                path=prefix + name,
                values=_values_of(field),
                default=None if field.is_required() else _plain(field.default),
                description=" ".join((field.description or "").split()),
            )


def _values_of(field: FieldInfo) -> str:
    return _values(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)


def _values(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        told = [entry.text for entry in arguments[1:] if isinstance(entry, Values)]
        return told[0] if told else _values(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return _either(_words(annotation))
    if origin in (Union, types.UnionType):
        return _either(list(dict.fromkeys(word for part in arguments for word in _words(part))))
    if origin is tuple:
        return "a list of them" if len(arguments) > 1 else "a list"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _either([str(member.value) for member in annotation])
    return _NAMES[annotation]


def _words(annotation: Any) -> list[str]:
    """Each of a literal's values, or the one text of another type."""
    literal = get_origin(annotation) is Literal
    return [str(value) for value in get_args(annotation)] if literal else [_values(annotation)]


def _either(choices: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)


def _bounds(metadata: tuple[Any, ...]) -> str:
    flat = [part for entry in metadata for part in (entry.metadata if isinstance(entry, FieldInfo) else (entry,))]
    told = [(getattr(part, name, None), text) for part in flat for name, text in _BOUNDS]
    found = [text.format(bound) for bound, text in told if bound is not None]
    return "".join(f" {text}" for text in found)


def _plain(value: Any) -> str:
    """As YAML."""
    plain = value.value if isinstance(value, Enum) else value
    return plain if isinstance(plain, str) else json.dumps(plain).replace('"', "")
