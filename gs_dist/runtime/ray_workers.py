"""The workers of a job and of an evaluation, on Ray."""

from __future__ import annotations

from functools import partial

from gs_dist.runtime.evaluation_worker import Evaluation, EvaluationWorker
from gs_dist.runtime.job import Job
from gs_dist.runtime.stage_worker import StageWorker
from gs_dist.runtime.worker_group import RayWorkerGroup
from gs_dist.runtime.workers import WorkerGroup

__all__ = ["evaluation_workers", "stage_workers"]


def stage_workers(job: Job, min_replicas: int) -> WorkerGroup[StageWorker]:
    """Those of a job's plan.

    Raises:
        ClusterError: there is no room for `min_replicas` replicas.
        NodesChanged: there was none, and the cluster holds other nodes by now.
    """
    return RayWorkerGroup(
        partial(StageWorker, job),
        num_stages=job.plan.pipeline_parallel_size,
        num_replicas=job.plan.data_parallel_size,
        min_replicas=min_replicas,
        num_threads=job.plan.threads_per_worker,
        npus=job.plan.device.npus,
        timeout=job.config.parallel.timeout,
        waits_for_these_nodes=True,
    )


def evaluation_workers(evaluation: Evaluation, timeout: float) -> WorkerGroup[EvaluationWorker]:
    """One replica of an evaluation's stages.

    Raises:
        ClusterError: there is no room for it.
    """
    return RayWorkerGroup(
        partial(EvaluationWorker, evaluation),
        num_stages=len(evaluation.stages),
        num_replicas=1,
        min_replicas=1,
        num_threads=evaluation.threads_per_worker,
        npus=evaluation.device.npus,
        timeout=timeout,
    )
