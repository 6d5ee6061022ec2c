"""What a serving engine is to this package: the rules of its loader, the dialects it reads, and how it is started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gs_dist.checkpoint.inventory import Inventory
from gs_dist.checkpoint.layout import Layout
from gs_dist.checkpoint.problems import Note
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.numbers.token_step import TokenStep

__all__ = ["Engine", "serve_command"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A serving engine.

    Attributes:
        name: spelling in `gs-dist check --for`.
        title: what a model card calls it.
        dialects: those that its card is shown for.
        versions: those whose rules are applied, the newest last; of engines in `kinds.py` that says them.
        token_step: how it makes the int8 step of a token while serving.
        check: applies the loader's rules to a directory, those of a version or ("") of the newest that is known;
            problems and notes go to the inventory.
        serve: Markdown that says how to serve a directory, given its dialect, the model, and what `check` noted.
    """

    name: str
    title: str
    dialects: tuple[str, ...]
    token_step: TokenStep
    check: Callable[[Inventory, Layout, str], None]
    serve: Callable[[str, DecoderArchitecture, Sequence[Note]], str]
    versions: tuple[str, ...] = ()


def serve_command(title: str, command: str) -> str:
    """Markdown with a command that serves a model."""
    return f"With {title}:\n\n```shell\n{command}\n```"
