"""Plans and summaries as tables for a terminal."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gs_dist.planning.memory import ITEMS
from gs_dist.planning.plan import CalibrationPlan, StagePlan
from gs_dist.planning.spread import pass_operations
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.recipe.sizes import format_bytes
from gs_dist.results.coverage import LayerCoverage, describe_coverage, expert_coverage
from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import CalibrationSummary, StageSummary
from gs_dist.wording import counted

__all__ = ["print_plan", "print_policies", "print_summary"]

ROWS_WITHOUT_GROUPING = 60  # more than fits a tall terminal; past it, linears of one role share a line
WORST_ROWS = 10
CARDS_OF_A_NODE = 8  # of an Ascend training server, where nothing is said of the nodes


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """A table whose first `left` columns are text and the others numbers."""
    table = Table(title=title, title_justify="left", highlight=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # plain text: a bracket in a name is no markup
    return table


def _span(layers: Sequence[int] | range) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _waves(stage: StagePlan) -> str:
    sizes = Counter(len(wave) for wave in stage.waves)
    text = " + ".join(f"{count} x {counted(size, 'layer')}" for size, count in sizes.items())
    return text if stage.resident else f"{text}, weights wave by wave"


def _stage_rows(plan: CalibrationPlan, *, host: bool) -> list[list[str]]:
    """A row a stage; neighbours that differ in their layers alone share one."""
    folded: list[tuple[list[StagePlan], list[str]]] = []
    for stage in plan.stages:
        items = stage.memory.host_items if host else stage.memory.items
        peak = stage.memory.host_peak if host else stage.memory.peak
        sizes = [_waves(stage), format_bytes(peak), *(format_bytes(items.get(item, 0)) for item in ITEMS)]
        if folded and folded[-1][1] == sizes and len(folded[-1][0][0].layers) == len(stage.layers):
            folded[-1][0].append(stage)
        else:
            folded.append(([stage], sizes))
    return [[*_stages_and_layers(stages), *sizes] for stages, sizes in folded]


def _stages_and_layers(stages: Sequence[StagePlan]) -> tuple[str, str]:
    """`3` and `30-39`; of several `1-6` and `10-69, 10 each`."""
    first, last = stages[0], stages[-1]
    layers = _span(range(first.layers[0], last.layers[-1] + 1))
    if len(stages) > 1:
        layers += f", {len(first.layers)} each"
    return _span(range(first.stage, last.stage + 1)), layers


def _share(plan: CalibrationPlan) -> str:
    """What each worker may use, as far as its node is known."""
    size = format_bytes(plan.memory_per_worker)
    if plan.host_memory is not None:
        host = format_bytes(plan.host_memory)
        return (
            f"{counted(plan.threads_per_worker, 'thread')} and at most {size} of a card and {host} of host memory each"
        )
    if plan.nodes_known:
        return f"{counted(plan.threads_per_worker, 'thread')} and at most {size} each"
    return f"at most {size} of a card each"


def _busiest_worker(plan: CalibrationPlan) -> str:
    """What decides how long the job takes; how fast cards and cores are is not known here."""
    num_layers = plan.architecture.num_layers
    passes = max(
        pass_operations(
            stage.waves,
            resident=stage.resident,
            num_layers=num_layers,
            operations=plan.operations,
            propagation=plan.config.propagation,
        )
        for stage in plan.stages
    )
    owned = max(-(-len(stage.layers) // plan.data_parallel_size) for stage in plan.stages)
    where = "threads" if plan.device.on_host else "card"
    return (
        f"the busiest worker: {passes / plan.data_parallel_size:.3g} in passes on its {where}, "
        f"{plan.operations.solve * owned / num_layers:.3g} in solves on its host's cores; time: not "
        "estimated"
    )


def _unknown_nodes(plan: CalibrationPlan) -> list[str]:
    """What is not planned where nothing is known of the cards' nodes."""
    if plan.nodes_known:
        return []
    peak, beside = plan.host_peak, min(plan.num_workers, CARDS_OF_A_NODE)
    return [
        "NOT PLANNED: host memory and cores of the nodes are unknown. These waves would take "
        f"{format_bytes(peak)} of host memory a worker, {format_bytes(peak * beside)} for {beside} workers a node. "
        "To have waves planned for the nodes, or the job refused, give --npus-per-node, --cpus-per-node, "
        "--memory-per-node and --nodes, or --address of a cluster that runs"
    ]


def print_plan(console: Console, plan: CalibrationPlan, model: str) -> None:
    """Stages with layers, waves and peak memory by item; then totals."""
    columns = ["stage", "layers", "waves", "peak", *ITEMS]
    where = "a worker" if plan.device.on_host else "an Ascend card"
    console.print(_table(f"Memory of {where}", columns, _stage_rows(plan, host=False), left=3))
    if not plan.device.on_host:
        console.print(_table("Memory of a worker's host", columns, _stage_rows(plan, host=True), left=3))
    a, data, operations = plan.architecture, plan.config.calibration, plan.operations
    quantized = sum(policy is not None for policy in plan.policies.values())
    lines = [
        f"model {model}: {a.model_type}, {a.num_layers} layers, {a.dtype}; "
        f"{quantized} of {len(plan.policies)} linears are quantised",
        f"workers: {counted(plan.pipeline_parallel_size, 'stage')} x {counted(plan.data_parallel_size, 'replica')} "
        f"on {plan.device}, " + _share(plan),
        f"samples: {data.num_samples} x {data.sequence_length} tokens in "
        f"{counted(data.num_micro_batches, 'micro-batch')} of {data.samples_per_micro_batch}, "
        f"{counted(data.num_blocks, 'reduction block')}; at most {plan.max_in_flight} in flight",
        *_experts(plan),
        f"propagation {plan.config.propagation}; second moments {_moments(plan)}",
        f"reads {format_bytes(plan.bytes_read)} from storage, moves {format_bytes(plan.bytes_moved)} between workers",
        f"operations: forward {operations.forward:.3g}, statistics {operations.statistics:.3g}, "
        f"solve {operations.solve:.3g}",
        _statistics_share(plan),
        _busiest_worker(plan),
        *_unknown_nodes(plan),
        *(f"note: {note}" for note in plan.notes),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _experts(plan: CalibrationPlan) -> list[str]:
    """What the experts of a mixture may expect; a summary tells what they got."""
    data = plan.config.calibration
    return [
        f"experts: a token passes {chosen} of {number} a layer, so that one sees about {tokens} of "
        f"{data.num_samples * data.sequence_length} tokens if the router deals evenly"
        for (number, chosen), tokens in plan.tokens_of_experts.items()
    ]


def print_policies(console: Console, plan: CalibrationPlan) -> None:
    """The effective policy of each kind of linear, every null filled, as YAML; kinds of one policy together."""
    kinds: dict[str, dict[str, list[int]]] = {}
    for layer in range(plan.architecture.num_layers):
        for name, policy in plan.layer_policies(layer).items():
            kept = policy is None or not (policy.quantizes_linear or policy.kvcache_quant_dtype)
            written = "as they are" if policy is None or kept else _policy_text(policy)
            kinds.setdefault(written, {}).setdefault(name, []).append(layer)
    for written, linears in kinds.items():
        told = [f"{name} ({_layers(layers, plan.architecture.num_layers)})" for name, layers in linears.items()]
        for line in (f"{', '.join(told)}:", *(f"  {part}" for part in written.splitlines())):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _policy_text(policy: QuantPolicy) -> str:
    return f"# {policy.label}\n" + yaml.safe_dump(policy.effective(), sort_keys=False, width=110)


def _layers(layers: Sequence[int], num_layers: int) -> str:
    """`every layer`, `layer 3`, `layers 0 to 5, 8`."""
    if len(layers) == num_layers:
        return "every layer"
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    parts = [f"{first}" if first == last else f"{first} to {last}" for first, last in spans]
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(parts)}"


def _moments(plan: CalibrationPlan) -> str:
    rows = plan.config.taken_sketch_rows
    form = f"as sketches of {rows} rows" if rows else "as Gram matrices"
    return form if plan.config.takes_gram else f"{form}, only where a solver needs them"


def _statistics_share(plan: CalibrationPlan) -> str:
    """What statistics add to the forward pass, to a worker's memory and to what moves."""
    held = max(stage.memory.share_of("statistics") for stage in plan.stages)
    moved = plan.statistics_moved / plan.bytes_moved if plan.bytes_moved else 0.0
    added = plan.operations.statistics / plan.operations.forward
    return (
        f"statistics: {added:.1%} of the forward pass's operations, {held:.0%} of a worker's memory, "
        f"{moved:.1%} of what moves between workers"
    )


def _number(value: float | None, *, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _linear_row(row: LinearSummary, *, judged: bool = False) -> list[str]:
    scales = "" if row.scale_min is None else f"{_number(row.scale_min)} .. {_number(row.scale_max)}"
    source = row.error_source if row.relative_error is not None else ""
    error = _number(row.relative_error)
    return [
        row.name,
        row.strategy,
        "; ".join(row.notes),
        error,
        source,
        _number(row.activation_error),
        _number(row.token_error),
        scales,
        str(row.num_tokens),
        *([_scheme_errors(row)] if judged else []),
    ]


def _scheme_errors(row: LinearSummary) -> str:
    """`W8 2e-05, W4 0.0071`."""
    return ", ".join(f"{scheme} {_number(error)}" for scheme, error in (row.scheme_errors or {}).items())


# On a narrow terminal columns are left out, two always and then as many as must, so that what remains can be read.
NARROW = 100
_ALWAYS_DROPPED = ("from", "tokens")
_DROPPED = (
    *_ALWAYS_DROPPED,
    "scales",
    "activations",
    "median token",
    "with notes",
    "idle",
    "peak planned",
    "notes",
    "median error",
)
_GAP = 2  # between columns
_FRAME = 3  # of a cell: a space on either side, and a line
_SHARED = "model.layers."
_LINEAR_COLUMNS = (
    "linear",
    "strategy",
    "notes",
    "relative error",
    "from",
    "activations",
    "median token",
    "scales",
    "tokens",
)


def _linear_table(title: str, rows: Sequence[LinearSummary], width: int) -> Table:
    judged = any(row.scheme_errors for row in rows)
    columns = (*_LINEAR_COLUMNS, "plain rounding would cost") if judged else _LINEAR_COLUMNS
    cells = [_linear_row(row, judged=judged) for row in rows]
    return _fitting_table(title, columns, cells, width, text=("linear", "strategy", "notes"))


def _fitting_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, text: Sequence[str]
) -> Table:
    """The whole table where no word of it has to be broken, else the narrow one; the first columns are `text`."""
    by_column = list(zip(columns, zip(*rows, strict=True), strict=True)) if rows else []
    needed = sum(_least_width(column, cells) + _FRAME for column, cells in by_column) + 1
    if width < max(NARROW, needed):
        return _narrow_table(title, columns, rows, width, text=text)
    table = _table(title, columns, rows, left=len(text))
    for shown, (_, cells) in zip(table.columns, by_column, strict=False):
        shown.no_wrap = not any(" " in cell for cell in cells)  # so that another column gives way
    return table


def _narrow_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, text: Collection[str]
) -> Table:
    """Without columns that say little, and without the part that all names share; words are not broken."""
    if any(row[0].startswith(_SHARED) for row in rows):
        title += f", names without {_SHARED}"
    by_column = {
        column: [_narrow_cell(column, row[n]) for row in rows]
        for n, column in enumerate(columns)
        if any(row[n] for row in rows)
    }
    for column in _DROPPED:
        if column in _ALWAYS_DROPPED or sum(_least_width(c, cells) + _GAP for c, cells in by_column.items()) > width:
            by_column.pop(column, None)
    least = {column: _least_width(column, cells) for column, cells in by_column.items()}
    spare = width - sum(least.values()) - _GAP * len(least)
    left = sum(column in text for column in by_column)
    table = _table(title, list(by_column), list(zip(*by_column.values(), strict=True)), left=left)
    table.box, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, (0, 1, 0, 0)
    for shown, (column, cells) in zip(table.columns, by_column.items(), strict=True):
        most = max(len(line) for cell in (column, *cells) for line in cell.split("\n"))
        more = max(0, min(most - least[column], spare))
        shown.width, spare = least[column] + more, spare - more
    return table


def _narrow_cell(column: str, text: str) -> str:
    """Names without what they share, a strategy a line a part."""
    if column == "strategy":
        return re.sub(r"-(?=[A-Z]+\d)", "\n", text)
    return text.removeprefix(_SHARED) if column == "linear" else text.replace(" .. ", "..")


def _least_width(column: str, cells: Sequence[str]) -> int:
    return max(len(word) for cell in (column, *cells) for word in cell.split() or [""])


def _role_rows(rows: Sequence[LinearSummary]) -> list[list[str]]:
    """One line for each role and strategy: how many, and the errors' median and worst."""
    groups: dict[tuple[str, str], list[LinearSummary]] = {}
    for row in rows:
        groups.setdefault((row.role, row.strategy), []).append(row)
    lines = []
    for (role, strategy), members in groups.items():
        measured = [(row.largest_error, row.layer) for row in members if row.largest_error is not None]
        worst = max(measured, default=None)
        median = statistics.median(error for error, _ in measured) if measured else None
        noted = sum(bool(row.notes) for row in members)
        lines.append(
            [
                role,
                strategy,
                str(len(members)),
                _number(median),
                "" if worst is None else f"{_number(worst[0])} (layer {worst[1]})",
                str(noted) if noted else "",
            ]
        )
    return lines


def _coverage_row(layer: LayerCoverage) -> list[str]:
    counts = layer.given
    figures = (len(counts), min(counts), round(statistics.median(counts)), layer.unreached, layer.borrowed)
    return [str(layer.layer), *map(str, figures)]


def _worker_row(stage: StageSummary) -> list[str]:
    measured = stage.peak_memory_measured
    return [
        str(stage.stage),
        str(stage.replica),
        _span(range(stage.first_layer, stage.end_layer)),
        f"{stage.seconds:.1f}",
        f"{stage.idle_share:.0%}",
        format_bytes(stage.peak_memory_planned),
        "" if measured is None else format_bytes(measured),
    ]


def print_summary(
    console: Console, summary: CalibrationSummary, *, sort: str | None = None, limit: int | None = None
) -> None:
    """Linears, workers and totals.

    Args:
        console: where to print.
        summary: what to print.
        sort: "layer", "error" or "sensitivity"; None groups the linears of a large model by role.
        limit: how many linears at most.

    Raises:
        ValueError: another order.
    """
    title = "Network Quantization Summary"
    if sort is None and limit is None and len(summary.rows) > ROWS_WITHOUT_GROUPING:
        columns = ("linear", "strategy", "count", "median error", "worst error", "with notes")
        lines = _role_rows(summary.rows)
        console.print(_fitting_table(title, columns, lines, console.width, text=("linear", "strategy")))
        worst = [row for row in summary.sorted_rows("error") if row.largest_error is not None][:WORST_ROWS]
        if worst:
            console.print(_linear_table("Largest errors", worst, console.width))
    else:
        rows = summary.sorted_rows(sort or "layer")
        shown = rows if limit is None else rows[:limit]
        console.print(_linear_table(title, shown, console.width))
        if len(shown) < len(rows):
            console.print(f"{len(rows) - len(shown)} more linears are not shown", markup=False, highlight=False)
    scarce = sorted((c for c in expert_coverage(summary.rows) if c.borrowed), key=lambda c: (-c.borrowed, c.layer))
    if scarce:
        columns = ("layer", "experts", "fewest tokens", "median", "reached by none", "by too few")
        console.print(_table("Experts that few tokens reach", columns, map(_coverage_row, scarce[:WORST_ROWS])))
    if summary.stages:
        names = ("stage", "replica", "layers", "seconds", "idle", "peak planned", "peak measured")
        workers = [_worker_row(stage) for stage in summary.stages]
        console.print(_fitting_table("Workers", names, workers, console.width, text=names[:3]))
    for line in _totals(summary):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _totals(summary: CalibrationSummary) -> list[str]:
    counts = ", ".join(f"{strategy} {count}" for strategy, count in summary.strategies.items())
    basis = (
        f"{summary.num_samples} samples, {summary.num_tokens} tokens, propagation {summary.propagation}"
        if summary.has_data
        else "made without data"
    )
    lines = [
        f"strategies: {counts}",
        f"model {summary.model} as {', '.join(summary.formats)}; {basis}, {summary.seconds:.1f} s",
    ]
    if not summary.has_data:
        lines.append(
            "relative error: the share of a weight's energy that is lost; median token: the median input channel's"
        )
    covered = describe_coverage(expert_coverage(summary.rows))
    lines += [covered] if covered else []
    lines += [f"{found.format}: {found.sentence()}" for found in summary.evaluations]
    lines += [f"probe of {probe.format}: {probe.sentence()}" for probe in summary.probes]
    return [*lines, *(f"note: {note}" for note in summary.notes)]
