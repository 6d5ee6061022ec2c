"""README.md of a model directory: what it is, how it was made, how good it is, how to serve it.

Nothing in it tells on which machine it was made: paths are reduced to their last part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.check import EngineVerdict, judge
from gs_dist.checkpoint.engines import ENGINES
from gs_dist.checkpoint.markdown import code, fenced, prose, quoted
from gs_dist.checkpoint.writer import write_bytes
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.numbers.table import WEIGHT_FORMATS
from gs_dist.recipe.config import CalibrationConfig, published_recipe
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.results.summary import CalibrationSummary

__all__ = ["CARD", "render_model_card", "write_model_card"]

CARD = "README.md"

_WORST = 5  # linears listed with their error
_REASONS = 3  # listed of why an engine does not load the directory


def write_model_card(
    directory: Path, config: CalibrationConfig, summary: CalibrationSummary, architecture: DecoderArchitecture
) -> None:
    """Publishes `directory/README.md`; the directory's name is the dialect's, and the rest of it is there already.

    Raises:
        OutputError: the directory cannot be written.
    """
    engines = [engine.name for engine in ENGINES.values() if directory.name in engine.dialects]
    verdicts = [judge(directory, engine) for engine in engines]
    text = render_model_card(config, summary, architecture, directory.name, verdicts)
    write_bytes(directory / CARD, text.encode())


def render_model_card(
    config: CalibrationConfig,
    summary: CalibrationSummary,
    architecture: DecoderArchitecture,
    dialect: str,
    verdicts: Sequence[EngineVerdict] = (),
) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        config: the recipe.
        summary: of the job; with perplexities where they were measured.
        architecture: of the model.
        dialect: the dialect of this directory.
        verdicts: what the engines that know the dialect do with the directory, in the order to be shown.
    """
    sections = [
        _front_matter(summary, dialect),
        f"# {prose(summary.model)}, quantised\n\n{_introduction(summary, architecture, dialect, verdicts)}",
        f"## Linears\n\n{_strategies(summary)}",
        f"## Quality\n\n{_quality(summary, dialect)}",
        f"## How it was made\n\n{_recipe(config, summary)}",
        f"## How to serve it\n\n{_serving(architecture, dialect, verdicts)}",
        f"## Origin\n\n{_origin(summary)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(summary: CalibrationSummary, dialect: str) -> str:
    parts = {part for name in summary.strategies for part in name.split("-")}
    numbers = sorted(form.title for form in WEIGHT_FORMATS.values() if form.label in parts)
    tags = [*numbers, dialect, "gs-dist"]
    # Strings in JSON are strings in YAML, whatever a model's name holds.
    return "\n".join(["---", f"base_model: {quoted(summary.model)}", f"tags: {json.dumps(tags)}", "---"])


def _introduction(
    summary: CalibrationSummary,
    architecture: DecoderArchitecture,
    dialect: str,
    verdicts: Iterable[EngineVerdict],
) -> str:
    engines = [ENGINES[verdict.engine].title for verdict in verdicts if not verdict.problems]
    form = " for ".join([DIALECTS[dialect].title, *([_listed(engines)] if engines else [])])
    kind = f"{architecture.model_type}, {architecture.num_layers} layers, hidden size {architecture.hidden_size}"
    head = "tied to the embedding" if architecture.tie_word_embeddings else "with a head of its own"
    return (
        f"Weights of {code(summary.model)} ({kind}, {architecture.dtype}, {head}) after post-training quantisation by "
        f"gs_dist, in {form}. Embedding, norms and head are as they were, "
        "except for norms that took up a rescaling or a shift of channels."
    )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    cells = [list(map(_cell, header)), *(list(map(_cell, row)) for row in rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _strategies(summary: CalibrationSummary) -> str:
    rows = []
    for strategy, count in summary.strategies.items():
        errors = [
            row.largest_error for row in summary.rows if row.strategy == strategy and row.largest_error is not None
        ]
        rows.append((f"`{strategy}`", count, f"{max(errors):.2e}" if errors else "-"))
    return _table(("strategy", "linears", "largest relative error"), rows) + (
        "\n\n`NA` is a linear that stayed in float. The relative error is that of the linear's output on the "
        "calibration data: over all tokens or of the median one, whichever is larger, rounded activations included."
    )


def _quality(summary: CalibrationSummary, dialect: str) -> str:
    worst = [row for row in summary.sorted_rows("error") if row.largest_error is not None][:_WORST]
    parts = []
    probed = [probe.sentence() for probe in summary.probes if probe.format == dialect]
    evaluated = [found for found in summary.evaluations if found.format == dialect]
    for found in evaluated:
        rows = [("quantised", f"{found.perplexity:.4f}")]
        if found.float_perplexity is not None:
            change = found.perplexity / found.float_perplexity - 1
            rows = [("float", f"{found.float_perplexity:.4f}"), (f"quantised ({change:+.2%})", rows[0][1])]
        parts.append(f"{_table(('model', 'perplexity'), rows)}\n\nOver {prose(found.basis())}.")
        if found.comparison is not None:
            parts.append(_table(("beside the float model, token by token", ""), found.comparison.rows()))
    if not probed and not evaluated:
        parts.append("Perplexity was not measured: `gs-dist evaluate` does so.")
    parts += [f"Before it was published: {prose(sentence)}." for sentence in probed]
    if worst:
        lines = [(f"`{row.name}`", f"`{row.strategy}`", f"{row.largest_error:.2e}") for row in worst]
        table = _table(("linear", "strategy", "relative error"), lines)
        parts.append(f"The linears with the largest relative output error:\n\n{table}")
    parts += [f"* {prose(note)}" for note in summary.notes]
    return "\n\n".join(parts)


def _recipe(config: CalibrationConfig, summary: CalibrationSummary) -> str:
    rows: list[tuple[str, object]] = [
        ("calibration", f"{summary.num_samples} samples, {summary.num_tokens} tokens"),
        ("sequence length", config.calibration.sequence_length),
        ("passed from layer to layer", f"the {summary.propagation} output"),
    ]
    # What a recipe leaves out and what it sets to the default are one; the recipe in full has both.
    set_apart = config.ptq.model_dump(exclude_defaults=True, exclude={"opname_blacklist"})
    rows += [(f"`ptq.{name}`", code(_plain(value))) for name, value in set_apart.items()]
    for pattern, override in config.layer_policies.items():
        rows.append((f"`layer_policies` {code(pattern)}", code(_plain(override))))
    recipe = published_recipe(config).rstrip("\n")
    return _table(("setting", "value"), rows) + f"\n\nThe recipe in full:\n\n{fenced(recipe, 'yaml')}"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda other: getattr(other, "value", str(other)))


def _serving(architecture: DecoderArchitecture, dialect: str, verdicts: Sequence[EngineVerdict]) -> str:
    parts = [_engine(verdict, architecture, dialect) for verdict in verdicts]
    if any(verdict.problems for verdict in verdicts):
        parts += [DIALECTS[dialect].elsewhere] if DIALECTS[dialect].elsewhere else []
    if architecture.dtype == "float32" and "--dtype bfloat16" in "".join(parts):
        parts.append("The model's dtype is float32; engines compute in bfloat16.")
    return "\n\n".join(parts)


def _engine(verdict: EngineVerdict, architecture: DecoderArchitecture, dialect: str) -> str:
    """How to serve with an engine and what to know of it, or why not to."""
    name = ENGINES[verdict.engine].title
    if verdict.problems:
        reasons = list(
            dict.fromkeys(f"* found {prose(p.found)}; expected {prose(p.expected)}" for p in verdict.problems)
        )
        if len(reasons) > _REASONS:
            more = f"* and {len(reasons) - _REASONS} more, which `gs-dist check DIRECTORY --for {verdict.engine}` lists"
            reasons[_REASONS:] = [more]
        return f"**Not with {name}**, which does not run this as it is meant:\n\n" + "\n".join(reasons)
    text = ENGINES[verdict.engine].serve(dialect, architecture, verdict.notes)
    return "\n\n".join([text, *(f"* {note.text}" for note in verdict.notes)])


def _origin(summary: CalibrationSummary) -> str:
    rows = [(f"{name} (sha256)", f"`{digest}`") for name, digest in summary.fingerprints.items()]
    rows += [(prose(name), prose(version)) for name, version in summary.versions.items()]
    return _table(("made from or with", "value"), rows) + (
        "\n\n`gs-dist check DIRECTORY` compares names, shapes, dtypes and values with what the dialect calls for."
    )
