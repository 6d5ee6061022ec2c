"""Help and completion: what a person finds without reading anything else."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from gs_dist.terminal.cli import app

COMMANDS = [str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_shows_two_examples_of_itself(command: str, option: str) -> None:
    """By the short option as by the long one."""
    result = CliRunner().invoke(app, [command, option], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert len(re.findall(rf"^ +gs-dist {command} ", result.stdout, re.M)) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_name_options_that_the_command_has(command: str) -> None:
    """An example that would be refused teaches nothing."""
    result = CliRunner().invoke(app, [command, "-h"], env={"COLUMNS": "400"})
    shown, told = result.stdout.split("Examples:")
    for option in re.findall(r"(?<= )--?[a-z-]+", told):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), option


@pytest.mark.parametrize(
    ("shell", "asked"),
    [
        ("bash", {"COMP_WORDS": "gs-dist quantize m --scheme w4", "COMP_CWORD": "4"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "gs-dist quantize m --scheme w4"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "gs-dist quantize m --scheme w4", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_shells_complete_the_names_of_schemes(shell: str, asked: dict[str, str]) -> None:
    """As typer's script for the shell asks."""
    environment = {"_GS_DIST_COMPLETE": f"complete_{shell}", **asked}
    result = CliRunner().invoke(app, [], prog_name="gs-dist", env=environment)
    assert {"w4a16", "w4a8"} <= set(re.findall(r"w\da\d+", result.stdout))
    assert "w8a8" not in result.stdout
