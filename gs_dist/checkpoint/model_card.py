"""README.md of a model directory: what it is, how it was made, how good it is, how to serve it.

Nothing in it tells on which machine it was made: paths are reduced to their last part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gs_dist.checkpoint.check import EngineVerdict, judge
from gs_dist.checkpoint.engines import ENGINES
from gs_dist.checkpoint.markdown import code, fenced, prose, quoted
from gs_dist.checkpoint.writer import write_bytes
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.numbers.table import NUMBER_FORMATS
from gs_dist.recipe.config import CalibrationConfig, published_recipe
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.results.summary import CalibrationSummary

__all__ = ["CARD", "CardTexts", "card_texts", "render_card", "write_card", "write_model_card"]

CARD = "README.md"

_WORST = 5  # linears listed with their error
_REASONS = 3  # listed of why an engine does not load the directory


@dataclass(frozen=True, kw_only=True)
class CardTexts:
    """What a card says that depends on how the model was made.

    Attributes:
        kind: the model in a few words: type, size, dtype.
        kept: sentence on what stayed as it was.
        error: sentence on what the relative error is.
        settings: rows of setting and value, those that matter.
        recipe: all settings, as YAML.
    """

    kind: str
    kept: str
    error: str
    settings: Sequence[tuple[str, object]]
    recipe: str


def card_texts(config: CalibrationConfig, summary: CalibrationSummary, architecture: DecoderArchitecture) -> CardTexts:
    """Of a calibrated model."""
    head = "tied to the embedding" if architecture.tie_word_embeddings else "with a head of its own"
    return CardTexts(
        kind=f"{architecture.model_type}, {architecture.num_layers} layers, hidden size {architecture.hidden_size}, "
        f"{architecture.dtype}, {head}",
        kept="Embedding, norms and head are as they were, except for norms that took up a rescaling or a shift of "
        "channels.",
        error="The relative error is that of the linear's output on the calibration data: over all tokens or of the "
        "median one, whichever is larger, rounded activations included.",
        settings=_settings(config, summary),
        recipe=published_recipe(config),
    )


def write_model_card(
    directory: Path, config: CalibrationConfig, summary: CalibrationSummary, architecture: DecoderArchitecture
) -> None:
    """Publishes `directory/README.md` of a calibrated model; see `write_card`."""
    write_card(directory, card_texts(config, summary, architecture), summary, architecture)


def write_card(
    directory: Path, texts: CardTexts, summary: CalibrationSummary, architecture: DecoderArchitecture | None
) -> None:
    """Publishes `directory/README.md`; the directory's name is the dialect's, and the rest of it is there already.

    Args:
        directory: of the model.
        texts: what depends on how it was made.
        summary: of the job.
        architecture: of the model; None where it is not known, so that no engine is judged.

    Raises:
        OutputError: the directory cannot be written.
    """
    engines = [engine.name for engine in ENGINES.values() if directory.name in engine.dialects]
    verdicts = [judge(directory, engine) for engine in engines] if architecture is not None else []
    text = render_card(texts, summary, architecture, directory.name, verdicts)
    write_bytes(directory / CARD, text.encode())


def render_card(
    texts: CardTexts,
    summary: CalibrationSummary,
    architecture: DecoderArchitecture | None,
    dialect: str,
    verdicts: Sequence[EngineVerdict] = (),
) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        texts: what depends on how the model was made.
        summary: of the job; with perplexities where they were measured.
        architecture: of the model, None where it is not known.
        dialect: the dialect of this directory.
        verdicts: what the engines that know the dialect do with the directory, in the order to be shown.
    """
    sections = [
        _front_matter(summary, dialect),
        f"# {prose(summary.model)}, quantised\n\n{_introduction(texts, summary, dialect, verdicts)}",
        f"## Linears\n\n{_strategies(texts, summary)}",
        f"## Quality\n\n{_quality(summary, dialect)}",
        f"## How it was made\n\n{_recipe(texts)}",
        f"## How to serve it\n\n{_serving(architecture, dialect, verdicts)}",
        f"## Origin\n\n{_origin(summary)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(summary: CalibrationSummary, dialect: str) -> str:
    parts = {part for name in summary.strategies for part in name.split("-")}
    numbers = sorted(form.title for form in NUMBER_FORMATS if form.label in parts)
    tags = [*numbers, dialect, "gs-dist"]
    # Strings in JSON are strings in YAML, whatever a model's name holds.
    return "\n".join(["---", f"base_model: {quoted(summary.model)}", f"tags: {json.dumps(tags)}", "---"])


def _introduction(
    texts: CardTexts, summary: CalibrationSummary, dialect: str, verdicts: Iterable[EngineVerdict]
) -> str:
    engines = [ENGINES[verdict.engine].title for verdict in verdicts if not verdict.problems]
    form = " for ".join([DIALECTS[dialect].title, *([_listed(engines)] if engines else [])])
    return (
        f"Weights of {code(summary.model)} ({texts.kind}) after post-training quantisation by gs_dist, in {form}. "
        f"{texts.kept}"
    )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    cells = [list(map(_cell, header)), *(list(map(_cell, row)) for row in rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _strategies(texts: CardTexts, summary: CalibrationSummary) -> str:
    rows = []
    for strategy, count in summary.strategies.items():
        errors = [
            row.largest_error for row in summary.rows if row.strategy == strategy and row.largest_error is not None
        ]
        rows.append((f"`{strategy}`", count, f"{max(errors):.2e}" if errors else "-"))
    return _table(("strategy", "linears", "largest relative error"), rows) + (
        f"\n\n`NA` is a linear that stayed in float. {texts.error}"
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


def _recipe(texts: CardTexts) -> str:
    recipe = texts.recipe.rstrip("\n")
    return _table(("setting", "value"), texts.settings) + f"\n\nThe recipe in full:\n\n{fenced(recipe, 'yaml')}"


def _settings(config: CalibrationConfig, summary: CalibrationSummary) -> list[tuple[str, object]]:
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
    return rows


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda other: getattr(other, "value", str(other)))


def _serving(architecture: DecoderArchitecture | None, dialect: str, verdicts: Sequence[EngineVerdict]) -> str:
    if architecture is None:
        return (
            "Which engines serve this type of model was not judged; `gs-dist check DIRECTORY --for ENGINE` tells what "
            "an engine loads of its number formats."
        )
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
