"""The command line: `gs-dist plan`, `recipe`, `quantize`, `convert`, `resolve`, `summary`, `evaluate`,
`generate`, `check`.

Ray and MindSpore are imported inside the commands that need them, so that the others start at once.
Exit codes: 0 done, 2 something of the user's must be changed, 1 the run failed.
"""

from __future__ import annotations

import difflib
import glob
import os
import sys
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from gs_dist import __version__
from gs_dist.conversion.config import ConversionConfig
from gs_dist.data.shipped_text import shipped_note
from gs_dist.errors import UserError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.recipe.config import CalibrationConfig, CalibrationData, config_of, load_recipe, read_published_recipe
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.keys import recipe_keys
from gs_dist.recipe.presets import PRESETS
from gs_dist.recipe.sizes import parse_size
from gs_dist.recipe.text import PUBLISHED_RECIPE, problems_of
from gs_dist.results.summary import (
    JSON_NAME,
    CalibrationSummary,
    PerplexitySummary,
    evaluations_json,
    read_summary,
    write_summary,
)
from gs_dist.terminal.console import PrintableConsole, say, show_progress, showing
from gs_dist.terminal.continuations import continuations_json, print_continuations
from gs_dist.terminal.conversion import asks_for_conversion, convert_as_told, published_texts, read_conversion
from gs_dist.terminal.following import follow, status_json, status_line, status_of
from gs_dist.terminal.initial_recipe import initial_recipe
from gs_dist.terminal.request import DEFAULT_SCHEME, Request, again
from gs_dist.terminal.tables import print_plan, print_policies, print_summary
from gs_dist.wording import is_uri

if TYPE_CHECKING:
    from gs_dist.checkpoint.reader import CheckpointReader

__all__ = ["app", "main"]

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
HOW, CALIBRATION, WHERE = "How it is quantised", "Calibration data", "Where it runs"  # groups of options
WIDTH_OF_FILES = 160  # where the output is no terminal, tables should not be squeezed into 80 columns


_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)
_COMMON = ("--debug", "-v", "--verbose", "-q", "--quiet")


class _Commands(TyperGroup):
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


def _console() -> PrintableConsole:
    console = PrintableConsole()
    return console if console.is_terminal else PrintableConsole(width=WIDTH_OF_FILES)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def examples(*lines: str) -> str:
    """The end of a command's help, as Markdown."""
    return "\n\n".join(["Examples:", *(f"`{line}`" for line in lines)])


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


@app.command(
    epilog=examples(
        "gs-dist plan recipe.yaml",
        "gs-dist plan recipe.yaml --nodes 2 --npus-per-node 8 --cpus-per-node 160 --memory-per-node 896GiB",
    )
)
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    address: PlannedAddress = None,
    policies: Annotated[bool, typer.Option("--policies", help="Each linear's policy, every null filled.")] = False,
    nodes: Nodes = None,
    npus: NpusPerNode = None,
    cpus: CpusPerNode = None,
    memory: MemoryPerNode = None,
) -> None:
    """Show stages, waves and memory of a job, from headers and data alone; refuse one that cannot fit.

    Without --address or a description of the nodes it is planned for this machine; if that has no Ascend card and the
    recipe needs some, memory and cores of their nodes are unknown, and said to be.
    """
    if asks_for_conversion(recipe, overrides or ()):
        convert_as_told(read_conversion(recipe, overrides or (), {}), _console(), dry_run=True)
        return
    config = load_recipe(recipe, overrides or ())
    facts, described = _nodes(config, address, nodes, npus, cpus, memory)
    from gs_dist.checkpoint.reader import CheckpointReader
    from gs_dist.runtime.planned import plan_job

    reader = CheckpointReader(Path(config.model), serving_dtype=config.serving_dtype)
    made, told = plan_job(config, reader, facts)
    notes = list(told)
    notes += _data_notes(config, reader)
    if described or address is not None:
        notes += _lacking(config, made, facts, waits=not described)
    console = _console()
    print_plan(console, made, Path(config.model).name)
    if policies:
        print_policies(console, made)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _nodes(
    config: CalibrationConfig,
    address: str | None,
    nodes: int | None,
    npus: int | None,
    cpus: int | None,
    memory: str | None,
) -> tuple[ClusterFacts, bool]:
    """What a job is planned for, and whether that is only described."""
    described = ClusterFacts.described(
        num_nodes=nodes,
        npus=npus,
        cpus=cpus,
        memory=None if memory is None else _size(memory, "--memory-per-node"),
        device=config.parallel.device,
    )
    if address is not None and described is not None:
        raise UserError(
            "--address asks a cluster that runs what it holds, and the other options describe one: give either"
        )
    if described is not None:
        return described, True
    return (ClusterFacts.of_this_machine() if address is None else _facts_of(address, config)), False


def _data_notes(config: CalibrationConfig, reader: CheckpointReader) -> list[str]:
    """What a job would say of its data; refuses what it would refuse, if the data are on this machine."""
    if any(map(is_uri, config.calibration.data)):
        return ["the calibration data are not on this machine, and were not looked at"]
    if not any(glob.glob(os.path.expanduser(entry), recursive=True) for entry in config.calibration.data):
        return [f"there are no calibration data here at {', '.join(config.calibration.data)}"]
    from gs_dist.data.dataset import open_dataset  # imports Arrow

    dataset = open_dataset(
        config.calibration,
        reader.architecture.vocab_size,
        reader.tokenizer_file,
        eos_token_id=reader.architecture.end_of_text_id,
    )
    dataset.digests()
    return list(dataset.notes)


def _size(text: str, option: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def _facts_of(address: str, config: CalibrationConfig) -> ClusterFacts:
    from gs_dist.runtime.cluster import cluster  # imports Ray

    device = None if config.parallel.device == "auto" else DeviceKind(config.parallel.device)
    notes: list[str] = []
    with cluster(address, None, device=device, tell=notes.append) as facts:
        for note in notes:
            say(f"note: {note}", err=True)
        return facts


def _lacking(config: CalibrationConfig, made: CalibrationPlan, facts: ClusterFacts, *, waits: bool) -> list[str]:
    """What a cluster too small for the plan has room for; one that is only described must hold what suffices."""
    room = facts.room(threads=made.threads_per_worker, npus=made.device.npus)
    if room >= made.num_workers:
        return []
    least = made.pipeline_parallel_size * min(config.parallel.min_data_parallel_size, made.data_parallel_size)
    found = (
        f"the cluster has room for {room} of {made.num_workers} workers ({made.pipeline_parallel_size} stages x "
        f"{made.data_parallel_size} replicas)"
    )
    if room < least and not waits:
        raise UserError(
            f"{found}, and needs it for {least} at least (parallel.min_data_parallel_size): give more --nodes, or "
            "lower parallel.pipeline_parallel_size, data_parallel_size or threads_per_worker"
        )
    if room >= least:
        return [f"{found}: a job starts with fewer replicas, and takes more when nodes join"]
    return [f"{found}: a job waits up to {config.parallel.timeout:g} s for more nodes, and then ends"]


@app.command(
    epilog=examples(
        "gs-dist init models/Qwen3-8B --scheme w8a8 -w recipe.yaml",
        "gs-dist init models/Llama-3-70B --nodes 2 --npus-per-node 8 --cpus-per-node 160 --memory-per-node 896GiB",
    )
)
def init(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of the float model.")],
    *,
    scheme: Scheme = None,
    data: Data = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the job, in the recipe; runs/MODEL-SCHEME.")
    ] = None,
    format: Format = None,
    samples: Samples = None,
    length: Length = None,
    write: Annotated[Path | None, typer.Option("--write", "-w", help="File to write; without it, printed.")] = None,
    address: PlannedAddress = None,
    nodes: Nodes = None,
    npus: NpusPerNode = None,
    cpus: CpusPerNode = None,
    memory: MemoryPerNode = None,
) -> None:
    """Write a first recipe, with comments, that fits a model and this machine, or the nodes that you describe."""
    if not model.is_dir():
        raise UserError(f"{model} is no directory: name the directory of a model")
    if write is not None and write.exists():
        raise UserError(f"{write} is there already: name another file with --write, or remove it")
    name = scheme or DEFAULT_SCHEME
    place = output or Path("runs") / f"{model.resolve().name}-{name}"
    asked = Request(
        source=model, scheme=name, data=data, output=place, format=format, samples=samples, length=length
    ).document()
    config = config_of(asked, source="init")
    facts, _ = _nodes(config, address, nodes, npus, cpus, memory)
    from gs_dist.checkpoint.reader import CheckpointReader
    from gs_dist.checkpoint.writer import write_bytes
    from gs_dist.runtime.planned import plan_job

    made, _ = plan_job(config, CheckpointReader(model, serving_dtype=config.serving_dtype), facts)
    text = initial_recipe(asked, made, scheme=name, shipped=data is None)
    if write is None:
        say(text, nl=False)
    else:
        write_bytes(write, text.encode())
        say(f"recipe: {write}")


@app.command(
    "recipe",
    epilog=examples(
        "gs-dist recipe calibration",
        "gs-dist recipe --schemes",
    ),
)
def show_recipe_keys(
    prefix: Annotated[str, typer.Argument(metavar="[KEY]", help="A key or section; or convert.")] = "",
    *,
    schemes: Annotated[
        bool, typer.Option("--schemes", help="List the schemes of `quantize --scheme` instead.")
    ] = False,
) -> None:
    """Show every key of a recipe: what may be written, its default, and what it does."""
    if prefix == "convert":
        say("\n".join(map(str, recipe_keys(ConversionConfig))))
        return
    if schemes:
        say("\n".join(map(str, PRESETS.values())))
        return
    keys = [key for key in recipe_keys(CalibrationConfig) if f"{key.path}.".startswith(f"{prefix}." if prefix else "")]
    if not keys:
        paths = [key.path for key in recipe_keys(CalibrationConfig)]
        near = difflib.get_close_matches(prefix, [*paths, *(path.rsplit(".")[0] for path in paths)], n=1, cutoff=0.4)
        raise UserError(f"no recipe has a key {prefix!r}" + (f": do you mean {near[0]}?" if near else ""))
    say("\n".join(map(str, keys)))


@app.command(
    epilog=examples(
        "gs-dist quantize models/Qwen3-8B --scheme w8a8 --data 'calib/*.parquet' -o runs/qwen3-w8a8",
        "gs-dist quantize recipe.yaml calibration.num_samples=64 --address auto",
    )
)
def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="MODEL|RECIPE", help="Directory of the float model, or a recipe, a YAML file.")
    ],
    overrides: Overrides = None,
    *,
    scheme: Scheme = None,
    data: Data = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of the job.")] = None,
    format: Format = None,
    samples: Samples = None,
    length: Length = None,
    address: Address = None,
    nodes: AwaitedNodes = None,
    keep_statistics: Annotated[
        bool, typer.Option("--keep-statistics", help="Keep the statistics in the output, for other recipes.")
    ] = False,
) -> None:
    """Calibrate, quantise and publish a model by a scheme's name or a recipe; run it again to resume."""
    if asks_for_conversion(source, overrides or ()):
        convert_as_told(read_conversion(source, overrides or (), {}), _console(), address=address)
        return
    _refuse_nodes_of_no_cluster(nodes, address)
    extra = ["keep_statistics=true"] if keep_statistics else []
    request = Request(
        source=source,
        overrides=[*(overrides or ()), *extra],
        scheme=scheme,
        data=data,
        output=output,
        format=format,
        samples=samples,
        length=length,
    )
    config = request.config()
    for note in shipped_note(config.calibration.data):
        say(f"note: {note}", err=True)
    from gs_dist.runtime import coordinator  # imports Ray

    with show_progress(quiet=_QUIET.get()) as progress:
        summary = coordinator.quantize(config, address=address, num_nodes=nodes, progress=progress)
    _show_result(config, summary)
    if source.is_dir():
        say(f"the recipe it stands for: {again(config)}")


@app.command(
    epilog=examples(
        "gs-dist convert models/DeepSeek-V3 -o runs/v3 --scheme W8A8_DYNAMIC --format ascend",
        "gs-dist convert models/Qwen3-8B -o runs/qwen3 --for vllm-ascend==0.23 --dry-run",
    )
)
def convert(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Directory of the model; or a recipe with `mode: convert`.")
    ],
    overrides: Overrides = None,
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of the job.")] = None,
    scheme: Annotated[str | None, typer.Option(help="How linears are quantised; W8A8_DYNAMIC.")] = None,
    format: Annotated[list[str] | None, typer.Option(help="compressed-tensors or ascend; repeatable.")] = None,
    engine: Annotated[
        str | None, typer.Option("--for", help="Engine that is to load it, such as vllm-ascend==0.23 or sglang.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that share the work; one a core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster whose nodes share the work; without it, processes here.")
    ] = None,
) -> None:
    """Quantise any checkpoint without data, tensor by tensor; run it again to resume."""
    options = {"output": output, "scheme": scheme, "format": format, "engine": engine, "workers": workers}
    config = read_conversion(model, overrides or (), options)
    convert_as_told(config, _console(), dry_run=dry_run, address=address)


@app.command(
    epilog=examples(
        "gs-dist resolve runs/qwen3-w8a8 second.yaml",
        "gs-dist resolve runs/qwen3-w8a8 second.yaml output=runs/third ptq.group_size=64",
    )
)
def resolve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output of a job that ran with --keep-statistics.")],
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    address: Address = None,
    nodes: AwaitedNodes = None,
) -> None:
    """Solve another recipe from the statistics that a job kept, without running the model."""
    _refuse_nodes_of_no_cluster(nodes, address)
    config = load_recipe(recipe, overrides or ())
    from gs_dist.runtime import coordinator  # imports Ray

    with show_progress(quiet=_QUIET.get()) as progress:
        summary = coordinator.resolve(str(run), config, address=address, num_nodes=nodes, progress=progress)
    _show_result(config, summary)


def _refuse_nodes_of_no_cluster(nodes: int | None, address: str | None) -> None:
    if nodes is not None and address is None:
        raise UserError(
            "--nodes waits for the nodes of a cluster, and without --address the job runs on this machine alone: add "
            "--address, or leave --nodes out"
        )


def _show_result(config: CalibrationConfig, summary: CalibrationSummary) -> None:
    console = _console()
    chosen = Path(config.output) / "layer_policies.yaml"
    if not _QUIET.get():
        print_summary(console, summary)
        if config.bits == "auto" and chosen.is_file():
            say(chosen.read_text(encoding="utf-8"), nl=False)
    for name in summary.formats:
        console.print(f"model: {Path(config.output) / name}", markup=False, highlight=False, soft_wrap=True)


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
    found = read_summary(_run_directory(directory))
    if json:
        say(found.to_json(), nl=False)
    else:
        print_summary(_console(), found, sort=sort, limit=limit)


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
        "gs-dist evaluate runs/qwen3-w8a8/ascend --data eval.jsonl --num-samples 128",
    )
)
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of a finished job, or its model directory.")],
    *,
    data: Annotated[list[str], typer.Option(help="Files, directories, patterns or URIs; repeatable.")],
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
    """Measure the perplexity of a published model, and with --model how far it is from the float one.

    That is: the increase of the loss with its paired standard error, mean and 99th percentile of the KL divergence of
    the next token's distribution, and how often the most likely token is the same.
    """
    try:
        samples = CalibrationData(
            data=tuple(data), num_samples=num_samples, sequence_length=sequence_length, column=column, packing=packing
        )
    except ValidationError as error:
        problems = "; ".join(str(problem) for problem in problems_of(error, CalibrationData))
        raise UserError(f"the evaluation data cannot be used: {problems}") from None
    try:
        memory_per_worker = None if memory is None else parse_size(memory)
    except ValueError as error:
        raise UserError(f"--memory-per-worker: {error}") from None
    from gs_dist.runtime import evaluate as runtime  # imports Ray

    with show_progress(quiet=_QUIET.get()) as progress:
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

    with show_progress(quiet=_QUIET.get()) as progress:
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
        print_continuations(_console(), prompts, found)


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


def main() -> None:
    """Runs the command line."""
    app(prog_name="gs-dist")
