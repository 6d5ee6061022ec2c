"""The plan of a job, made once for all who ask: the command line, what refuses early, and the job itself."""

from __future__ import annotations

from typing import NamedTuple

from gs_dist.checkpoint.dialects import check_policies
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import ClusterError, RecipeError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import CalibrationPlan, make_plan
from gs_dist.planning.workload import runs_model
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.dialects import DIALECTS

__all__ = ["PlannedJob", "plan_here", "plan_job"]


class PlannedJob(NamedTuple):
    """A plan, and what model and dialects have to say about it."""

    plan: CalibrationPlan
    notes: tuple[str, ...]


def plan_here(config: CalibrationConfig, reader: CheckpointReader, *, statistics_at_hand: bool = False) -> PlannedJob:
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
