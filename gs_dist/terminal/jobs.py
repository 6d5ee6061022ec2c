"""Commands that make a model: `plan`, `init`, `recipe`, `quantize`, `convert`, `resolve`.

Ray and MindSpore are imported inside the commands that need them, so that the others start at once.
"""

from __future__ import annotations

import difflib
import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gs_dist.conversion.config import ConversionConfig
from gs_dist.data.shipped_text import shipped_note
from gs_dist.errors import UserError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.recipe.config import CalibrationConfig, config_of, load_recipe
from gs_dist.recipe.keys import recipe_keys
from gs_dist.recipe.presets import PRESETS
from gs_dist.recipe.sizes import parse_size
from gs_dist.results.summary import (
    CalibrationSummary,
)
from gs_dist.terminal.console import say, show_progress
from gs_dist.terminal.conversion import asks_for_conversion, convert_as_told, read_conversion
from gs_dist.terminal.initial_recipe import initial_recipe
from gs_dist.terminal.options import (
    Address,
    AwaitedNodes,
    CpusPerNode,
    Data,
    Format,
    Length,
    MemoryPerNode,
    Nodes,
    NpusPerNode,
    Overrides,
    PlannedAddress,
    Recipe,
    Samples,
    Scheme,
)
from gs_dist.terminal.request import DEFAULT_SCHEME, Request, again
from gs_dist.terminal.tables import print_plan, print_policies, print_summary
from gs_dist.wording import is_uri

if TYPE_CHECKING:
    from gs_dist.checkpoint.reader import CheckpointReader

from gs_dist.terminal.app import app, examples, is_quiet, new_console

__all__ = ["plan", "quantize"]


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
        convert_as_told(read_conversion(recipe, overrides or (), {}), new_console(), dry_run=True)
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
    console = new_console()
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
        convert_as_told(read_conversion(source, overrides or (), {}), new_console(), address=address)
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

    with show_progress(quiet=is_quiet()) as progress:
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
    convert_as_told(config, new_console(), dry_run=dry_run, address=address)


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

    with show_progress(quiet=is_quiet()) as progress:
        summary = coordinator.resolve(str(run), config, address=address, num_nodes=nodes, progress=progress)
    _show_result(config, summary)


def _refuse_nodes_of_no_cluster(nodes: int | None, address: str | None) -> None:
    if nodes is not None and address is None:
        raise UserError(
            "--nodes waits for the nodes of a cluster, and without --address the job runs on this machine alone: add "
            "--address, or leave --nodes out"
        )


def _show_result(config: CalibrationConfig, summary: CalibrationSummary) -> None:
    console = new_console()
    chosen = Path(config.output) / "layer_policies.yaml"
    if not is_quiet():
        print_summary(console, summary)
        if config.bits == "auto" and chosen.is_file():
            say(chosen.read_text(encoding="utf-8"), nl=False)
    for name in summary.formats:
        console.print(f"model: {Path(config.output) / name}", markup=False, highlight=False, soft_wrap=True)
