"""A small real job: a tiny checkpoint, Arrow samples, and what its published files hash to."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from checkpoints import tiny_checkpoint
from workers import InlineWorkerGroup

from gs_dist.checkpoint.manifest import Fingerprints
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.dataset import open_dataset, samples_fingerprint
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import CalibrationPlan, make_plan
from gs_dist.progress import Progress, SilentProgress
from gs_dist.recipe.config import CalibrationConfig, recipe_fingerprint
from gs_dist.results.summary import CalibrationSummary
from gs_dist.runtime.attempt import MakeGroup
from gs_dist.runtime.evaluation_worker import Evaluation, EvaluationWorker
from gs_dist.runtime.job import Job
from gs_dist.runtime.job_run import run_job
from gs_dist.runtime.probe import MakeEvaluationGroup
from gs_dist.runtime.stage_worker import StageWorker

SEQUENCE_LENGTH = 32
W8A8 = {"weight_quant_dtype": "int8", "act_quant_dtype": "int8", "outliers_suppression": "smooth"}


def save_samples(path: Path, vocab_size: int, num_samples: int = 20, seed: int = 0) -> Path:
    ids = np.random.default_rng(seed).integers(0, vocab_size, (num_samples, SEQUENCE_LENGTH)).astype(np.int32)
    pq.write_table(pa.table({"input_ids": list(ids)}), path)
    return path


def small_recipe(directory: Path, output: str = "out", *, num_layers: int = 6, **changes: Any) -> CalibrationConfig:
    """A recipe over a tiny Llama in `directory`; keywords replace or extend sections of the recipe."""
    model = directory / "model"
    if not model.is_dir():
        tiny_checkpoint(model, num_layers=num_layers)
        save_samples(directory / "samples.parquet", CheckpointReader(model).architecture.vocab_size)
    sections: dict[str, Any] = {
        "model": str(model),
        "output": str(directory / output),
        "calibration": {
            "data": str(directory / "samples.parquet"),
            "num_samples": 20,
            "sequence_length": SEQUENCE_LENGTH,
            "micro_batch_size": 2,
        },
        "ptq": W8A8,
        "parallel": {"threads_per_worker": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
    }
    for key, value in changes.items():
        sections[key] = {**sections[key], **value} if key in ("calibration", "parallel") else value
    return CalibrationConfig.model_validate(sections)


def reader_of(config: CalibrationConfig) -> CheckpointReader:
    """The recipe's model as its job opens it."""
    return CheckpointReader(Path(config.model), serving_dtype=config.serving_dtype)


def plan_of(config: CalibrationConfig) -> CalibrationPlan:
    reader = reader_of(config)
    facts = ClusterFacts(num_cpus=16, num_npus=0, memory_bytes=64 << 30)
    return make_plan(config, reader.architecture, reader.tensors, facts)


def inline_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
    return InlineWorkerGroup(
        partial(StageWorker, job),
        num_stages=job.plan.pipeline_parallel_size,
        num_replicas=job.plan.data_parallel_size,
    )


def inline_evaluation_group(evaluation: Evaluation, timeout: float) -> InlineWorkerGroup:
    return InlineWorkerGroup(partial(EvaluationWorker, evaluation), num_stages=len(evaluation.stages), num_replicas=1)


def digests_of(config: CalibrationConfig) -> tuple[bytes, ...]:
    """Of the recipe's samples."""
    reader = CheckpointReader(Path(config.model))
    dataset = open_dataset(config.calibration, reader.architecture.vocab_size, reader.tokenizer_file)
    return dataset.digests()


def fingerprints_of(config: CalibrationConfig) -> Fingerprints:
    """Of a recipe, its model and its samples."""
    source = CheckpointReader(Path(config.model)).fingerprint()
    data = samples_fingerprint(config.calibration.sequence_length, digests_of(config))
    return Fingerprints(recipe=recipe_fingerprint(config), source=source, data=data)


def run_inline(
    config: CalibrationConfig,
    make_group: MakeGroup = inline_group,
    statistics_from: str | None = None,
    make_evaluation_group: MakeEvaluationGroup = inline_evaluation_group,
    *,
    with_samples: bool = False,
    progress: Progress | None = None,
) -> CalibrationSummary:
    """The whole job with workers in this process; `with_samples` tells them the digest of each sample."""
    job = Job(
        config=config,
        plan=plan_of(config),
        fingerprints=fingerprints_of(config),
        samples=digests_of(config) if with_samples else (),
        statistics_from=statistics_from,
    )
    return run_job(
        job,
        reader_of(config),
        make_group=make_group,
        make_evaluation_group=make_evaluation_group,
        progress=progress or SilentProgress(),
    )


def published_hashes(config: CalibrationConfig) -> dict[str, str]:
    """Relative name to sha256 of every published weight file."""
    output = Path(config.output)
    files = sorted(path for name in config.dialects for path in (output / name).glob("*.safetensors"))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
