"""`gs-dist convert`: what it is told, what it shows before the work, and the work."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from gs_dist.checkpoint.model_card import CardTexts
from gs_dist.conversion.account import conversion_texts
from gs_dist.conversion.config import ConversionConfig
from gs_dist.conversion.job import convert
from gs_dist.conversion.plan import ConversionPlan, plan_conversion
from gs_dist.errors import RecipeError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.recipe.sizes import format_bytes
from gs_dist.recipe.text import Problem, apply_overrides, parse_document, problems_of, report
from gs_dist.results.summary import read_summary
from gs_dist.seal import unsealed_text
from gs_dist.terminal.console import show_progress
from gs_dist.terminal.tables import print_summary
from gs_dist.wording import counted

__all__ = ["asks_for_conversion", "convert_as_told", "published_texts", "read_conversion"]

_SHOWN = 12  # reasons listed of what stays in floats


def read_conversion(model: Path, overrides: Sequence[str], options: Mapping[str, object]) -> ConversionConfig:
    """A conversion as a recipe or the command line tells it, options over the recipe.

    Args:
        model: a model directory, or a recipe.
        overrides: `key=value` settings.
        options: key to value, None for one that was not given.

    Raises:
        RecipeError: unknown keys, wrong values; all of them are told.
    """
    document: Any = {"model": os.fspath(model)}
    source = "convert"
    if model.is_file():
        source = model.name
        document = parse_document(_text(model), source)
    document, problems = apply_overrides(document, overrides)
    given = {key: _plain(value) for key, value in options.items() if value is not None}
    document = {**document, **given}
    if "output" not in document:
        raise RecipeError("convert: output is not set: give -o DIRECTORY, or output in the recipe")
    return _validated(document, source, problems)


def asks_for_conversion(recipe: Path, overrides: Sequence[str]) -> bool:
    """Whether a recipe says `mode: convert`; one that cannot be read does not, and is complained of elsewhere."""
    try:
        document, _ = apply_overrides(parse_document(_text(recipe), recipe.name), overrides)
    except RecipeError:
        return False
    return isinstance(document, Mapping) and document.get("mode") == "convert"


def published_texts(recipe: Path, architecture: DecoderArchitecture) -> CardTexts:
    """What a card says of a finished conversion, by the recipe that it published.

    Raises:
        RecipeError: the file cannot be read, or holds what this version does not know.
        OutputError: it does not hold what was written.
    """
    document: Any = parse_document(unsealed_text(_text(recipe), recipe.name), recipe.name)
    # It names no output, and a model by the last part of its path. These places do not hold each other.
    places = {"model": f"{os.sep}.gs-dist-no-model", "output": f"{os.sep}.gs-dist-no-output"}
    config = _validated({**document, **places}, recipe.name, [])
    config = config.model_copy(update={"model": str(document["model"])})
    return conversion_texts(config, architecture.model_type, architecture.dtype)


def _validated(document: Any, source: str, problems: Sequence[Problem]) -> ConversionConfig:
    try:
        config = ConversionConfig.model_validate(document)
    except ValidationError as error:
        raise report(source, [*problems, *problems_of(error, ConversionConfig)]) from None
    if problems:
        raise report(source, problems)
    return config


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(
            f"{path.name} cannot be read: {reason}; name a model's directory, or a recipe with mode: convert"
        ) from None


def _plain(value: object) -> object:
    return os.fspath(value) if isinstance(value, Path) else value


def _show_plan(config: ConversionConfig, console: Console) -> ConversionPlan:
    """Plans and shows what will be done."""
    made = plan_conversion(config)
    catalogue = made.catalogue
    source = f"{catalogue.model_type}, {catalogue.dtype}" + (f", {catalogue.encoding}" if catalogue.encoding else "")
    files = counted(len(made.parts), "file")
    lines = [
        ("model", f"{Path(config.model).name} ({source}), {format_bytes(made.read_bytes)}"),
        ("linears", ", ".join(f"{count} {name}" for name, count in sorted(made.counts.items()))),
        *((name, f"{format_bytes(made.written_bytes(name))} in {files}") for name in config.format),
        ("workers", f"{made.num_workers} of at most {format_bytes(made.memory_per_worker)} each, for {made.largest}"),
    ]
    table = Table(box=None, show_header=False)
    for name, text in lines:
        table.add_row(name, text)
    console.print(table, highlight=False)
    reasons = Counter(made.assignment.kept.values())
    for reason, count in reasons.most_common(_SHOWN):
        console.print(f"  stays in floats: {counted(count, 'linear')}, {reason}", markup=False, highlight=False)
    for note in made.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    return made


def convert_as_told(
    config: ConversionConfig, console: Console, *, dry_run: bool = False, address: str | None = None
) -> None:
    """Shows the plan and, unless `dry_run`, converts and says where the models are.

    With the address of a Ray cluster its nodes share the work, else processes of this machine.
    """
    made = _show_plan(config, console)
    if dry_run:
        return
    from gs_dist.runtime.report_file import publish_report  # draws, which nothing before needs

    with show_progress() as progress:
        if address is None:
            found = convert(made, progress)
        else:
            from gs_dist.runtime.conversion_workers import ClusterPool  # imports Ray

            workers = None if config.workers == "auto" else config.workers
            pool = ClusterPool(
                address=address, workers=workers, memory_per_worker=made.memory_per_worker, tell=progress.message
            )
            found = convert(made, progress, pool)
        summary = read_summary(Path(config.output))
        publish_report(Path(config.output), summary, None, progress.message)
    print_summary(console, summary)
    for path in found.values():
        console.print(f"model: {path}", markup=False, highlight=False, soft_wrap=True)
