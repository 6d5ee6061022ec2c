"""Plans a job for the nodes that a cluster holds now, and again as these come and go.

Pods start one after another, and a job is often submitted before the last of them is there. What is published does not
depend on the plan, so that a better one may be taken whenever workers start anyway.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

from gs_dist.errors import PlanError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.runtime.job import Job
from gs_dist.runtime.planned import PlannedJob
from gs_dist.wording import counted

__all__ = ["FixedPlan", "NodesNow", "PlanOfNodes", "Replanning"]

NodesNow = Callable[[DeviceKind | None], ClusterFacts | None]
"""What a cluster holds now for workers on a device, None where it holds no node for them."""

_LOOK_INTERVAL = 1.0  # seconds between two looks for nodes that a job waits for
_MOST_NODES = 64  # that are tried for whether a job would fit on more of them


class Replanning(Protocol):
    """Keeps a job's plan up with the nodes."""

    def renewed(self, job: Job, *, begun: bool) -> Job:
        """The job as its workers are to be started now; `begun` where layers of it are finished."""

    def outgrown(self, job: Job, *, begun: bool) -> bool:
        """Whether there are nodes by now on which the job would have more workers, or more threads for them."""


class FixedPlan:
    """Of a cluster that stays as it is, such as the one that a job starts for itself."""

    def renewed(self, job: Job, *, begun: bool) -> Job:
        """The same."""
        return job

    def outgrown(self, job: Job, *, begun: bool) -> bool:
        """Never."""
        return False


class PlanOfNodes:
    """Of a cluster whose nodes come and go.

    Args:
        make: plans the job for nodes; raises PlanError where it does not fit on them.
        now: looks at the nodes.
        facts: what they were at first.
        asked: the device that the recipe asks for; None where it leaves that open.
        tell: told of every other plan.
    """

    def __init__(
        self,
        make: Callable[[ClusterFacts], PlannedJob],
        now: NodesNow,
        facts: ClusterFacts,
        *,
        asked: DeviceKind | None,
        tell: Callable[[str], None],
    ) -> None:
        self._make = make
        self._now = now
        self._asked = asked
        self._tell = tell
        self._planned_for = facts
        self._plan: CalibrationPlan | None = None
        self._seen: ClusterFacts | None = None
        self._seen_plan: CalibrationPlan | None = None
        self._largest = 0

    def first(self, patience: float) -> PlannedJob:
        """The plan for the nodes that are there; waits for more where the job fits only on more of them.

        Args:
            patience: seconds to wait at most.

        Raises:
            PlanError: it does not fit on the nodes that came.
        """
        deadline, told = time.monotonic() + patience, False
        while True:
            try:
                planned = self._make(self._planned_for)
            except PlanError:
                enough = None if told else self._nodes_to_fit(self._planned_for)
                if time.monotonic() >= deadline or not (told or enough):
                    raise
                if not told:
                    self._tell(
                        f"the job does not fit on the {counted(self._planned_for.num_nodes, 'node')} that the cluster "
                        f"holds, and would on {enough} like them: waiting up to {patience:g} s for more"
                    )
                told = True
            else:
                self._plan, self._largest = planned.plan, _size(planned.plan)
                return planned
            self._await_change(deadline)

    def renewed(self, job: Job, *, begun: bool) -> Job:
        """The job planned for the nodes that are there; as it was planned before if it does not fit on them."""
        facts = self._now(self._device(job, begun))
        if facts is not None and facts != self._planned_for:
            self._plan_again(facts)
        assert self._plan is not None, "`first` comes first"
        # What bits were chosen, and whether they still are to be, is the job's and not the nodes'.
        plan = dataclasses.replace(self._plan, policies=job.plan.policies, size_budget=job.plan.size_budget)
        return dataclasses.replace(job, plan=plan)

    def _plan_again(self, facts: ClusterFacts) -> None:
        plan = self._plan_for(facts)
        if plan is None:
            return
        if self._plan is None or _layout(plan) != _layout(self._plan):
            self._tell(
                f"the cluster holds {counted(facts.num_nodes, 'node')} now: planned again, "
                f"{counted(plan.pipeline_parallel_size, 'stage')} x {counted(plan.data_parallel_size, 'replica')}, "
                f"{counted(plan.threads_per_worker, 'thread')} a worker"
            )
        self._planned_for, self._plan = facts, plan
        self._largest = max(self._largest, _size(plan))

    def outgrown(self, job: Job, *, begun: bool) -> bool:
        """True once for each larger plan: nodes that come and go cannot keep a job from its work."""
        facts = self._now(self._device(job, begun))
        if facts is None or facts == self._planned_for:
            return False
        plan = self._plan_for(facts)
        if plan is None or _size(plan) <= self._largest:
            return False
        self._largest = _size(plan)
        return True

    def _device(self, job: Job, begun: bool) -> DeviceKind | None:
        """Layers that are finished bind the others: a card's bits are not a processor's."""
        return job.plan.device if begun else self._asked

    def _plan_for(self, facts: ClusterFacts) -> CalibrationPlan | None:
        """None where the job does not fit; made once for each change of the nodes."""
        if facts != self._seen:
            self._seen = facts
            try:
                self._seen_plan = self._make(facts).plan
            except PlanError:
                self._seen_plan = None
        return self._seen_plan

    def _nodes_to_fit(self, facts: ClusterFacts) -> int | None:
        """How many nodes like these would do, roughly; None where no number does."""
        count = 2 * facts.num_nodes
        while count <= _MOST_NODES:
            try:
                self._make(facts.of_nodes(count))
            except PlanError:
                count *= 2
            else:
                return count
        return None

    def _await_change(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            facts = self._now(self._asked)
            if facts is not None and facts != self._planned_for:
                self._planned_for = facts
                return
            time.sleep(_LOOK_INTERVAL)


def _size(plan: CalibrationPlan) -> int:
    """Threads of all workers: it grows with their number and with each one's share."""
    return plan.num_workers * plan.threads_per_worker


def _layout(plan: CalibrationPlan) -> tuple[int, int, int, DeviceKind]:
    return plan.pipeline_parallel_size, plan.data_parallel_size, plan.threads_per_worker, plan.device
