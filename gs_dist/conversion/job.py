"""A conversion from start to end: parts are dealt to workers, finished ones are kept, and a model is made of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

from gs_dist import __version__
from gs_dist.checkpoint.finished_model import take_entrance
from gs_dist.checkpoint.job_end import forget_refusal, note_refusal
from gs_dist.checkpoint.manifest import MANIFESTS
from gs_dist.checkpoint.output_lock import DONE, locked
from gs_dist.checkpoint.part_manifest import PartManifest
from gs_dist.checkpoint.writer import make_directory, remove_leftovers, write_bytes, write_json
from gs_dist.conversion.account import summarize, write_cards
from gs_dist.conversion.parts import Part
from gs_dist.conversion.plan import ConversionPlan
from gs_dist.conversion.pool import convert_here
from gs_dist.conversion.publish import publish_model, refuse_other_run
from gs_dist.conversion.rows import refuse_destroyed
from gs_dist.conversion.worker import ConversionTask
from gs_dist.errors import RefusedError
from gs_dist.progress import Progress
from gs_dist.recipe.text import PUBLISHED_RECIPE
from gs_dist.results.summary import write_summary
from gs_dist.seal import sealed_text

__all__ = ["Pool", "convert", "task_of"]

Pool = Callable[[ConversionTask, Iterable[Part], int], Iterator[PartManifest]]
"""Converts parts on so many workers and yields manifests as parts are finished, in any order."""


def task_of(plan: ConversionPlan) -> ConversionTask:
    """What all parts of a plan have in common."""
    config = plan.config
    return ConversionTask(
        model=Path(config.model).absolute(),
        files=plan.source.stamps,
        output=Path(config.output).absolute(),
        formats=config.format,
        dtype=plan.catalogue.dtype,
        fingerprints={"recipe": config.fingerprint(), "source": plan.source.fingerprint()},
        made_with=_versions(),
    )


def convert(plan: ConversionPlan, progress: Progress, pool: Pool = convert_here) -> dict[str, Path]:
    """Converts; goes on from the parts that an earlier attempt finished.

    Returns:
        Format to model directory.

    Raises:
        OutputError: the output holds another job, is in use, or cannot be written.
        CheckpointError: the source is damaged or changed.
        LayerError: rounding destroyed a linear.
        JobFailure: a worker died, or a tensor is unaccounted for.
    """
    task = task_of(plan)
    with locked(task.output):
        refuse_other_run(task, len(plan.parts))
        (task.output / DONE).unlink(missing_ok=True)
        forget_refusal(task.output, plan.config.format)
        for name in plan.config.format:
            take_entrance(task.output / name)
        for name in (*plan.config.format, MANIFESTS):
            remove_leftovers(make_directory(task.output / name))
        with _refusals_noted(plan):
            return _converted(plan, task, progress, pool)


@contextmanager
def _refusals_noted(plan: ConversionPlan) -> Iterator[None]:
    """What refuses the outcome stands in the output, too, where nothing looks like a model then."""
    output, formats = Path(plan.config.output), plan.config.format
    try:
        yield
    except RefusedError as error:
        for name in formats:
            take_entrance(output / name)
        note_refusal(output, formats, str(error))
        raise


def _converted(plan: ConversionPlan, task: ConversionTask, progress: Progress, pool: Pool) -> dict[str, Path]:
    """The work itself, in an output that is locked and cleared."""
    began = time.perf_counter()
    finished: dict[int, PartManifest] = {}
    for manifest in pool(task, plan.parts, plan.num_workers):
        refuse_destroyed(manifest.rows, plan.config.max_relative_error)
        finished[manifest.number] = manifest
        progress.part_finished(manifest.number, len(finished), len(plan.parts))
    made = {name: publish_model(plan, task, finished, name) for name in plan.config.format}
    summary = summarize(plan, finished, time.perf_counter() - began)
    write_bytes(task.output / PUBLISHED_RECIPE, sealed_text(plan.config.published()).encode())
    write_summary(task.output, summary)
    write_cards(plan, summary, made.values())
    write_json(task.output / DONE, {"parts": len(finished), "formats": list(made)})
    return made


def _versions() -> Mapping[str, str]:
    return {"gs-dist": __version__, "ml-dtypes": ml_dtypes.__version__, "numpy": np.__version__}
