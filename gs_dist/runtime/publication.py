"""From finished layers to a model that counts as done: merged, checked, told of, probed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gs_dist import __version__
from gs_dist.checkpoint.check import check_directory
from gs_dist.checkpoint.finished_model import unjudged
from gs_dist.checkpoint.kept_statistics import StatisticsOrigin, holds_statistics, remove_statistics, write_origin
from gs_dist.checkpoint.manifest import LayerManifest
from gs_dist.checkpoint.model_card import CARD, write_model_card
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import RunDirectory
from gs_dist.checkpoint.writer import write_bytes
from gs_dist.errors import RefusedError
from gs_dist.progress import Progress
from gs_dist.recipe.config import published_recipe
from gs_dist.recipe.text import PUBLISHED_RECIPE
from gs_dist.results.summary import CalibrationSummary, write_summary
from gs_dist.runtime.account import as_told_before, summarize, versions
from gs_dist.runtime.job import Job
from gs_dist.runtime.probe import MakeEvaluationGroup, Probe
from gs_dist.runtime.report_file import publish_report
from gs_dist.runtime.software import Software
from gs_dist.runtime.stage_times import StageTimes
from gs_dist.seal import sealed_text

__all__ = ["publish"]


def publish(
    job: Job,
    run: RunDirectory,
    reader: CheckpointReader,
    finished: Mapping[int, LayerManifest],
    outer: LayerManifest,
    times: StageTimes,
    probe: Probe | None,
    *,
    make_evaluation_group: MakeEvaluationGroup,
    seconds: float,
    progress: Progress,
) -> CalibrationSummary:
    """Makes a model of a job's layers, and writes `done` once nothing speaks against it.

    Args:
        job: recipe and plan.
        run: its output.
        reader: of the float checkpoint.
        finished: manifests of all layers.
        outer: of what stands outside the layers.
        times: how workers spent their time; false where nothing was left to do.
        probe: compares the result with the float model, if the recipe says so.
        make_evaluation_group: makes the workers of the probe.
        seconds: what the layers took.
        progress: told what is going on.

    Raises:
        RefusedError: what was made breaks a rule of its format, or the probe refuses it.
    """
    with _withdrawn_if_refused(run):
        config = job.config
        progress.phase("merging")
        run.merge(reader, finished, outer, job.plan.policies, recipe=config.fingerprint_fields(), versions=versions())
        _check_published(run, config.dialects)
        summary, recipe = summarize(job, reader, finished, times, seconds), config
        if times:
            for note in summary.notes:
                progress.message(note)
        else:
            summary, recipe = as_told_before(run.path, summary, config, progress.message)
        write_bytes(run.path / PUBLISHED_RECIPE, sealed_text(published_recipe(recipe)).encode())
        write_summary(run.path, summary)  # of use where the probe fails, too
        publish_report(run.path, summary, recipe, progress.message)
        _settle_statistics(job, run, finished, progress)
        if probe is not None:
            for name in config.dialects:  # cards of a model that is not judged yet
                (unjudged(run.path, name) / CARD).unlink(missing_ok=True)
            summary = probe.run(summary, make_evaluation_group, progress)
            write_summary(run.path, summary)
            publish_report(run.path, summary, recipe, progress.message)
        for name in config.dialects:
            write_model_card(unjudged(run.path, name), recipe, summary, reader.architecture)
        run.finish({"gs-dist": __version__, "layers": len(finished), "formats": list(config.dialects)})
        return summary


@contextmanager
def _withdrawn_if_refused(run: RunDirectory) -> Iterator[None]:
    """Takes back what was made of the layers where it comes to nothing."""
    try:
        yield
    except BaseException:
        run.withdraw()
        raise


def _settle_statistics(job: Job, run: RunDirectory, finished: Mapping[int, LayerManifest], progress: Progress) -> None:
    """Declares kept statistics to be whole, or removes those that served the job alone."""
    config = job.config
    if config.keep_statistics and all(holds_statistics(run.path, layer) for layer in finished):
        calibration, made_with = config.fingerprint_fields()["calibration"], Software.here().made_with
        write_origin(run.path, StatisticsOrigin.of(job.fingerprints, calibration, made_with.versions))
    elif config.keep_statistics:
        progress.message(
            "statistics are not kept: layers were published before keep_statistics was set. To have them, run the "
            "recipe into another output"
        )
    elif config.bits == "auto":
        remove_statistics(run.path)


def _check_published(run: RunDirectory, formats: tuple[str, ...]) -> None:
    """Nothing counts as done that a look at the files alone would refuse."""
    for name in formats:
        report = check_directory(unjudged(run.path, name))
        if not report.clean:
            raise RefusedError(f"{name}: what was published breaks the rules of its format:\n{report.render()}")
