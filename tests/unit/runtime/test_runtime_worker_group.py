"""What an error of Ray's means to a job: the method's own fault, or a loss that new workers mend."""

from __future__ import annotations

import pytest
import ray.exceptions as rx

from gs_dist.errors import JobFailure, LayerError, WorkerLostError
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
