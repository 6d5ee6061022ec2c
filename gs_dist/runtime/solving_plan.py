"""A job that solves from kept statistics: what they are of, and its plan without a model that runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gs_dist.checkpoint.manifest import MadeWith
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import StatisticsOrigin, read_origin
from gs_dist.checkpoint.run_record import version_differences
from gs_dist.errors import OutputError
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.memory import MemoryPlan, layer_set_bytes
from gs_dist.planning.plan import CalibrationPlan, StagePlan, make_plan
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.runtime.software import Software

__all__ = ["origin_of", "plan_job", "software_note"]


def origin_of(run: str, config: CalibrationConfig, source: str) -> StatisticsOrigin:
    """What the statistics kept in an output are of.

    Args:
        run: the output.
        config: the recipe that is to be solved from them.
        source: fingerprint of its model.

    Raises:
        OutputError: there are none, or they are of another model or calibration.
    """
    origin = read_origin(Path(run))
    calibration = config.fingerprint_fields()["calibration"]
    differing = [
        what
        for what, same in (
            ("model", origin.source == source),
            ("calibration", origin.calibration == calibration),
            ("propagation (it must be original)", config.propagation == "original"),
        )
        if not same
    ]
    if differing:
        raise OutputError(
            f"the statistics kept in {run!r} are of another {' and another '.join(differing)}: give the recipe the "
            "settings of that job, or run `gs-dist quantize` on it"
        )
    return origin


def software_note(run: str, origin: StatisticsOrigin) -> str | None:
    """What to tell where other versions took the statistics than are to solve from them."""
    if not origin.versions:
        return None
    different = version_differences(MadeWith(versions=origin.versions), Software.here().made_with)
    if not different:
        return None
    return (
        f"the statistics kept in {run!r} are of other software ({'; '.join(different)}): what is published may differ "
        "from what either version would make of the samples"
    )


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
    sets = [layer_set_bytes(reader.architecture.layers[layer], plan.layer_settings(layer)) for layer in stage.layers]
    held = {"weights": max(tensors), "activations": 0, "statistics": max(sets)}
    return MemoryPlan(items={**stage.memory.items, **held})
