"""Workers as Ray actors, behind the protocol that the coordinator knows."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import ray
import ray.exceptions
import ray.util.client
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gs_dist import __version__
from gs_dist.errors import ClusterError, JobFailure, WorkerLostError
from gs_dist.runtime.cards import CardsSeen, check_cards, see_only
from gs_dist.runtime.workers import NodesChanged, Reference, WorkerKey, as_they_come

__all__ = ["RayWorkerGroup"]

W = TypeVar("W")
P = ParamSpec("P")
T = TypeVar("T")

_TRIAL_PATIENCE = 2.0  # seconds for places that are free to be reserved; it takes a tenth of one
_HEAD_PATIENCE = 10.0  # seconds for the cluster's head to take a connection
_MORE_REPLICAS_PATIENCE = 5.0  # seconds for a replica that the job can do without

_LOOK_INTERVAL = 2.0  # seconds between two looks at the nodes, while there is no room on them

_NO_HEAD = (
    "the head of the Ray cluster at {} does not answer any more: check that it runs and that this machine reaches it, "
    "then submit the same recipe again to go on from the layers that are published"
)


class RayWorkerGroup(Generic[W]):
    """Workers as Ray actors, a placement group a replica: its stages near each other, replicas apart.

    Args:
        make: builds the worker in its process, called with stage and replica.
        num_stages, num_replicas: how many workers.
        min_replicas: how many replicas suffice where the cluster has no room for all.
        num_threads: CPUs, and threads of BLAS and MindSpore, of a worker.
        npus: Ascend cards of a worker, 0 on CPU.
        timeout: seconds to wait for the cluster to have room.
        waits_for_these_nodes: wait no longer once the cluster holds other nodes, for which there is another plan.

    Raises:
        NodesChanged: it does.
        ClusterError: there is no room for `min_replicas` replicas, the cluster's head does not answer, or two workers
            would run on one card.
        WorkerLostError: a worker on a card did not start.
    """

    def __init__(
        self,
        make: Callable[[int, int], W],
        *,
        num_stages: int,
        num_replicas: int,
        min_replicas: int,
        num_threads: int,
        npus: int,
        timeout: float,
        waits_for_these_nodes: bool = False,
    ) -> None:
        self._groups: list[PlacementGroup] = []
        self._actors: dict[WorkerKey, Any] = {}
        bundle = {"CPU": float(num_threads)} | ({"NPU": float(npus)} if npus else {})
        self._bundles = [bundle] * num_stages
        self._waits_for_these_nodes = waits_for_these_nodes
        try:
            with _head_asked():
                self._reserve(bundle, num_stages, num_replicas, min_replicas, timeout)
            environment = {"env_vars": _thread_environment(num_threads)}
            actor_class, group_id = ray.remote(_Worker), secrets.token_hex(3)
            for replica, group in enumerate(self._groups):
                for stage in range(num_stages):
                    self._actors[WorkerKey(stage, replica)] = actor_class.options(
                        name=f"stage {stage}, replica {replica} ({group_id})",  # for `ray list actors`
                        num_cpus=num_threads,
                        resources={"NPU": npus} if npus else None,
                        runtime_env=environment,
                        scheduling_strategy=PlacementGroupSchedulingStrategy(
                            placement_group=group, placement_group_bundle_index=stage
                        ),
                    ).remote(make, stage, replica)
            if npus:
                self._refuse_shared_cards(timeout)
        except BaseException:
            self.close()
            raise

    def _reserve(
        self, bundle: Mapping[str, float], num_stages: int, num_replicas: int, min_replicas: int, timeout: float
    ) -> None:
        groups = [placement_group([dict(bundle)] * num_stages, strategy="PACK") for _ in range(num_replicas)]
        pending = {group.ready(): group for group in groups}
        deadline, nodes = time.monotonic() + timeout, _alive_nodes()
        while pending:
            # Any of them will do: one may wait for a node that is silent and not yet given up by Ray. Replicas beyond
            # the necessary ones get a moment, not the whole wait.
            enough = len(self._groups) >= min_replicas
            patience = _MORE_REPLICAS_PATIENCE if enough else min(_LOOK_INTERVAL, deadline - time.monotonic())
            ready, _ = ray.wait(list(pending), timeout=max(0.0, patience))
            if not ready and (enough or time.monotonic() >= deadline):
                break
            if not ready:
                if self._waits_for_these_nodes and _alive_nodes() != nodes:
                    self._groups += pending.values()  # which `close` gives back
                    raise NodesChanged
                continue
            self._groups.append(pending.pop(ready[0]))
        for unplaced in pending.values():
            remove_placement_group(unplaced)
        if len(self._groups) < min_replicas:
            raise ClusterError(_no_room(bundle, num_stages, min_replicas, timeout))

    def _refuse_shared_cards(self, timeout: float) -> None:
        asked: dict[Reference[CardsSeen], WorkerKey] = {actor.cards.remote(): k for k, actor in self._actors.items()}
        check_cards(dict(as_they_come(self, asked, timeout, lambda keys: f"{keys[0]} did not start in {timeout:g} s")))

    @property
    def num_replicas(self) -> int:
        """Replicas that the cluster had room for."""
        return len(self._groups)

    def room_for(self, limit: int) -> int:
        """How many more replicas, `limit` at most, there would be room for now beside those held.

        Where the sum of what is free would do, places are reserved for a moment: only the scheduler knows whether
        it lies so on the nodes that a worker's share fits.
        """
        free = ray.available_resources()
        needed = {name: len(self._bundles) * count for name, count in self._bundles[0].items()}
        limit = min([limit, *(int(free.get(name, 0.0) / count) for name, count in needed.items())])
        trials = [placement_group([dict(bundle) for bundle in self._bundles], strategy="PACK") for _ in range(limit)]
        try:
            deadline = time.monotonic() + _TRIAL_PATIENCE
            return sum(trial.wait(max(0.1, deadline - time.monotonic())) for trial in trials)
        finally:
            for trial in trials:
                remove_placement_group(trial)

    def call(
        self, key: WorkerKey, method: Callable[Concatenate[W, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Reference[T]:
        """Starts a method on a worker, after everything called on it before; returns a reference."""
        return cast("Reference[T]", self._actors[key].call.remote(method.__name__, *args, **kwargs))

    def wait(self, references: Sequence[Reference[Any]], timeout: float) -> list[Reference[Any]]:
        """References that are ready, at least one unless `timeout` seconds pass first."""
        ready, _ = ray.wait(list(references), timeout=timeout, fetch_local=False)
        return list(ready)

    def get(self, reference: Reference[T]) -> T:
        """Value of a reference; raises what the method raised, or WorkerLostError."""
        try:
            return cast(T, ray.get(reference))
        except ray.exceptions.RayError as error:
            raise _reason_of(error, self._name_of) from None

    def _name_of(self, actor_id: str | None) -> str:
        # Which actor a handle is of is told by nothing public.
        names = {actor._actor_id.hex(): str(key) for key, actor in self._actors.items()}
        return names.get(actor_id or "", "a worker")

    def close(self) -> None:
        """Ends the workers at once; what they had not published is lost."""
        actors, groups = list(self._actors.values()), self._groups
        self._actors, self._groups = {}, []
        _, head_answers = _look_for_head()
        if not head_answers:
            return  # what is done is done all the same, and whoever needs the head next is told
        with suppress(ray.exceptions.GetTimeoutError):
            for actor in actors:
                ray.kill(actor)
            for group in groups:
                remove_placement_group(group)


def _alive_nodes() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


class _Worker:
    """A worker in its own process, built when it is first called: what its making raises is then told as a
    call's error, while an actor whose constructor raises only counts as dead.
    """

    def __init__(self, make: Callable[[int, int], Any], stage: int, replica: int) -> None:
        self._make = partial(make, stage, replica)
        self._name = f"stage {stage}, replica {replica}"
        self._worker: Any = None
        see_only(ray.get_runtime_context().get_accelerator_ids().get("NPU", []), os.environ)

    def __repr__(self) -> str:
        return self._name  # stands before each line that the process logs

    def cards(self) -> CardsSeen:
        return CardsSeen.here()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._worker is None:
            self._worker = self._make()
        return getattr(self._worker, method)(*args, **kwargs)


@contextmanager
def _head_asked() -> Iterator[None]:
    """Where the cluster's head, which the block asks for something, does not answer, one message says so."""
    address, answers = _look_for_head()
    if not answers:
        raise ClusterError(_NO_HEAD.format(address))
    try:
        yield
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterError(_NO_HEAD.format(address)) from error


def _look_for_head() -> tuple[str, bool]:
    """Address of the cluster's head, and whether it takes a connection.

    Ray itself would try for a minute, and then end this process.
    """
    if ray.util.client.ray.is_connected():
        return "", True  # it is reached through a server, which is asked in any case
    address = str(ray.get_runtime_context().gcs_address)
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_HEAD_PATIENCE).close()
    except OSError:
        return address, False
    return address, True


def _thread_environment(num_threads: int) -> dict[str, str]:
    # Read when the libraries are loaded, so they must stand in the environment of the process.
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return dict.fromkeys(names, str(num_threads)) | {"GLOG_v": "3"}


def _no_room(bundle: Mapping[str, float], num_stages: int, num_replicas: int, timeout: float) -> str:
    asked = ", ".join(f"{count:g} {name}" for name, count in bundle.items())
    held = ray.cluster_resources()
    has = ", ".join(f"{held.get(name, 0):g} {name}" for name in bundle)
    return (
        f"the cluster has no room for {num_stages} stages x {num_replicas} replicas of {asked} each: it holds {has} "
        f"in all, and none came free in {timeout:g} s. Add nodes, end other jobs, or lower "
        "parallel.pipeline_parallel_size, parallel.data_parallel_size or parallel.threads_per_worker"
    )


# What a worker's death, or that of its node, can look like from here; all of it is mended by new workers.
_LOSSES = (
    ray.exceptions.ActorPlacementGroupRemoved,
    ray.exceptions.ActorUnschedulableError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
)


def _reason_of(
    error: BaseException, name_of: Callable[[str | None], str] = lambda actor_id: "a worker"
) -> BaseException:
    """What to raise for an error of Ray's: the method's own error, or a loss of workers.

    A call whose argument was to come from a dead worker fails with the death wrapped, once for every call
    that it came through. `name_of` says which worker an actor is.
    """
    reason = error
    while isinstance(reason, ray.exceptions.RayTaskError) and isinstance(reason.cause, BaseException):
        reason = reason.cause
    if isinstance(reason, ray.exceptions.ActorDiedError) and reason.actor_init_failed:
        return ClusterError(_no_start(name_of(reason.actor_id), str(reason)))
    if isinstance(reason, ray.exceptions.ActorDiedError):
        return WorkerLostError(f"{name_of(reason.actor_id)} died{_circumstances(str(reason))}")
    if isinstance(reason, ray.exceptions.ObjectLostError):
        return WorkerLostError(
            f"what a worker had computed is lost, most likely with its node: {type(reason).__name__}"
        )
    if isinstance(reason, _LOSSES):
        return WorkerLostError(f"a worker died: {_first_line(reason)}")
    if isinstance(reason, ray.exceptions.RayError):
        return JobFailure(f"Ray failed: {type(reason).__name__}: {_first_line(reason)}")
    return reason


def _no_start(worker: str, told: str) -> str:
    """Of a worker that could not be made: as its making is put off, what it is made of could not be imported."""
    address = re.search(r"\bip=([^\s,)]+)", told)
    where = f" on node {address[1]}" if address else ""
    error = told.strip().splitlines()[-1].strip()
    return (
        f"{worker} cannot be started{where} ({error}): install gs-dist {__version__} and what it needs there, or have "
        "Ray do so with a runtime_env or one image for all nodes"
    )


def _circumstances(told: str) -> str:
    """Of Ray's many lines on a death: the node's address and the reason, as far as they are there."""
    address = re.search(r"^\s*ip: (\S+)", told, re.MULTILINE)
    reason = re.search(r"\bbecause (its (?:node|worker process) has died)", told)
    detail = re.search(r"^\s*the actor's node was (.+)$|Worker exit detail: ([^.]+)", told, re.MULTILINE)
    where = f" on node {address[1]}" if address else ""
    why = f": {reason[1]}" if reason else ""
    return where + why + (f" ({detail[1] or detail[2]})" if reason and detail else "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
