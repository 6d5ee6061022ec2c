"""Plans and summaries as tables for a terminal."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gs_dist.memory import ITEMS
from gs_dist.plan import CalibrationPlan, StagePlan
from gs_dist.quantized import LinearSummary
from gs_dist.spread import format_bytes, pass_operations
from gs_dist.summary import CalibrationSummary, StageSummary

__all__ = ["print_plan", "print_summary"]

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
    text = " + ".join(f"{count} of {size}" for size, count in sizes.items())
    return text if stage.resident else f"{text}, weights wave by wave"


def _stage_rows(plan: CalibrationPlan, *, host: bool) -> list[list[str]]:
    rows = []
    for stage in plan.stages:
        items = stage.memory.host_items if host else stage.memory.items
        peak = stage.memory.host_peak if host else stage.memory.peak
        sizes = [format_bytes(items.get(item, 0)) for item in ITEMS]
        rows.append([str(stage.stage), _span(stage.layers), _waves(stage), format_bytes(peak), *sizes])
    return rows


def _share(plan: CalibrationPlan) -> str:
    """What each worker may use, as far as its node is known."""
    size = format_bytes(plan.memory_per_worker)
    if plan.host_memory is not None:
        host = format_bytes(plan.host_memory)
        return f"{plan.threads_per_worker} threads and at most {size} of a card and {host} of host memory each"
    if plan.nodes_known:
        return f"{plan.threads_per_worker} threads and at most {size} each"
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
            propagation=plan.propagation,
        )
        for stage in plan.stages
    )
    owned = max(-(-len(stage.layers) // plan.data_parallel_size) for stage in plan.stages)
    where = "threads" if plan.device == "cpu" else "card"
    return (
        f"the busiest worker: {passes / plan.data_parallel_size:.3g} in passes on its {where}, "
        f"{plan.operations.solve * owned / num_layers:.3g} in solves on its host's cores; no rate is assumed, "
        "so no time is told"
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
    where = "a worker" if plan.device == "cpu" else "an Ascend card"
    console.print(_table(f"Memory of {where}", columns, _stage_rows(plan, host=False), left=3))
    if plan.device != "cpu":
        console.print(_table("Memory of a worker's host", columns, _stage_rows(plan, host=True), left=3))
    a, operations = plan.architecture, plan.operations
    quantised = sum(policy is not None for policy in plan.policies.values())
    lines = [
        f"model {model}: {a.model_type}, {a.num_layers} layers, {a.dtype}; "
        f"{quantised} of {len(plan.policies)} linears are quantised",
        f"workers: {plan.pipeline_parallel_size} stages x {plan.data_parallel_size} replicas on {plan.device}, "
        + _share(plan),
        f"samples: {plan.num_samples} x {plan.sequence_length} tokens in {plan.num_micro_batches} micro-batches of "
        f"{plan.micro_batch_size}, {plan.num_blocks} reduction blocks; at most {plan.max_in_flight} in flight",
        f"propagation {plan.propagation}; Gram matrices {'on' if plan.gram else 'only where a solver needs them'}",
        f"reads {format_bytes(plan.bytes_read)} from storage, moves {format_bytes(plan.bytes_moved)} between workers",
        f"operations: forward {operations.forward:.3g}, Gram {operations.gram:.3g}, solve {operations.solve:.3g}",
        _busiest_worker(plan),
        *_unknown_nodes(plan),
        *(f"note: {note}" for note in plan.notes),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


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
        scales,
        str(row.num_tokens),
        *([_scheme_errors(row)] if judged else []),
    ]


def _scheme_errors(row: LinearSummary) -> str:
    """`W8 2e-05, W4 0.0071`."""
    return ", ".join(f"{scheme} {_number(error)}" for scheme, error in (row.scheme_errors or {}).items())


_LINEAR_COLUMNS = ("linear", "strategy", "notes", "relative error", "from", "activations", "scales", "tokens")


def _linear_table(title: str, rows: Sequence[LinearSummary]) -> Table:
    judged = any(row.scheme_errors for row in rows)
    columns = (*_LINEAR_COLUMNS, "plain rounding would cost") if judged else _LINEAR_COLUMNS
    return _table(title, columns, (_linear_row(row, judged=judged) for row in rows), left=3)


def _role(row: LinearSummary) -> str:
    """The name without the layer's number."""
    return ".".join("*" if part.isdigit() else part for part in row.name.split("."))


def _role_rows(rows: Sequence[LinearSummary]) -> list[list[str]]:
    """One line for each role and strategy: how many, and the errors' median and worst."""
    groups: dict[tuple[str, str], list[LinearSummary]] = {}
    for row in rows:
        groups.setdefault((_role(row), row.strategy), []).append(row)
    lines = []
    for (role, strategy), members in groups.items():
        measured = [(row.relative_error, row.layer) for row in members if row.relative_error is not None]
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
        console.print(_table(title, columns, _role_rows(summary.rows), left=2))
        worst = [row for row in summary.sorted_rows("error") if row.relative_error is not None][:WORST_ROWS]
        if worst:
            console.print(_linear_table("Largest errors", worst))
    else:
        rows = summary.sorted_rows(sort or "layer")
        shown = rows if limit is None else rows[:limit]
        console.print(_linear_table(title, shown))
        if len(shown) < len(rows):
            console.print(f"{len(rows) - len(shown)} more linears are not shown", markup=False, highlight=False)
    if summary.stages:
        columns_of_workers = ("stage", "replica", "layers", "seconds", "idle", "peak planned", "peak measured")
        console.print(_table("Workers", columns_of_workers, map(_worker_row, summary.stages), left=3))
    for line in _totals(summary):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _totals(summary: CalibrationSummary) -> list[str]:
    counts = ", ".join(f"{strategy} {count}" for strategy, count in summary.strategies.items())
    lines = [
        f"strategies: {counts}",
        f"model {summary.model} as {', '.join(summary.formats)}; {summary.num_samples} samples, "
        f"{summary.num_tokens} tokens, propagation {summary.propagation}, {summary.seconds:.1f} s",
    ]
    lines += [f"{found.format}: {found.sentence()}" for found in summary.evaluations]
    lines += [f"probe of {probe.format}: {probe.sentence()}" for probe in summary.probes]
    return [*lines, *(f"note: {note}" for note in summary.notes)]
