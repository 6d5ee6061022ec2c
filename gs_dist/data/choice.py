"""Which columns samples are made of: those that the recipe names, or with `auto` the first of the usual ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gs_dist.data.chat import TEMPLATE_DAY, ChatTemplate
from gs_dist.data.columns import CHAT_NAMES, PAIRS, TEXT_NAMES, ColumnKind, find_path, kind_of, offered, type_at
from gs_dist.data.content import Chats, Content, Pairs, Texts, TokenIds
from gs_dist.data.data_file import DataFile
from gs_dist.data.padding import ATTENTION_MASK
from gs_dist.data.tokens import TextTokenizer
from gs_dist.errors import DatasetError
from gs_dist.recipe.sections import CalibrationData

__all__ = ["Choice"]

_IDS_NAME = "input_ids"


class Choice:
    """Content for the columns of a data set, and what to tell of how they are read.

    Args:
        config: the recipe's `calibration` section.
        file: the first file; the others are to be like it.
        tokenizer_file: the model's tokenizer.json, None where it has none.
        eos_token_id: of the model; ends texts that are packed.

    Raises:
        DatasetError: no column that the recipe names or that is usual, or none that this model can read.
    """

    def __init__(
        self, config: CalibrationData, file: DataFile, tokenizer_file: Path | None, eos_token_id: int | None
    ) -> None:
        self._config = config
        self._file = file
        self._tokenizer_file = tokenizer_file
        self._end = eos_token_id if config.packing else None
        self.notes: list[str] = []
        self.content = self._automatic() if config.column == "auto" else self._named(config.column)

    def _named(self, name: str) -> Content:
        kind = self._kind(name)
        if kind is ColumnKind.IDS:
            return self._token_ids(name)
        if kind is ColumnKind.CHAT:
            return self._chats(name)
        if kind is ColumnKind.TEXT:
            return self._texts(name)
        pair = tuple(name.split("+"))
        if len(pair) == 2 and all(self._kind(part) is ColumnKind.TEXT for part in pair):
            return self._pairs(*pair)
        path = find_path(self._file.schema, name)
        if path is None:
            count = self._file.schema.names.count(name) or "no"
            raise DatasetError(f"{self._file} has {count} column {name}; {offered(self._file.schema)}")
        raise DatasetError(
            f"{self._file}: column {name} is {type_at(self._file.schema, path)}, neither text nor lists of integers "
            f"nor chats; {offered(self._file.schema)}"
        )

    def _automatic(self) -> Content:
        found = next(self._usual(), None)
        if found is None:
            names = [_IDS_NAME, *CHAT_NAMES, *TEXT_NAMES, *("+".join(pair) for pair in PAIRS)]
            raise DatasetError(
                f"{self._file} has none of the columns that calibration.column: auto knows ({', '.join(names)}); "
                f"{offered(self._file.schema)}"
            )
        kind = ColumnKind.CHAT.value if isinstance(found, Chats) else next(iter(found.kinds)).value
        self.notes.insert(0, f"calibration.column is auto: {found.name} is read ({kind})")
        return found

    def _usual(self) -> Iterator[Content]:
        """The usual columns that are there, the best first."""
        if self._kind(_IDS_NAME) is ColumnKind.IDS:
            yield self._token_ids(_IDS_NAME)
        texts = [name for name in TEXT_NAMES if self._kind(name) is ColumnKind.TEXT]
        chats = [name for name in CHAT_NAMES if self._kind(name) is ColumnKind.CHAT]
        pairs = [pair for pair in PAIRS if all(self._kind(name) is ColumnKind.TEXT for name in pair)]
        if chats and (self._template() or not texts):
            yield self._chats(chats[0])
        if texts[:1] == ["text"]:
            yield self._texts("text")
        if pairs:
            yield self._pairs(*pairs[0])
        if texts:
            yield self._texts(texts[0])
        yield from (self._token_ids(name) for name in TEXT_NAMES if self._kind(name) is ColumnKind.IDS)

    def _kind(self, name: str) -> ColumnKind | None:
        path = find_path(self._file.schema, name)
        return None if path is None else kind_of(type_at(self._file.schema, path), path[-1])

    def _token_ids(self, name: str) -> TokenIds:
        content = TokenIds(name, self._pad_token_id())
        beside = content.fields(self._file).beside
        if ATTENTION_MASK in beside:
            self.notes.append(f"tokens whose {ATTENTION_MASK} is 0 are left out")
        elif beside:
            self.notes.append(
                f"{' and '.join(beside)} beside {name}: padding at either end is left out, and what is masked "
                "otherwise, such as prompts, counts like the rest"
            )
        return content

    def _pad_token_id(self) -> int | None:
        if self._tokenizer_file is None or not self._tokenizer_file.is_file():
            return None
        return TextTokenizer(self._tokenizer_file).pad_token_id()

    def _texts(self, name: str) -> Texts:
        return Texts(
            name,
            tokenizer=self._text_tokenizer(name),
            add_special_tokens=self._config.add_special_tokens,
            end=self._end,
        )

    def _chats(self, *names: str) -> Chats:
        label = "+".join(names)
        tokenizer, template = self._tokenizer(label), self._template()
        if template is None:
            raise DatasetError(
                f"{self._file}: {label} holds chats, and the model has no chat template to write them with: put its "
                "chat_template.jinja (or the tokenizer_config.json that holds it) beside its config.json, or give text"
            )
        if template.tells_the_day:
            self.notes.append(f"the chat template asks for the day: it is always {TEMPLATE_DAY:%d %b %Y}")
        return Chats(*names, template=template, tokenizer=tokenizer)

    def _pairs(self, *names: str) -> Texts:
        if self._template() is not None:
            return self._chats(*names)
        return Pairs(
            *names,
            tokenizer=self._text_tokenizer("+".join(names)),
            add_special_tokens=self._config.add_special_tokens,
            end=self._end,
        )

    def _template(self) -> ChatTemplate | None:
        return None if self._tokenizer_file is None else ChatTemplate.of_model(self._tokenizer_file.parent)

    def _text_tokenizer(self, label: str) -> TextTokenizer:
        """The tokenizer for text that no template was applied to: what it puts around a text is told if in doubt."""
        tokenizer = self._tokenizer(label)
        if self._config.add_special_tokens:
            self.notes += tokenizer.special_token_notes()
        return tokenizer

    def _tokenizer(self, label: str) -> TextTokenizer:
        if self._tokenizer_file is None or not self._tokenizer_file.is_file():
            raise DatasetError(
                f"{self._file}: column {label} is text, and the model has no tokenizer.json to tokenise it with; put "
                "one beside its config.json, or set calibration.column to a column of token ids"
            )
        return TextTokenizer(self._tokenizer_file)
