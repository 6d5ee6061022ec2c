"""The plan of a job, made once for all who ask: the command line, what refuses early, and the job itself."""

from __future__ import annotations

import os
from typing import NamedTuple

from gs_dist.checkpoint.dialects import check_policies
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import ClusterError, OutputError, RecipeError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import CalibrationPlan, make_plan
from gs_dist.planning.workload import make_workload, runs_model
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["PlannedJob", "plan_early", "plan_job"]


class PlannedJob(NamedTuple):
    """A plan, and what model and dialects have to say about it."""

    plan: CalibrationPlan
    notes: tuple[str, ...]


def plan_early(
    config: CalibrationConfig, reader: CheckpointReader, address: str | None, *, statistics_at_hand: bool = False
) -> PlannedJob | None:
    """The plan on this machine, before a sample is read; None where a cluster is to be joined and asked first.

    Raises:
        UserError: something in recipe, checkpoint, output or machine that no cluster could mend.
    """
    _refuse_working_directory(config.output)
    reader.companions()  # refuses what could not be carried over in the end
    if address is None:
        return _plan_here(config, reader, statistics_at_hand=statistics_at_hand)
    make_workload(config, reader.architecture, reader.tensors)  # refuses what no cluster could mend
    return None


def _refuse_working_directory(output: str) -> None:
    """`ray job submit --working-dir` runs in a copy that Ray deletes; a relative output would lie in it.

    Raises:
        OutputError: it would.
    """
    path = os.path.realpath(output)
    if "/runtime_resources/working_dir_files/" in f"{path}/":
        raise OutputError(
            f"output {output!r} leads to {path}, into the copy of the working directory that Ray makes for a job and "
            "deletes behind it: set output to an absolute path on storage that stays"
        )


def _plan_here(config: CalibrationConfig, reader: CheckpointReader, *, statistics_at_hand: bool = False) -> PlannedJob:
    """The plan of a job on this machine.

    Raises:
        ClusterError: the recipe asks for a card, and there is none.
        UserError: as of `plan_job`.
    """
    facts = ClusterFacts.of_this_machine()
    needs_card = config.parallel.device == DeviceKind.ASCEND.value and not facts.num_npus
    if needs_card and runs_model(config, statistics_at_hand=statistics_at_hand):
        raise ClusterError(
            "parallel.device is ascend, and this machine has no Ascend card: set it to cpu or auto, or join a "
            "cluster that has some with --address"
        )
    return plan_job(config, reader, facts, statistics_at_hand=statistics_at_hand)


def plan_job(
    config: CalibrationConfig, reader: CheckpointReader, facts: ClusterFacts, *, statistics_at_hand: bool = False
) -> PlannedJob:
    """The plan of a job; with `statistics_at_hand`, of one that solves what an earlier job observed.

    Raises:
        UserError: as of `make_plan`, or policies that a dialect cannot hold.
    """
    _refuse_other_dtype(config, reader)
    plan = make_plan(config, reader.architecture, reader.tensors, facts, statistics_at_hand=statistics_at_hand)
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
