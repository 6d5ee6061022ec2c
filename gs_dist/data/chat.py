"""Chats as the model's own template writes them.

Templates are Jinja, rendered in its sandbox with what transformers gives them (`utils/chat_template_utils.py`,
`PreTrainedTokenizerBase.apply_chat_template`): blocks trimmed, loop controls, `raise_exception`, `tojson` without HTML
escapes, `{% generation %}`, and the special tokens that tokenizer_config.json names. One thing differs: `strftime_now`
is a fixed day, so that a job that is gone on with tomorrow still has today's samples.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gs_dist.data.files import is_lfs_pointer
from gs_dist.errors import DatasetError

__all__ = ["TEMPLATE_DAY", "ChatTemplate", "messages_of", "read_tokenizer_config", "token_text"]

TEMPLATE_DAY = datetime.datetime(2024, 7, 26)
"""The day that templates are told: the one that Llama 3's own writes where no clock is at hand."""

TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; here it stands for its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own type)

    def parse(self, parser: Parser) -> list[Node]:
        """The statements within the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A model's template.

    Args:
        source: its Jinja text.
        name: what messages call it.
        special_tokens: `bos_token` and so on, as the template is given them.

    Raises:
        DatasetError: it is no Jinja.
    """

    def __init__(self, source: str, name: str, special_tokens: Mapping[str, str]) -> None:
        self._name = name
        self._special_tokens = dict(special_tokens)
        self.tells_the_day = "strftime_now" in source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TEMPLATE_DAY.strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DatasetError(f"{name} is not a Jinja template that can be used: {error}") from None

    @classmethod
    def of_model(cls, directory: Path) -> ChatTemplate | None:
        """The template of a model directory, None where it has none.

        `chat_template.jinja` counts before tokenizer_config.json's `chat_template`; of several, `default`.

        Raises:
            DatasetError: tokenizer_config.json is damaged, or the template is no Jinja.
        """
        config = read_tokenizer_config(directory)
        special = {name: token_text(config[name]) for name in _SPECIAL_TOKENS if config.get(name) is not None}
        file = directory / "chat_template.jinja"
        if file.is_file():
            return cls(_read(file), file.name, special)
        found = config.get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
            found = named.get("default")
        name = f"chat_template of {TOKENIZER_CONFIG}"
        if found is None and (directory / "chat_template.json").is_file():
            name = "chat_template.json"
            found = _read_json(directory / name).get("chat_template")
        return cls(found, name, special) if isinstance(found, str) and found else None

    def render(self, messages: Sequence[Mapping[str, Any]], *, ask: bool = False) -> str:
        """The text of a chat; with `ask` it ends where the assistant is to speak.

        Raises:
            ValueError: the template refuses it, with what it says.
        """
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=ask, **self._special_tokens
            )
        except Exception as error:  # a template's own arithmetic and look-ups raise anything
            raise ValueError(f"{self._name} refuses the chat: {type(error).__name__}: {error}") from None


def read_tokenizer_config(directory: Path) -> Mapping[str, Any]:
    """tokenizer_config.json, laid over the special_tokens_map.json of older models; empty where there is none.

    Raises:
        DatasetError: it is damaged.
    """
    files = [directory / name for name in (_SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG)]
    return {name: value for path in files if path.is_file() for name, value in _read_json(path).items()}


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        if is_lfs_pointer(data[:64]):
            raise DatasetError(
                f"{path} is a Git LFS pointer and not the file: run `git lfs pull` in the model directory"
            )
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise DatasetError(f"{path} is not a JSON object")
    return value


def token_text(value: Any) -> str:
    """A token is written as text, or as an object with its `content`; "" for None."""
    written = value.get("content") if isinstance(value, Mapping) else value
    return "" if written is None else str(written)


def messages_of(value: Any) -> list[dict[str, Any]]:
    """The messages of a chat: `role` and `content`, whatever it calls them.

    Args:
        value: a list of objects with role and content or with from and value (ShareGPT); or that as JSON text.

    Raises:
        ValueError: it is something else.
    """
    for _ in range(2):  # in a file of JSON, text that is JSON itself comes as JSON
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise ValueError("text that is not JSON, where a list of messages is expected") from None
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise ValueError("no list of messages, each an object with role and content")
    return [_message(message) for message in value]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: part for name, part in message.items() if part is not None or name == "content"}
    if "role" in given and "content" in given:
        return given
    if "from" in given and "value" in given:
        speaker = given.pop("from")
        return {"role": _ROLES.get(speaker, speaker), "content": given.pop("value"), **given}
    if "role" in given:  # a call of tools has no content
        return given
    raise ValueError(f"a message of {', '.join(message) or 'nothing'}, where role and content are expected")
