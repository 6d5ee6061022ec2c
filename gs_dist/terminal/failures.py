"""What a command raises, as a message and an exit code.

0 done, 2 something of the user's must be changed, 1 the run failed, 130 stopped.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from gs_dist.errors import UserError
from gs_dist.terminal.console import say

__all__ = ["EXIT_FAILURE", "Commands"]

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_COMMON = ("--debug", "-v", "--verbose", "-q", "--quiet")


class Commands(TyperGroup):
    """Turns what a command raises into a message and an exit code, in one place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What every command takes may stand behind the command's name as well."""
        end = args.index("--") if "--" in args else len(args)
        common = [arg for arg in args[:end] if arg in _COMMON]
        return super().parse_args(ctx, [*common, *(arg for arg in args[:end] if arg not in _COMMON), *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("stopped; run the same command again to go on from the layers that are published")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read the output has enough; the interpreter must not fail again while it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except Exception as error:
            if _belongs_to_typer(error):
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            raise typer.Exit(_explain(error)) from None


def _belongs_to_typer(error: Exception) -> bool:
    """Usage errors and exits, which typer prints and counts itself."""
    return any(kind.__module__.split(".")[0] in ("click", "typer") for kind in type(error).__mro__)


def _explain(error: Exception) -> int:
    """Prints why a command failed; its exit code."""
    cause = getattr(error, "cause", None)  # Ray hands on a worker's error with its traceback as text
    reason = cause if isinstance(cause, Exception) else error
    if isinstance(reason, UserError):
        _complain(str(reason))
        return EXIT_USER_ERROR
    first_line = next(iter(str(reason).strip().splitlines()), "")
    known = type(reason).__module__.startswith("gs_dist.")
    _complain(first_line if known else f"{type(reason).__name__}: {first_line} (--debug shows where)")
    return EXIT_FAILURE


def _complain(text: str) -> None:
    say(f"gs-dist: {text}", err=True)
