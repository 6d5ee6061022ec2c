"""Before anything runs: whether every worker sees the output and the samples that the coordinator sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gs_dist.errors import DatasetError, OutputError
from gs_dist.recipe.config import base_name
from gs_dist.runtime.job import Job
from gs_dist.runtime.stage_worker import Sight

__all__ = ["check_sights"]


def check_sights(job: Job, token: str, workers: Mapping[Any, Sight]) -> None:
    """Compares what workers see with what the coordinator does.

    Args:
        job: recipe, and the digests of its samples, if they are known.
        token: what the coordinator wrote into the output.
        workers: what each of them found.

    Raises:
        OutputError: a worker has another directory under the output's path.
        DatasetError: a worker has other samples.
    """
    for worker, seen in workers.items():
        if seen.token != token:
            raise OutputError(
                f"{worker} (node {seen.node}) does not see what the coordinator writes to output "
                f"{job.config.output!r}: that path leads to a disk of its own there. Set output to a directory on "
                "storage that all nodes share"
            )
        if seen.sample is not None and job.samples and seen.sample != job.samples[0]:
            files = ", ".join(map(base_name, job.config.calibration.data))
            raise DatasetError(
                f"{worker} (node {seen.node}) has other samples than the coordinator under the paths of {files}: give "
                "every node the same files, on storage that all share"
            )
