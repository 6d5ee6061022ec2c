"""The plan of a job that solves from kept statistics: no model runs, so that it needs no card and little memory."""

from __future__ import annotations

import dataclasses

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.config import CalibrationConfig
from gs_dist.memory import MemoryPlan, layer_set_bytes
from gs_dist.plan import CalibrationPlan, ClusterFacts, StagePlan, make_plan

__all__ = ["plan_job"]


def plan_job(
    config: CalibrationConfig, reader: CheckpointReader, facts: ClusterFacts, *, solves_only: bool
) -> CalibrationPlan:
    """The plan of a job; with `solves_only`, of one whose statistics are at hand and that probes nothing.

    Raises:
        UserError: as of `make_plan`.
    """
    if not solves_only or config.max_perplexity_increase is not None:  # a probe runs the model after all
        return make_plan(config, reader.architecture, reader.tensors, facts)
    # Layers are solved one after another on the host's CPUs; hidden states, which take a share of memory, do not exist.
    parallel = config.parallel.model_copy(update={"device": "cpu", "layers_per_wave": 1})
    data = config.calibration.model_copy(update={"sequence_length": 1, "micro_batch_size": 1})
    smaller = config.model_copy(update={"parallel": parallel, "calibration": data})
    plan = make_plan(smaller, reader.architecture, reader.tensors, facts)
    stages = tuple(dataclasses.replace(stage, memory=_memory(plan, stage, reader)) for stage in plan.stages)
    return dataclasses.replace(plan, stages=stages)


def _memory(plan: CalibrationPlan, stage: StagePlan, reader: CheckpointReader) -> MemoryPlan:
    """One layer's tensors and one set of its statistics, where a calibration holds a stage's and partial sums."""
    prefixes = [reader.architecture.layer_prefix(layer) for layer in stage.layers]
    tensors = [sum(t.nbytes for name, t in reader.tensors.items() if name.startswith(prefix)) for prefix in prefixes]
    sets = [layer_set_bytes(reader.architecture, plan.layer_settings(layer)) for layer in stage.layers]
    held = {"weights": max(tensors), "activations": 0, "statistics": max(sets)}
    return MemoryPlan(items={**stage.memory.items, **held})
