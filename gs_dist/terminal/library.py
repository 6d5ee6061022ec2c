"""The commands for Python: `from gs_dist import quantize, plan, evaluate, load_summary, show_report`.

They take what the command line takes, and raise what it turns into messages: `UserError` where something of yours must
be changed (exit code 2 there), `JobFailure` where a run failed (exit code 1).
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.progress import JobStatus, Progress, SilentProgress
from gs_dist.recipe.config import CalibrationConfig, read_published_recipe
from gs_dist.recipe.sections import CalibrationData
from gs_dist.recipe.text import PUBLISHED_RECIPE
from gs_dist.results.summary import CalibrationSummary, PerplexitySummary, read_summary
from gs_dist.terminal.conversion import asks_for_conversion
from gs_dist.terminal.request import Request

__all__ = ["Report", "evaluate", "load_summary", "plan", "quantize", "show_report"]

Source = str | os.PathLike[str] | CalibrationConfig
Watcher = Callable[[JobStatus], None]


class _Watched(SilentProgress):
    """Hands the status of the job on."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def job_status(self, status: JobStatus) -> None:
        """Called every few seconds, from a thread of its own."""
        self._watcher(status)


def quantize(
    source: Source,
    *overrides: str,
    scheme: str | None = None,
    data: Sequence[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    format: Sequence[str] | None = None,
    samples: int | None = None,
    length: int | None = None,
    address: str | None = None,
    nodes: int | None = None,
    progress: Watcher | None = None,
) -> CalibrationSummary:
    """Calibrates, quantises and publishes a model, as `gs-dist quantize` does; called again, it resumes.

    Args:
        source: directory of the float model, a recipe's file, or a recipe.
        overrides: settings to lay over the recipe, such as `calibration.num_samples=64`.
        scheme: how a model is quantised; `w8a8-dynamic` where None.
        data: files, directories, patterns or URIs of text to calibrate on.
        output: directory of the job; the model lies in it, in a directory named after the format.
        format: `compressed-tensors`, `ascend`, `golden-stick`.
        samples: how many to calibrate on.
        length: tokens of a sample.
        address: of a Ray cluster to join; None starts one here for as long as the job runs.
        nodes: of that cluster to wait for; None for those that are there.
        progress: called every few seconds with where the whole job stands, from another thread.

    Raises:
        UserError: something in recipe, checkpoint, data, output or cluster must be changed first.
        JobFailure: the run failed; what was finished is kept.
    """
    config = _config(
        source,
        overrides,
        scheme=scheme,
        data=data,
        output=None if output is None else Path(output),
        format=format,
        samples=samples,
        length=length,
    )
    from gs_dist.runtime import coordinator  # imports Ray

    return coordinator.quantize(config, address=address, num_nodes=nodes, progress=_told(progress))


def plan(
    source: Source,
    *overrides: str,
    scheme: str | None = None,
    data: Sequence[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    length: int | None = None,
    nodes: int | None = None,
    npus_per_node: int | None = None,
    cpus_per_node: int | None = None,
    memory_per_node: int | None = None,
) -> CalibrationPlan:
    """Stages, waves and memory of a job from headers alone, as `gs-dist plan` shows them.

    Args:
        source: as of `quantize`.
        overrides: likewise.
        scheme: likewise.
        data: likewise; not opened.
        output: likewise.
        samples: likewise.
        length: likewise.
        nodes: of a cluster that need not run; this machine where nothing is said of nodes.
        npus_per_node: Ascend cards of each.
        cpus_per_node: cores of each.
        memory_per_node: bytes of each, as Ray counts them.

    Raises:
        PlanError: the job cannot fit; the message names the setting to change.
        UserError: something in recipe or checkpoint must be changed first.
    """
    place = None if output is None else Path(output)
    if place is None and not isinstance(source, CalibrationConfig) and Path(source).is_dir():
        place = Path("runs") / Path(source).resolve().name  # a plan writes nothing
    config = _config(source, overrides, scheme=scheme, data=data, output=place, samples=samples, length=length)
    described = ClusterFacts.described(
        num_nodes=nodes,
        npus=npus_per_node,
        cpus=cpus_per_node,
        memory=memory_per_node,
        device=config.parallel.device,
    )
    from gs_dist.runtime.planned import plan_job

    reader = CheckpointReader(Path(config.model), serving_dtype=config.serving_dtype)
    return plan_job(config, reader, described or ClusterFacts.of_this_machine()).plan


def evaluate(
    directory: str | os.PathLike[str],
    data: Sequence[str],
    *,
    model: str | os.PathLike[str] | None = None,
    format: Sequence[str] = (),
    num_samples: int = 64,
    sequence_length: int = 512,
    address: str | None = None,
) -> tuple[PerplexitySummary, ...]:
    """Perplexity of a published model and its distance from the float one, as `gs-dist evaluate` measures them.

    Args:
        directory: output of a finished job, or its model directory.
        data: files, directories, patterns or URIs.
        model: directory of the float model; without it, only perplexity is measured.
        format: those to evaluate; all of the job's where none is named.
        num_samples: at most.
        sequence_length: tokens of a sample.
        address: of a Ray cluster to join; None starts one here.

    Returns:
        One a format. Summary and model cards are left as they are.

    Raises:
        UserError: something in model, data or cluster must be changed first.
    """
    samples = CalibrationData(data=tuple(data), num_samples=num_samples, sequence_length=sequence_length)
    from gs_dist.runtime import evaluate as runtime  # imports Ray

    found = runtime.evaluate(
        os.fspath(directory),
        samples,
        dialects=tuple(format),
        model=None if model is None else os.fspath(model),
        address=address,
        progress=SilentProgress(),
    )
    return tuple(found)


def load_summary(directory: str | os.PathLike[str]) -> CalibrationSummary:
    """The summary of a job's output; its `to_arrow()` is a table of all linears.

    Raises:
        OutputError: there is none, or it is damaged.
    """
    return read_summary(Path(directory))


@dataclass(frozen=True)
class Report:
    """A job's report, which a notebook shows inline.

    Attributes:
        page: one HTML file, without scripts and network.
    """

    page: str

    def _repr_html_(self) -> str:
        """What a notebook shows: a frame, so that the page's styles stay its own."""
        return f'<iframe srcdoc="{html.escape(self.page)}" style="width: 100%; height: 80vh; border: 0"></iframe>'


def show_report(directory: str | os.PathLike[str]) -> Report:
    """The report of a finished job, to be the last line of a notebook's cell.

    Raises:
        OutputError: there is no summary to draw it from, or it is damaged.
    """
    from gs_dist.report.page import render_report

    recipe = Path(directory) / PUBLISHED_RECIPE
    read = recipe.is_file() and not asks_for_conversion(recipe, ())
    return Report(render_report(load_summary(directory), read_published_recipe(recipe) if read else None))


def _config(
    source: Source,
    overrides: Sequence[str],
    *,
    scheme: str | None = None,
    data: Sequence[str] | None = None,
    output: Path | None = None,
    format: Sequence[str] | None = None,
    samples: int | None = None,
    length: int | None = None,
) -> CalibrationConfig:
    if not isinstance(source, CalibrationConfig):
        return Request(
            source=Path(source),
            overrides=overrides,
            scheme=scheme,
            data=data,
            output=output,
            format=format,
            samples=samples,
            length=length,
        ).config()
    if overrides or not all(option is None for option in (scheme, data, output, format, samples, length)):
        raise TypeError("a recipe that is read already takes no options: use its model_copy(update=...)")
    return source


def _told(progress: Watcher | None) -> Progress:
    return SilentProgress() if progress is None else _Watched(progress)
