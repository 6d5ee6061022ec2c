"""The text of a recipe: YAML with line numbers in its errors, overrides, and problems told as small manuals."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from gs_dist.errors import RecipeError
from gs_dist.wording import without_secrets

__all__ = ["PUBLISHED_RECIPE", "Document", "Problem", "apply_overrides", "parse_document", "problems_of", "report"]

Document = dict[str, Any]

PUBLISHED_RECIPE = "recipe.yaml"  # in a job's output: the recipe as it was run
MAX_RECIPE_BYTES = 1 << 20  # a recipe is a page of text; more is another kind of file
MAX_NODES = 100_000  # YAML aliases can name one node again and again, or name themselves
MAX_DEPTH = 16

_MISSING = "nothing"
_RATIOS = "a number from 0 to 1, or a list of such numbers to search"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a recipe: where (a key path, or empty for the file), and what to do about it."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.path else self.text


def report(source: str, problems: Iterable[Problem]) -> RecipeError:
    """One error that lists every problem once, in order, a line each."""
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return RecipeError("\n".join([f"recipe {source} has {count}:", *(f"  {line}" for line in lines)]))


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-3 as a number, as JSON and YAML 1.2 do."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of a node.

        Raises:
            yaml.constructor.ConstructorError: a key stands twice in one mapping.
        """
        seen: dict[Hashable, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key {key!r} stands twice, first in line {seen[key].line + 1}; keep one of the two",
                    key_node.start_mark,
                )
            if isinstance(key, Hashable):
                seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep=deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _load(text: str) -> Any:
    """Parses one YAML document.

    Raises:
        ValueError: not YAML; the message gives line and column.
    """
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(where + _in_words(what)) from None
    except (ValueError, OverflowError, RecursionError) as error:  # dates and numbers that Python refuses, deep nesting
        raise ValueError(f"found a value that cannot be read ({type(error).__name__}: {error})") from None
    _refuse_expansion(value)
    return value


def _in_words(problem: str) -> str:
    """What the parser says of a text, so that it can stand alone."""
    if problem.startswith("key "):  # of this module
        return problem
    unknown = re.fullmatch(r"could not determine a constructor for the tag '(.*)'", problem)
    if unknown is not None:
        tag = unknown[1].replace("tag:yaml.org,2002:", "!!")
        return f"the tag {tag} means nothing in a recipe; leave it out, or put the text in quotes"
    return f"not YAML ({problem})"


def _refuse_expansion(value: Any) -> None:
    """Refuses documents that are small as text and huge, or endless, once aliases are followed."""
    pending = [(value, 0)]
    count = 0
    while pending:
        item, depth = pending.pop()
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise ValueError(f"found more than {MAX_DEPTH} levels or {MAX_NODES} values; write the recipe flat")
        if isinstance(item, Mapping):
            pending.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, (list, tuple, set)):
            pending.extend((child, depth + 1) for child in item)


def parse_document(text: str, source: str) -> Document:
    """A recipe's YAML as nested dictionaries.

    Raises:
        RecipeError: not YAML (with line and column), a key given twice, or not a mapping.
    """
    if len(text) > MAX_RECIPE_BYTES:
        raise report(source, [Problem(path="", text=f"found more than {MAX_RECIPE_BYTES} bytes; name a recipe's YAML")])
    try:
        value = _load(text)
    except ValueError as error:
        raise report(source, [Problem(path="", text=str(error))]) from None
    if value is None:
        value = {}
    if not isinstance(value, dict):
        found = f"found {describe(value)} at the top; write keys such as 'model: PATH', one a line"
        raise report(source, [Problem(path="", text=found)])
    return value


def _split_override(override: str) -> tuple[list[str], str]:
    """Keys and value text of `key.path=value`; a key in quotes may hold dots and equal signs."""
    keys: list[str] = []
    rest = override
    while True:
        quoted = re.match(r"""'([^']*)'|"([^"]*)\"""", rest)
        plain = re.match(r"[^.='\"]+", rest)
        match = quoted or plain
        if match is None:
            raise ValueError(
                "write key.path=value, with a key that holds dots in quotes: "
                r"layer_policies.'.*mlp\.down_proj'.group_size=64"
            )
        keys.append(match.group(0) if quoted is None else match.group(0)[1:-1])
        separator, rest = rest[match.end() : match.end() + 1], rest[match.end() + 1 :]
        if separator == "=":
            return [key.strip() for key in keys], rest
        if separator != ".":
            raise ValueError("write key.path=value")


def apply_overrides(document: Document, overrides: Sequence[str]) -> tuple[Document, list[Problem]]:
    """A copy of `document` with `key.path=value` applied in order, and what was wrong with them."""
    result: Document = _copied(document)
    problems = []
    for override in overrides:
        try:
            keys, text = _split_override(override)
            value = _load(text)
        except ValueError as error:
            problems.append(Problem(path=f"override {override.partition('=')[0]!r}", text=f"cannot be read; {error}"))
            continue
        table = result
        for key in keys[:-1]:
            inner = table.get(key)
            if inner is None:
                inner = table[key] = {}
            if not isinstance(inner, dict):
                found = f"found {describe(inner)}, which has no keys; write the whole value of {key}"
                problems.append(Problem(path=format_path(keys), text=found))
                break
            table = inner
        else:
            table[keys[-1]] = value
    return result, problems


def _copied(value: Any) -> Any:
    """Nested dictionaries and lists copied, so that YAML aliases are no longer shared."""
    if isinstance(value, dict):
        return {key: _copied(child) for key, child in value.items()}
    return [_copied(child) for child in value] if isinstance(value, list) else value


def describe(value: Any) -> str:
    """A value as it may be printed: short, and without what a URI keeps secret."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a table of keys"
    if isinstance(value, (list, tuple)):
        text = "[" + ", ".join(describe(entry) for entry in value[:8]) + "]"
        return text if len(text) <= 60 else text[:57] + "..."
    shown = without_secrets(value) if isinstance(value, str) else value
    text = repr(shown) if isinstance(value, (str, int, float, bool)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def format_path(keys: Iterable[object]) -> str:
    """A key path with quotes around keys that are not plain names."""
    parts = [str(key) if re.fullmatch(r"\w+", str(key)) else f"'{key}'" for key in keys]
    return ".".join(parts)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model class in an annotation such as `Model`, `Model | None` or `dict[str, Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for model in map(_model_of, get_args(annotation)) if model is not None), None)


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Turns a validation error of `model` into problems; union branches of one key become one problem."""
    grouped: dict[tuple[object, ...], list[tuple[str, str]]] = {}
    for detail in error.errors(include_url=False):
        path, schema = _key_path(detail["loc"], model)
        found, wanted = _explain(dict(detail), schema)
        grouped.setdefault(path, [])
        if (found, wanted) not in grouped[path]:
            grouped[path].append((found, wanted))
    problems = []
    for path, explanations in grouped.items():
        name = format_path(path)
        contradictions = [found for found, wanted in explanations if not wanted]
        problems += [Problem(path=name, text=part) for text in contradictions for part in text.split("; ")]
        founds = list(dict.fromkeys(found for found, wanted in explanations if wanted))
        wanteds = list(dict.fromkeys(wanted for _, wanted in explanations if wanted))
        wanteds = [_RATIOS] if path[-1:] in (("smooth_alpha",), ("weight_clip_ratio",)) else wanteds
        if founds == [_MISSING]:
            problems.append(Problem(path=name, text="missing; this key is required"))
        elif founds:
            problems.append(Problem(path=name, text=f"found {founds[0]}; write {', or '.join(wanteds)}"))
    return problems


def _key_path(loc: Sequence[int | str], model: type[BaseModel]) -> tuple[tuple[object, ...], type[BaseModel]]:
    """The part of an error's location that names keys (pydantic adds names of union branches), and the last model."""
    path: list[object] = []
    current: type[BaseModel] | None = model
    last = model
    in_table = False
    for element in loc:
        if current is not None and not in_table:
            path.append(element)
            field = current.model_fields.get(str(element))
            if field is None:
                break
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            current = _model_of(field.annotation)
            in_table = bool(extra.get("table"))
        elif in_table:
            path.append(element)
            current, in_table = _table_model(model), False
        elif isinstance(element, int):
            path.append(element)
        else:
            break
        last = current if current is not None else last
    return tuple(path), last


def _table_model(model: type[BaseModel]) -> type[BaseModel] | None:
    """What an entry of a table of partial overrides overrides: the model's `ptq` section."""
    field = model.model_fields.get("ptq")
    return None if field is None else _model_of(field.annotation)


def _explain(detail: dict[str, Any], schema: type[BaseModel]) -> tuple[str, str]:
    """What was found and what to write, for one pydantic error; nothing to write for a contradiction."""
    kind, found, bounds = detail["type"], describe(detail["input"]), detail.get("ctx", {})
    simple = {
        "missing": (_MISSING, "a value"),
        "string_type": (found, "text"),
        "int_type": (found, "a whole number"),
        "float_type": (found, "a number"),
        "bool_type": (found, "true or false"),
        "finite_number": (found, "a finite number"),
        "tuple_type": (found, "a list"),
        "dict_type": (found, "a table of keys"),
        "invalid_key": ("a key that is not text", "the key in quotes"),
        "too_short": ("an empty list", "at least one entry"),
        "string_too_short": ("an empty text", "a value"),
    }
    if kind in simple:
        return simple[kind]
    if kind == "extra_forbidden":
        return "an unknown key", _nearest_key(str(detail["loc"][-1]), schema)
    if kind in ("model_type", "model_attributes_type"):
        return found, "a table of keys"
    if kind in ("literal_error", "enum"):
        return found, bounds["expected"].replace("'", "") + _or_null(detail["loc"], schema)
    for name, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if name in bounds:
            return found, f"{words} {bounds[name]}"
    if kind == "recipe":
        return found, bounds["write"]
    return detail["msg"].removeprefix("Value error, "), ""


def _or_null(loc: Sequence[object], schema: type[BaseModel]) -> str:
    field = schema.model_fields.get(str(loc[-1]))
    return ", or null" if field is not None and type(None) in get_args(field.annotation) else ""


def _nearest_key(key: str, schema: type[BaseModel]) -> str:
    valid = list(schema.model_fields)
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"{near[0]} if that is meant" if near else f"one of {', '.join(valid)}"
