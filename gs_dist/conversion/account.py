"""What a conversion says of itself once its files are there: summary and model cards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from gs_dist.checkpoint.model_card import CardTexts, write_card
from gs_dist.checkpoint.part_manifest import PartManifest
from gs_dist.conversion.config import ConversionConfig
from gs_dist.conversion.plan import ConversionPlan
from gs_dist.conversion.rows import kept_row
from gs_dist.errors import CheckpointError, OutputError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.families import read_architecture
from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import CalibrationSummary, read_summary

__all__ = ["conversion_texts", "rows_of", "summarize", "write_cards"]

_ERROR = (
    "No data was seen: the relative error is the lost share of the weight's energy, or of its median input channel's, "
    "whichever is larger."
)


def rows_of(plan: ConversionPlan, finished: Iterable[PartManifest]) -> tuple[LinearSummary, ...]:
    """A row for every linear, in the order of storage, those too that stay in floats."""
    made = {row.name: row for manifest in finished for row in manifest.rows}
    kept = plan.assignment.kept
    return tuple(
        made[name] if scheme is not None else kept_row(name, kept.get(name, "no scheme"))
        for name, scheme in plan.assignment.schemes.items()
    )


def summarize(plan: ConversionPlan, finished: Mapping[int, PartManifest], seconds: float) -> CalibrationSummary:
    """The summary of a conversion whose parts are all finished.

    Perplexities that were measured of the same result before are kept.
    """
    manifest = finished[plan.parts[0].number]
    summary = CalibrationSummary(
        model=plan.source.directory.resolve().name,
        formats=plan.config.format,
        propagation="none",
        num_samples=0,
        num_tokens=0,
        seconds=seconds,
        versions=dict(manifest.made_with),
        fingerprints=dict(manifest.fingerprints),
        rows=rows_of(plan, finished.values()),
        stages=(),
        notes=plan.notes,
    )
    with suppress(OutputError):
        earlier = read_summary(Path(plan.config.output))
        if earlier.fingerprints == summary.fingerprints:
            return dataclasses.replace(summary, evaluations=earlier.evaluations)
    return summary


def conversion_texts(config: ConversionConfig, model_type: str, dtype: str) -> CardTexts:
    """What a card says of how a model was converted."""
    settings: list[tuple[str, object]] = [("made without data", "`mode: convert`"), ("`scheme`", f"`{config.scheme}`")]
    if config.group_size is not None:
        settings.append(("`group_size`", config.group_size))
    settings += [
        (f"`layer_policies` `{pattern}`", f"`{json.dumps(scheme)}`")
        for pattern, scheme in config.layer_policies.items()
    ]
    return CardTexts(
        kind=f"{model_type}, {dtype}",
        kept="Everything that is no linear, and linears that stayed in floats, are as they were.",
        error=_ERROR,
        settings=settings,
        recipe=config.published(),
    )


def write_cards(plan: ConversionPlan, summary: CalibrationSummary, directories: Iterable[Path]) -> None:
    """README.md of every model directory."""
    texts = conversion_texts(plan.config, plan.catalogue.model_type, plan.catalogue.dtype)
    for directory in directories:
        write_card(directory, texts, summary, _architecture(plan))


def _architecture(plan: ConversionPlan) -> DecoderArchitecture | None:
    """Of a model type whose networks are known, so that engines' rules on it are too."""
    try:
        return read_architecture(plan.source.config)
    except CheckpointError:
        return None
