"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.presets import PRESETS

__all__ = [
    "Address",
    "AwaitedNodes",
    "CALIBRATION",
    "CpusPerNode",
    "Data",
    "Format",
    "HOW",
    "Length",
    "MemoryPerNode",
    "Nodes",
    "NpusPerNode",
    "Overrides",
    "PlannedAddress",
    "Recipe",
    "Samples",
    "Scheme",
    "WHERE",
]

HOW, CALIBRATION, WHERE = "How it is quantised", "Calibration data", "Where it runs"  # groups of options

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="Settings to lay over the recipe, such as calibration.num_samples=64; a key that holds dots in quotes.",
    ),
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to join; without it, one is started here.", rich_help_panel=WHERE)
]
PlannedAddress = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster that runs, to plan for what it holds.", rich_help_panel=WHERE),
]
Nodes = Annotated[
    int | None, typer.Option(min=1, help="Nodes of a cluster that need not run yet; 1.", rich_help_panel=WHERE)
]
NpusPerNode = Annotated[
    int | None, typer.Option("--npus-per-node", min=0, help="Ascend cards of each.", rich_help_panel=WHERE)
]
CpusPerNode = Annotated[
    int | None, typer.Option("--cpus-per-node", min=1, help="Cores of each.", rich_help_panel=WHERE)
]
MemoryPerNode = Annotated[
    str | None,
    typer.Option(
        "--memory-per-node",
        help="Memory of each as Ray counts it: a pod's limit, or `ray start --memory`.",
        rich_help_panel=WHERE,
    ),
]
AwaitedNodes = Annotated[
    int | None,
    typer.Option(
        "--nodes", min=1, help="Nodes of that cluster to wait for; those that are there.", rich_help_panel=WHERE
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        help="How a model is quantised; w8a8-dynamic. `gs-dist recipe --schemes` lists them.",
        autocompletion=lambda: list(PRESETS),
        rich_help_panel=HOW,
    ),
]
Format = Annotated[
    list[str] | None,
    typer.Option(
        help="compressed-tensors, ascend, golden-stick or gptq; repeatable.",
        autocompletion=lambda: list(DIALECTS),
        rich_help_panel=HOW,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text to calibrate on: files, directories, patterns or URIs; repeatable.", rich_help_panel=CALIBRATION
    ),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="How many samples to calibrate on.", rich_help_panel=CALIBRATION)
]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens of a sample.", rich_help_panel=CALIBRATION)]
