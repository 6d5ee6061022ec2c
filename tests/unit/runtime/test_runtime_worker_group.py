"""What an error of Ray's means to a job: the method's own fault, or a loss that new workers mend."""

from __future__ import annotations

import pytest
import ray.exceptions as rx

from gs_dist.errors import ClusterError, JobFailure, LayerError, WorkerLostError
from gs_dist.runtime.worker_group import _reason_of

LOSSES = [
    rx.ActorDiedError(),
    rx.ActorUnavailableError("gone for a moment", None),
    rx.WorkerCrashedError(),
    rx.NodeDiedError("node 7 died"),
    rx.ObjectLostError("00" * 28, "address", ""),
    rx.OwnerDiedError("00" * 28, "address", ""),
    rx.OutOfMemoryError("killed by the memory monitor"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_death_upstream_is_a_lost_worker_however_many_calls_it_came_through(loss: Exception, calls: int) -> None:
    """A call that lacks an argument because its worker died is no fault of the method that was called."""
    error = loss
    for _ in range(calls):
        error = rx.RayTaskError("call", "traceback", error).as_instanceof_cause()
    reason = _reason_of(error)
    assert isinstance(reason, WorkerLostError)
    assert "\n" not in str(reason)


NODE_DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: _Worker
\tactor_id: 07
\tpid: 110
\tip: 10.0.0.2
The actor died because its node has died. Node Id: 56a5
\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"""
WORKER_DIED = """The actor died unexpectedly before finishing this task.
\tactor_id: 07
\tip: 10.0.0.1
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the OOM killer"""


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (
            NODE_DIED,
            "stage 1 of replica 0 died on node 10.0.0.2: its node has died (terminated unexpectedly: health check",
        ),
        (
            WORKER_DIED,
            "stage 1 of replica 0 died on node 10.0.0.1: its worker process has died (Worker unexpectedly exits",
        ),
        ("The actor died unexpectedly before finishing this task.", "stage 1 of replica 0 died"),
    ],
    ids=["node", "worker", "nothing known"],
)
def test_a_death_is_told_with_worker_node_and_reason(told: str, says: str) -> None:
    """In one line, and as much of it as Ray knows."""
    error = rx.ActorDiedError()
    error.actor_id, error.error_msg = "07", told
    reason = _reason_of(error, {"07": "stage 1 of replica 0"}.__getitem__)
    assert isinstance(reason, WorkerLostError)
    assert str(reason).startswith(says)
    assert "\n" not in str(reason)


def test_a_worker_that_cannot_be_imported_is_no_loss_that_starting_again_would_mend() -> None:
    """Worker, node and what is missing there are named, with what to do."""
    error = rx.ActorDiedError()
    error._actor_init_failed = True
    error.error_msg = (
        "The actor died because of an error raised in its creation task, ray::_Worker.__init__() (pid=7, ip=10.0.0.2, "
        "actor_id=07)\nRuntimeError: failed to import:\n\nModuleNotFoundError: No module named 'gs_dist'\n"
    )
    reason = _reason_of(error, lambda actor_id: "stage 1 of replica 0")
    assert type(reason) is ClusterError
    assert str(reason).startswith(
        "stage 1 of replica 0 cannot be started on node 10.0.0.2 (ModuleNotFoundError: No module named 'gs_dist'): inst"
    )


def test_what_a_method_raised_is_raised() -> None:
    """A layer that cannot be solved is told as that, not as a death of its worker."""
    error = rx.RayTaskError("call", "traceback", LayerError("model.layers.3: no")).as_instanceof_cause()
    reason = _reason_of(error)
    assert type(reason) is LayerError
    assert str(reason) == "model.layers.3: no"


def test_what_is_left_of_rays_errors_is_a_failure_with_its_name() -> None:
    """An error of Ray's that starting again would not mend ends the job, in one line."""
    reason = _reason_of(rx.RuntimeEnvSetupError("no such environment\nand more"))
    assert type(reason) is JobFailure
    assert "RuntimeEnvSetupError" in str(reason)
    assert "\n" not in str(reason)
