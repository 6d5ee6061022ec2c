"""The command line's frame: what every command takes, and where what it prints goes."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated

import typer

from gs_dist import __version__
from gs_dist.terminal.console import PrintableConsole, say
from gs_dist.terminal.failures import Commands

if TYPE_CHECKING:
    pass

__all__ = ["app", "examples", "is_quiet", "new_console"]

WIDTH_OF_FILES = 160  # where the output is no terminal, tables should not be squeezed into 80 columns


_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


def new_console() -> PrintableConsole:
    """Where tables go: as wide as the terminal, or as a file may be."""
    console = PrintableConsole()
    return console if console.is_terminal else PrintableConsole(width=WIDTH_OF_FILES)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def examples(*lines: str) -> str:
    """The end of a command's help, as Markdown."""
    return "\n\n".join(["Examples:", *(f"`{line}`" for line in lines)])


def _show_version(asked: bool) -> None:
    if asked:
        say(f"gs-dist {__version__}")
        raise typer.Exit


@app.callback()
def common(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--verbose", "-v", "--debug", envvar="GS_DIST_DEBUG", help="Show where an error came from."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no tables.")] = False,
) -> None:
    """Quantise large language models on Ray and MindSpore.

    `gs-dist COMMAND -h` shows a command's options and two examples.
    """
    _QUIET.set(quiet)


def is_quiet() -> bool:
    """Whether the command was asked for no progress and no tables."""
    return _QUIET.get()
