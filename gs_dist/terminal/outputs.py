"""Commands on what a job wrote or writes: `summary`, `status`, `watch`, `report`, `evaluate`, `generate`, `check`.

Ray and MindSpore are imported inside the commands that need them, so that the others start at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import ValidationError

from gs_dist.errors import UserError
from gs_dist.recipe.config import CalibrationConfig, read_published_recipe
from gs_dist.recipe.sections import CalibrationData
from gs_dist.recipe.sizes import parse_size
from gs_dist.recipe.text import PUBLISHED_RECIPE, problems_of
from gs_dist.results.summary import (
    JSON_NAME,
    PerplexitySummary,
    evaluations_json,
    read_summary,
    write_summary,
)
from gs_dist.terminal.accuracies import accuracies_json, print_accuracies
from gs_dist.terminal.console import say, show_progress, showing
from gs_dist.terminal.continuations import continuations_json, print_continuations
from gs_dist.terminal.conversion import asks_for_conversion, published_texts
from gs_dist.terminal.following import follow, status_json, status_line, status_of
from gs_dist.terminal.options import (
    Address,
)
from gs_dist.terminal.tables import print_summary

if TYPE_CHECKING:
    pass

from gs_dist.terminal.app import app, examples, is_quiet, new_console
from gs_dist.terminal.failures import EXIT_FAILURE

__all__ = ["check", "evaluate"]


@app.command(
    epilog=examples(
        "gs-dist summary runs/qwen3-w8a8 --sort error --limit 20",
        "gs-dist summary runs/qwen3-w8a8 --json",
    )
)
def summary(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of a finished job.")],
    *,
    sort: Annotated[
        Literal["layer", "error", "sensitivity"] | None,
        typer.Option(help="Order of linears; without it, large models are grouped."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many linears to show.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print summary.json.")] = False,
) -> None:
    """Show a job's summary again."""
    from gs_dist.checkpoint.finished_model import is_run
    from gs_dist.checkpoint.job_end import told_end

    run = _run_directory(directory)
    found = read_summary(run)
    if json:
        say(found.to_json(), nl=False)
    else:
        print_summary(new_console(), found, sort=sort, limit=limit)
    end = told_end(run) if is_run(run) else None
    if end is not None:
        say(f"no model was published of this: the job {end}", err=True)


@app.command(
    epilog=examples(
        "gs-dist status runs/qwen3-w8a8",
        "gs-dist status runs/qwen3-w8a8 --json",
    )
)
def status(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of a job, while it runs or after.")],
    *,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say where a job stands: layers, tokens a second, time left; from any node that sees its output."""
    found, now = status_of(directory), datetime.now(timezone.utc)
    say(status_json(found, now) if json else status_line(found, now))


@app.command(
    epilog=examples(
        "gs-dist watch runs/qwen3-w8a8",
        "gs-dist watch /mnt/shared/runs/llama-70b",
    )
)
def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of a job, while it runs or after.")],
) -> None:
    """Follow a job until it ends, from any node that sees its output; exit code 1 if it did not end well."""
    with showing() as show:
        ended = follow(directory, say, show)
    if ended.state != "done":
        raise typer.Exit(EXIT_FAILURE)


@app.command(
    epilog=examples(
        "gs-dist report runs/qwen3-w8a8",
        "gs-dist report runs/qwen3-w8a8 runs/qwen3-w4a16 -o comparison.html",
    )
)
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR [DIR]", help="Output of a finished job; of two jobs, to compare them.")
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; report.html in the job's output, comparison.html here."),
    ] = None,
) -> None:
    """Draw a job's report again, or that of two jobs side by side: one HTML file, which needs no network."""
    from gs_dist.checkpoint.output_lock import REPORT
    from gs_dist.checkpoint.writer import write_bytes
    from gs_dist.report.comparison import render_comparison
    from gs_dist.report.page import render_report

    runs = [_run_directory(directory) for directory in directories]
    summaries = [read_summary(run) for run in runs]
    if len(runs) == 1:
        path, page = runs[0] / REPORT, render_report(summaries[0], _recipe_of(runs[0]))
    elif len(runs) == 2:
        names = (runs[0].resolve().name, runs[1].resolve().name)
        path, page = Path("comparison.html"), render_comparison(summaries[0], summaries[1], names)
    else:
        raise UserError(f"{len(runs)} directories were named: name one output for its report, or two to compare them")
    write_bytes(output or path, page.encode())
    say(f"report: {output or path}")


def _recipe_of(run: Path) -> CalibrationConfig | None:
    """The recipe that a calibrated job kept beside its summary."""
    path = run / PUBLISHED_RECIPE
    return read_published_recipe(path) if path.is_file() and not asks_for_conversion(path, ()) else None


def _run_directory(directory: Path) -> Path:
    """The run that a model directory lies in, or the directory itself."""
    beside = directory.resolve().parent
    inside = not (directory / JSON_NAME).exists() and (beside / JSON_NAME).exists()
    return beside if inside else directory


@app.command(
    epilog=examples(
        "gs-dist evaluate runs/qwen3-w8a8 --model models/Qwen3-8B --data 'eval/*.parquet'",
        "gs-dist evaluate runs/qwen3-w8a8 --model models/Qwen3-8B --tasks tasks.yaml",
    )
)
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of a finished job, or its model directory.")],
    *,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to take perplexity on: files, directories, patterns or URIs; repeatable."),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="YAML file of multiple-choice tasks, to take accuracy on in place of --data.")
    ] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="Format to evaluate, all of the job's if left out; repeatable.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The float model, to compare with.")] = None,
    num_samples: Annotated[int, typer.Option(help="How many samples at most.")] = 64,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
    column: Annotated[str, typer.Option(help="Column to read: input_ids, text or auto.")] = "auto",
    packing: Annotated[bool, typer.Option(help="Join texts before cutting samples.")] = True,
    stages: Annotated[int | None, typer.Option("--pipeline-parallel-size", min=1, help="Stages to use.")] = None,
    memory: Annotated[str | None, typer.Option("--memory-per-worker", help="At most, such as 60GiB.")] = None,
    address: Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds without progress before workers count as lost.")] = 600.0,
    engine: Annotated[
        str | None, typer.Option("--as", help="Engine whose int8 steps of a token are taken, such as vllm-ascend.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure the perplexity of a published model on --data, or its accuracy on --tasks, beside the float --model.

    With --model and --data also: the increase of the loss with its paired standard error, mean and 99th percentile of
    the KL divergence of the next token's distribution, and how often the most likely token is the same. Accuracies are
    those of lm-evaluation-harness, `acc` and `acc_norm`, without examples in the prompt.
    """
    if (data is None) == (tasks is None):
        raise UserError("name either --data, to take perplexity on, or --tasks, to take accuracy on")
    try:
        memory_per_worker = None if memory is None else parse_size(memory)
    except ValueError as error:
        raise UserError(f"--memory-per-worker: {error}") from None
    if tasks is not None:
        from gs_dist.runtime import task_accuracy  # imports Ray

        with show_progress(quiet=is_quiet()) as progress:
            results = task_accuracy.evaluate_tasks(
                str(directory),
                tasks,
                dialects=tuple(format or ()),
                model=None if model is None else str(model),
                pipeline_parallel_size=stages,
                memory_per_worker=memory_per_worker,
                address=address,
                timeout=timeout,
                engine=engine,
                progress=progress,
            )
        if json:
            say(accuracies_json(results), nl=False)
        else:
            print_accuracies(new_console(), results)
        return
    try:
        samples = CalibrationData(
            data=tuple(data or ()),
            num_samples=num_samples,
            sequence_length=sequence_length,
            column=column,
            packing=packing,
        )
    except ValidationError as error:
        problems = "; ".join(str(problem) for problem in problems_of(error, CalibrationData))
        raise UserError(f"the evaluation data cannot be used: {problems}") from None
    from gs_dist.runtime import evaluate as runtime  # imports Ray

    with show_progress(quiet=is_quiet()) as progress:
        found = runtime.evaluate(
            str(directory),
            samples,
            dialects=tuple(format or ()),
            model=None if model is None else str(model),
            pipeline_parallel_size=stages,
            memory_per_worker=memory_per_worker,
            address=address,
            timeout=timeout,
            engine=engine,
            progress=progress,
        )
    if json:
        say(evaluations_json(found), nl=False)
    else:
        _show_perplexity(found)
    _record_perplexity(directory, found)


def _show_perplexity(found: Sequence[PerplexitySummary]) -> None:
    """A line a model, the float one first."""
    say(f"over {found[0].basis()}")
    lines = [("the float model", found[0].float_perplexity, "")]
    for entry in found:
        reference = entry.float_perplexity
        change = "" if reference is None else f"  ({entry.perplexity / reference - 1:+.2%})"
        lines.append((f"the {entry.format} model", entry.perplexity, change))
    width = max(len(name) for name, _, _ in lines)
    for name, perplexity, change in lines:
        if perplexity is not None:
            say(f"perplexity of {name + ':':<{width + 1}} {perplexity:.4f}{change}")
    for entry in found:
        if entry.comparison is not None:
            say(f"the {entry.format} model beside the float model:")
            for what, figure in entry.comparison.rows():
                say(f"  {what + ':':<48} {figure}")


def _record_perplexity(directory: Path, found: Sequence[PerplexitySummary]) -> None:
    """Adds what was measured to summary, report and model cards of the run that the directory belongs to, if any."""
    from gs_dist.checkpoint.model_card import card_texts, write_card
    from gs_dist.checkpoint.output_lock import REPORT
    from gs_dist.checkpoint.reader import CheckpointReader
    from gs_dist.checkpoint.writer import write_bytes
    from gs_dist.report.page import render_report

    run = _run_directory(directory)
    if not (run / JSON_NAME).exists():
        return
    measured = read_summary(run).with_evaluations(found)
    write_summary(run, measured)
    if (run / REPORT).is_file():
        write_bytes(run / REPORT, render_report(measured, _recipe_of(run)).encode())
    recipe = run / PUBLISHED_RECIPE
    if not recipe.is_file():
        return
    for name in (entry.format for entry in found):
        architecture = CheckpointReader(run / name, quantized=True).architecture
        if asks_for_conversion(recipe, ()):
            texts = published_texts(recipe, architecture)
        else:
            texts = card_texts(read_published_recipe(recipe), measured, architecture)
        write_card(run / name, texts, measured, architecture)


@app.command(
    epilog=examples(
        "gs-dist generate runs/qwen3-w8a8 --model models/Qwen3-8B 'What is the capital of France?'",
        "gs-dist generate runs/qwen3-w8a8/ascend --no-chat --max-new-tokens 200 'It is a truth'",
    )
)
def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of a finished job, or its model directory.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to answer or to continue.")],
    *,
    model: Annotated[Path | None, typer.Option(help="The float model, to show beside it.")] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="Format to run, all of the job's if left out; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 64,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Put the prompt through the model's chat template; yes, if the model has one."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print texts and tokens as JSON.")] = False,
) -> None:
    """Show what a published model answers, and with --model what the float one answers beside it.

    Each token is the likeliest one. The model runs in this process and must fit into its memory.
    """
    from gs_dist.runtime import generate as runtime  # imports MindSpore

    with show_progress(quiet=is_quiet()) as progress:
        found = runtime.generate(
            str(directory),
            prompts,
            model=None if model is None else str(model),
            dialects=tuple(format or ()),
            max_new_tokens=max_new_tokens,
            chat=chat,
            progress=progress,
        )
    if json:
        say(continuations_json(prompts, found), nl=False)
    else:
        print_continuations(new_console(), prompts, found)


@app.command(
    epilog=examples(
        "gs-dist check runs/qwen3-w8a8 --for vllm-ascend",
        "gs-dist check runs/qwen3-w8a8/ascend --model models/Qwen3-8B",
    )
)
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory, or output of a finished job.")],
    *,
    engine: Annotated[str | None, typer.Option("--for", help="Engine whose loader's rules are applied too.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="The float model: weights are turned back and compared with it.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many problems to show.")] = 50,
) -> None:
    """Say what a quantised model directory is, and why an engine would not load it; exit code 2 for a broken one."""
    from gs_dist.checkpoint.check import check_all

    reports = check_all(directory, engine, model)
    for number, report in enumerate(reports.values()):
        text = report.render(limit)
        say(f"\n{text}" if number else text, err=not report.clean)
    raise typer.Exit(max(report.exit_code for report in reports.values()))
