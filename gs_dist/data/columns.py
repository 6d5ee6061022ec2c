"""Columns that samples can be made of: found by name, also within structs, and told apart by their types."""

from __future__ import annotations

from enum import Enum

import pyarrow as pa

from gs_dist.data.rows import FieldPath

__all__ = ["CHAT_NAMES", "PAIRS", "TEXT_NAMES", "ColumnKind", "find_path", "has_path", "kind_of", "offered", "type_at"]

TEXT_NAMES = ("text", "content", "inputs_pretokenized")
CHAT_NAMES = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "response"), ("prompt", "completion"))
"""Columns that make one sample together: what is asked, and the answer."""

_ROLE_FIELDS = ({"role", "content"}, {"from", "value"})


class ColumnKind(Enum):
    """What a column's type says that it holds; the value is how a message puts it."""

    TEXT = "text"
    IDS = "lists of integers"
    CHAT = "chats"


def kind_of(kind: pa.DataType, name: str = "") -> ColumnKind | None:
    """The kind of a column of this type, None for one that no sample can be made of.

    Args:
        kind: its type.
        name: a column of text that is called like one of chats holds them as JSON.
    """
    if isinstance(kind, pa.BaseExtensionType):
        is_json = kind.extension_name == "arrow.json"
        return ColumnKind.CHAT if is_json else kind_of(kind.storage_type, name)
    if pa.types.is_dictionary(kind):
        return kind_of(kind.value_type, name) if _is_text(kind.value_type) else None
    if pa.types.is_run_end_encoded(kind):
        value = kind.value_type
        ids = _is_list(value) and pa.types.is_integer(value.value_type)
        return kind_of(value, name) if ids or _is_text(value) else None
    if _is_text(kind):
        return ColumnKind.CHAT if name in CHAT_NAMES else ColumnKind.TEXT
    if not _is_list(kind):
        return None
    if pa.types.is_integer(kind.value_type):
        return ColumnKind.IDS
    part = kind.value_type
    fields = {part.field(index).name for index in range(part.num_fields)} if pa.types.is_struct(part) else set()
    is_json = isinstance(part, pa.BaseExtensionType) and part.extension_name == "arrow.json"
    return ColumnKind.CHAT if is_json or any(needed <= fields for needed in _ROLE_FIELDS) else None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def find_path(schema: pa.Schema, name: str) -> FieldPath | None:
    """Where a column of this name is: one that is called so, else a field within structs, by dotted name.

    Returns:
        None where there is none, or where two columns are called so.
    """
    if name in schema.names:
        return (name,) if schema.names.count(name) == 1 else None
    for end in range(1, len(name)):
        head, rest = name[:end], name[end + 1 :]
        if name[end] == "." and rest and schema.names.count(head) == 1:
            kind = schema.field(head).type
            inner = find_path(pa.schema(_fields(kind)), rest) if pa.types.is_struct(kind) else None
            if inner is not None:
                return (head, *inner)
    return None


def _fields(struct: pa.StructType) -> list[pa.Field]:
    return [struct.field(index) for index in range(struct.num_fields)]


def has_path(schema: pa.Schema, path: FieldPath) -> bool:
    """Whether a path leads to a field."""
    fields = list(schema)
    for name in path[:-1]:
        kind = next((field.type for field in fields if field.name == name), None)
        fields = _fields(kind) if kind is not None and pa.types.is_struct(kind) else []
    return [field.name for field in fields].count(path[-1]) == 1


def type_at(schema: pa.Schema, path: FieldPath) -> pa.DataType:
    """The type of the field that a path of `find_path` leads to."""
    kind = schema.field(path[0]).type
    for name in path[1:]:
        kind = kind.field(name).type
    return kind


def offered(schema: pa.Schema) -> str:
    """The columns that samples can be made of, as messages list them; with all columns where there is none."""
    usable = [f"{name} ({kind.value})" for name, field in _leaves(schema) if (kind := kind_of(field, name)) is not None]
    if usable:
        return f"set calibration.column to one that can be read: {', '.join(usable)}"
    names = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    return f"it has no column of text, token ids or chats, but {names}: give other data"


def _leaves(schema: pa.Schema, prefix: str = "") -> list[tuple[str, pa.DataType]]:
    found: list[tuple[str, pa.DataType]] = []
    for field in schema:
        name = f"{prefix}{field.name}"
        if pa.types.is_struct(field.type):
            found += _leaves(pa.schema(_fields(field.type)), f"{name}.")
        elif schema.names.count(field.name) == 1:
            found.append((name, field.type))
    return found
