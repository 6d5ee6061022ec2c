"""What a job says of itself once its layers are published: summary, recipe, model cards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from gs_dist import __version__
from gs_dist.checkpoint.finished_model import unjudged
from gs_dist.checkpoint.layer_costs import SENSITIVITY, read_costs
from gs_dist.checkpoint.manifest import LayerManifest, part_stem
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.shipped_text import shipped_note
from gs_dist.errors import OutputError, RecipeError
from gs_dist.recipe.config import CalibrationConfig, read_published_recipe
from gs_dist.recipe.text import PUBLISHED_RECIPE
from gs_dist.results.costs import LayerCosts
from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import CalibrationSummary, read_summary
from gs_dist.runtime.choice import with_scheme_errors
from gs_dist.runtime.job import Job
from gs_dist.runtime.software import mixture_note, package_version
from gs_dist.runtime.stage_times import StageTimes

__all__ = ["as_told_before", "summarize", "versions"]

_MOST_LAYERS = 8  # named in a note
_VERSIONED = ("mindspore", "numpy", "pyarrow", "ray", "scipy")


def versions() -> dict[str, str]:
    """Package to version."""
    return {"gs-dist": __version__} | {name: package_version(name) for name in _VERSIONED}


def summarize(
    job: Job,
    reader: CheckpointReader,
    finished: Mapping[int, LayerManifest],
    times: StageTimes,
    seconds: float,
) -> CalibrationSummary:
    """The summary of a job whose layers are all finished.

    Args:
        job: recipe and plan.
        reader: of the float checkpoint.
        finished: manifests of all layers.
        times: what its workers report.
        seconds: wall time.
    """
    head = LinearSummary(
        layer=job.plan.architecture.num_layers,
        name="lm_head",
        strategy="NA",
        relative_error=None,
        error_source="none",
        scale_min=None,
        scale_max=None,
        num_tokens=0,
    )
    rows = []
    unknown = []
    for layer in sorted(finished):
        costs = _costs_of(job, layer) if job.config.judges_schemes else None
        if costs is None:
            unknown.append(layer)
        rows += [with_scheme_errors(row, costs) for row in finished[layer].rows]
    notes = [mixture_note(finished), _unknown_costs(unknown) if job.config.judges_schemes else None]
    return CalibrationSummary(
        model=reader.directory.resolve().name,
        formats=job.config.dialects,
        propagation=job.config.propagation,
        num_samples=job.plan.config.calibration.num_samples,
        num_tokens=max((row.num_tokens for row in rows), default=0),
        seconds=seconds,
        versions=versions(),
        fingerprints=dataclasses.asdict(job.fingerprints),
        rows=(*rows, head),
        stages=times.summaries(),
        notes=(*filter(None, notes), *shipped_note(job.config.calibration.data)),
        source_bytes=sum(info.nbytes for info in reader.tensors.values()),
        model_bytes={name: _weight_bytes(unjudged(Path(job.config.output), name)) for name in job.config.dialects},
    )


def _unknown_costs(layers: Sequence[int]) -> str | None:
    """Of layers that are finished, so that nobody judges them again."""
    if not layers:
        return None
    shown = f"{', '.join(map(str, layers[:_MOST_LAYERS]))}{' and more' if len(layers) > _MOST_LAYERS else ''}"
    return (
        f"what 8 and 4 bits would cost is not known of layer{'s' if len(layers) > 1 else ''} {shown}: "
        f"{SENSITIVITY}/{part_stem(layers[0])}.json is gone or was changed. Run the recipe into another output to "
        "find it out"
    )


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _costs_of(job: Job, layer: int) -> LayerCosts | None:
    with suppress(OutputError):
        return read_costs(Path(job.config.output), layer, job.fingerprints)
    return None


def as_told_before(
    output: Path, summary: CalibrationSummary, config: CalibrationConfig, tell: Callable[[str], None]
) -> tuple[CalibrationSummary, CalibrationConfig]:
    """Summary and recipe of a run in which nothing was left to do: how the work was done, the run that did it said.

    How the result is judged is the present recipe's; what an earlier probe found goes where it is to be found anew.
    What that run said counts only where it can be read; layers, and what is told of them, do not depend on it.
    """
    try:
        earlier = read_summary(output)
    except OutputError as error:
        tell(f"{error}; who did the work, and how long it took, is not known any more")
    else:
        probes = earlier.probes if config.max_perplexity_increase is None else ()
        summary = dataclasses.replace(
            earlier,
            rows=summary.rows,
            fingerprints=summary.fingerprints,
            formats=summary.formats,
            probes=probes,
            source_bytes=summary.source_bytes,
            model_bytes=summary.model_bytes,
        )
    judged = {"max_perplexity_increase": config.max_perplexity_increase, "probe": config.probe}
    try:
        config = read_published_recipe(output / PUBLISHED_RECIPE).model_copy(update=judged)
    except (RecipeError, OutputError) as error:
        tell(f"{error}; the recipe as it is now stands in its place")
    return summary, config
