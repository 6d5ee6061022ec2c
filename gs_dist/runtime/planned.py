"""The plan of a job, made once for all who ask: the command line, what refuses early, and the job itself."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from gs_dist.checkpoint.dialects import check_policies
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import ClusterError, RecipeError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.memory import MemoryPlan, layer_set_bytes
from gs_dist.planning.plan import CalibrationPlan, StagePlan, make_plan
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["PlannedJob", "plan_here", "plan_job"]


class PlannedJob(NamedTuple):
    """A plan, and what model and dialects have to say about it."""

    plan: CalibrationPlan
    notes: tuple[str, ...]


def plan_here(config: CalibrationConfig, reader: CheckpointReader, *, solves_only: bool = False) -> PlannedJob:
    """The plan of a job on this machine.

    Raises:
        ClusterError: the recipe asks for a card, and there is none.
        UserError: as of `plan_job`.
    """
    facts = ClusterFacts.of_this_machine()
    runs_model = not solves_only or config.max_perplexity_increase is not None
    if config.parallel.device == DeviceKind.ASCEND.value and not facts.num_npus and runs_model:
        raise ClusterError(
            "parallel.device is ascend, and this machine has no Ascend card: set it to cpu or auto, or join a "
            "cluster that has some with --address"
        )
    return plan_job(config, reader, facts, solves_only=solves_only)


def plan_job(
    config: CalibrationConfig, reader: CheckpointReader, facts: ClusterFacts, *, solves_only: bool = False
) -> PlannedJob:
    """The plan of a job; with `solves_only`, of one whose statistics are at hand and that probes nothing.

    Raises:
        UserError: as of `make_plan`, or policies that a dialect cannot hold.
    """
    _refuse_other_dtype(config, reader)
    # A probe runs the model after all.
    of = _plan_of_solves if solves_only and config.max_perplexity_increase is None else _plan_of_passes
    plan = of(config, reader, facts)
    notes = [*reader.notes, *reader.companions().notes]
    notes += [
        note
        for name in config.dialects
        for policies in plan.policy_sets
        for note in check_policies(name, policies, reader.architecture)
    ]
    return PlannedJob(plan, tuple(dict.fromkeys(notes)))


def _refuse_other_dtype(config: CalibrationConfig, reader: CheckpointReader) -> None:
    """A dialect whose readers take floats as they are is of the checkpoint's own dtype."""
    kept = [name for name in config.dialects if not DIALECTS[name].casts]
    stored = {info.dtype for info in reader.tensors.values()}
    if kept and config.serving_dtype is not None and stored != {config.serving_dtype}:
        raise RecipeError(
            f"serving_dtype is {config.serving_dtype} and the checkpoint is {' and '.join(sorted(stored))}, which "
            f"readers of {kept[0]} take as they are: leave serving_dtype out, or {kept[0]} out of format"
        )


def _plan_of_passes(config: CalibrationConfig, reader: CheckpointReader, facts: ClusterFacts) -> CalibrationPlan:
    return make_plan(config, reader.architecture, reader.tensors, facts)


def _plan_of_solves(config: CalibrationConfig, reader: CheckpointReader, facts: ClusterFacts) -> CalibrationPlan:
    """Layers are solved one after another on the host's CPUs; hidden states, which take memory, do not exist."""
    parallel = config.parallel.model_copy(update={"device": "cpu", "layers_per_wave": 1})
    data = config.calibration.model_copy(update={"sequence_length": 1, "micro_batch_size": 1})
    smaller = config.model_copy(update={"parallel": parallel, "calibration": data})
    plan = make_plan(smaller, reader.architecture, reader.tensors, facts)
    stages = tuple(dataclasses.replace(stage, memory=_memory(plan, stage, reader)) for stage in plan.stages)
    return dataclasses.replace(plan, config=config, stages=stages)


def _memory(plan: CalibrationPlan, stage: StagePlan, reader: CheckpointReader) -> MemoryPlan:
    """One layer's tensors and one set of its statistics, where a calibration holds a stage's and partial sums."""
    prefixes = [reader.architecture.layer_prefix(layer) for layer in stage.layers]
    tensors = [sum(t.nbytes for name, t in reader.tensors.items() if name.startswith(prefix)) for prefix in prefixes]
    sets = [layer_set_bytes(reader.architecture.layers[layer], plan.layer_settings(layer)) for layer in stage.layers]
    held = {"weights": max(tensors), "activations": 0, "statistics": max(sets)}
    return MemoryPlan(items={**stage.memory.items, **held})
