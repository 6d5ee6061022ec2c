"""From a recipe, a checkpoint's headers and a cluster's size to everything that is decided before work starts.

Pure: nothing is read but the arguments. A job that cannot fit is refused here, with the setting to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gs_dist.errors import PlanError
from gs_dist.model.decoder import DecoderArchitecture, MixtureOfExperts
from gs_dist.model.device_kind import DeviceKind
from gs_dist.model.statistics import StatisticsSettings, block_bounds
from gs_dist.planning.bits import least_bytes, override_of
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.memory import MemoryPlan
from gs_dist.planning.probe import plan_probe
from gs_dist.planning.solver_threads import choose_solver_threads
from gs_dist.planning.spread import Spread, blocks_of, choose_spread, device_of, shares, threads_of
from gs_dist.planning.workload import (
    Operations,
    TensorHeader,
    Workload,
    compute_bytes,
    count_operations,
    layer_settings,
    make_workload,
)
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.recipe.sizes import format_bytes
from gs_dist.results.costs import W4, W8

__all__ = [
    "CalibrationPlan",
    "ClusterFacts",
    "Operations",
    "StagePlan",
    "TensorHeader",
    "make_plan",
]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Decoder layers [first_layer, end_layer), observed wave by wave.

    `resident`: the stage holds the weights of all its layers, so its first pass runs them all and sends
    the output on at once. Otherwise it loads a wave's layers at a time and sends in the last wave. With
    several waves a worker keeps `kept_micro_batches` hidden states between them.
    """

    stage: int
    first_layer: int
    end_layer: int
    waves: tuple[tuple[int, ...], ...]
    resident: bool
    memory: MemoryPlan

    @property
    def layers(self) -> range:
        """The stage's layers."""
        return range(self.first_layer, self.end_layer)


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """Everything decided before work starts. `policies` maps every linear's full name to its policy or None."""

    config: CalibrationConfig
    architecture: DecoderArchitecture
    stages: tuple[StagePlan, ...]
    data_parallel_size: int
    device: DeviceKind
    threads_per_worker: int
    solver_threads: int  # of those, at work on one layer's solve: fewer where their workspace would not fit
    memory_per_worker: int
    host_memory: int | None  # that a card's worker may use of its node; None without cards, or if nodes are unknown
    max_in_flight: int  # micro-batches between the first and the last stage of a replica
    bytes_read: int  # from storage, over all workers
    states_moved: int  # bytes between workers: hidden states
    statistics_moved: int  # likewise: partial sums
    policies: Mapping[str, QuantPolicy | None]
    operations: Operations
    notes: tuple[str, ...] = ()
    # Where schemes are judged: linear's name within the layer to scheme to policy of the weight alone.
    schemes: Mapping[str, Mapping[str, QuantPolicy]] = field(default_factory=dict)
    size_budget: int | None = None  # bytes of all linears, where `policies` is only what they start from
    # Of each stage, bounds of the layers that the probe holds at a time; empty where nothing is probed.
    probe_stages: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def pipeline_parallel_size(self) -> int:
        """Number of stages."""
        return len(self.stages)

    @property
    def num_workers(self) -> int:
        """Stages times replicas."""
        return len(self.stages) * self.data_parallel_size

    @property
    def bytes_moved(self) -> int:
        """Bytes between workers."""
        return self.states_moved + self.statistics_moved

    @property
    def nodes_known(self) -> bool:
        """Whether it was planned for nodes of known memory and cores."""
        return self.device.on_host or self.host_memory is not None

    @property
    def host_peak(self) -> int:
        """Bytes of host memory of the costliest worker."""
        return max(stage.memory.host_peak for stage in self.stages)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First and past-the-last micro-batch of each reduction block."""
        return block_bounds(self.config.calibration.num_micro_batches, self.config.calibration.num_blocks)

    @property
    def policy_sets(self) -> tuple[Mapping[str, QuantPolicy | None], ...]:
        """`policies`, or where they are chosen later, each scheme everywhere: what dialects must be able to hold."""
        if self.size_budget is None:
            return (self.policies,)
        inputs = {
            self.architecture.layer_prefix(layer) + linear.name: linear.name
            for layer in range(self.architecture.num_layers)
            for linear in self.architecture.linears(layer)
        }
        return tuple(
            {
                name: None if policy is None else _weight_as(policy, self.schemes[inputs[name]][scheme])
                for name, policy in self.policies.items()
            }
            for scheme in (W4, W8)
        )

    @property
    def tokens_of_experts(self) -> dict[tuple[int, int], int]:
        """(Experts of a layer, of which a token passes so many) to tokens that one sees where all see alike."""
        tokens = self.config.calibration.num_samples * self.config.calibration.sequence_length
        mixtures = [kind.mlp for kind in self.architecture.kinds if isinstance(kind.mlp, MixtureOfExperts)]
        return {(mlp.num_experts, mlp.routing.top_k): round(tokens * mlp.share_of_tokens) for mlp in mixtures}

    def stage_of(self, layer: int) -> StagePlan:
        """The stage that holds a layer."""
        return next(stage for stage in self.stages if layer in stage.layers)

    def owner(self, layer: int) -> int:
        """The replica that solves a layer: neighbours go to different replicas, so that solves are spread."""
        return (layer - self.stage_of(layer).first_layer) % self.data_parallel_size

    def blocks_of(self, replica: int) -> range:
        """Reduction blocks whose micro-batches a replica runs."""
        return blocks_of(replica, self.data_parallel_size, self.config.calibration.num_blocks)

    def micro_batches_of(self, replica: int) -> range:
        """Micro-batches that a replica runs."""
        blocks = self.blocks_of(replica)
        return range(self.blocks[blocks.start][0], self.blocks[blocks.stop - 1][1])

    def layer_policies(self, layer: int) -> dict[str, QuantPolicy | None]:
        """Policy of each linear of a layer, by name within the layer."""
        prefix = self.architecture.layer_prefix(layer)
        return {linear.name: self.policies[prefix + linear.name] for linear in self.architecture.linears(layer)}

    def layer_settings(self, layer: int) -> dict[str, StatisticsSettings]:
        """What is observed of each activation of a layer."""
        return self._settings(layer, everything=self.config.keep_statistics)

    def solver_settings(self, layer: int) -> dict[str, StatisticsSettings]:
        """What is looked at of it while the layer is solved or judged, whatever else is kept."""
        return self._settings(layer, everything=False)

    def _settings(self, layer: int, *, everything: bool) -> dict[str, StatisticsSettings]:
        return layer_settings(
            self.architecture.layers[layer],
            self.layer_policies(layer),
            gram=self.config.takes_gram,
            sketch_rows=self.config.taken_sketch_rows,
            everything=everything,
            judged=bool(self.schemes),
        )


def _weight_as(policy: QuantPolicy, scheme: QuantPolicy) -> QuantPolicy:
    return QuantPolicy.model_validate({**dict(policy), **(override_of(scheme) or {})})


def make_plan(
    config: CalibrationConfig,
    architecture: DecoderArchitecture,
    tensors: Mapping[str, TensorHeader],
    available: ClusterFacts,
    *,
    statistics_at_hand: bool = False,
) -> CalibrationPlan:
    """Decides stages, replicas, waves and memory.

    Args:
        config: the recipe.
        architecture: of the checkpoint.
        tensors: header of every tensor of the checkpoint, by full name.
        available: what there is to run on; resolves what the recipe leaves to `auto`.
        statistics_at_hand: whether an earlier job has observed the model, so that layers have only to be solved.

    Raises:
        PlanError: sizes that contradict each other, or a job that does not fit; the message names the
            settings to change, with values that would do.
        UserError: policies that conflict, match nothing or quantise nothing.
        CheckpointError: a tensor that config.json implies has no header.
    """
    workload = make_workload(config, architecture, tensors, statistics_at_hand=statistics_at_hand)
    spread = choose_spread(config, workload, available)
    probe_stages, probe_notes = plan_probe(config, workload, available, spread)
    plan = _plan_of(config, workload, available, spread)
    return replace(plan, probe_stages=probe_stages, notes=plan.notes + probe_notes)


def _plan_of(
    config: CalibrationConfig,
    workload: Workload,
    available: ClusterFacts,
    spread: Spread,
) -> CalibrationPlan:
    if spread.data_parallel_size < config.parallel.min_data_parallel_size:
        raise PlanError(
            f"parallel.min_data_parallel_size is {config.parallel.min_data_parallel_size} and only "
            f"{spread.data_parallel_size} replicas can be used: lower it"
        )
    num_workers = spread.pipeline_parallel_size * spread.data_parallel_size
    device = device_of(config, workload, available)
    threads = threads_of(config, device, available, num_workers)
    solver_threads, memory = choose_solver_threads(workload, spread, threads)
    stages = tuple(
        StagePlan(
            stage=stage,
            first_layer=choice.waves[0][0],
            end_layer=choice.waves[-1][-1] + 1,
            waves=choice.waves,
            resident=choice.resident,
            memory=memory[stage],
        )
        for stage, choice in enumerate(spread.choices)
    )
    replicas = spread.data_parallel_size
    return CalibrationPlan(
        config=config,
        architecture=workload.architecture,
        stages=stages,
        data_parallel_size=replicas,
        device=device,
        threads_per_worker=threads,
        solver_threads=solver_threads,
        memory_per_worker=spread.memory_per_worker,
        host_memory=spread.host_memory,
        max_in_flight=spread.max_in_flight,
        # Every replica reads the layers; the first one also what is carried over, all of them the embedding.
        bytes_read=replicas * (sum(workload.layer_nbytes) + workload.embedding_nbytes) + workload.outer_nbytes,
        states_moved=_states_moved(config, workload, device, spread) if workload.runs_model else 0,
        statistics_moved=_statistics_moved(config, workload, spread) if workload.runs_model else 0,
        policies=workload.resolved,
        operations=count_operations(workload, config.calibration, device=device),
        notes=workload.notes + _budget_notes(workload),
        schemes=workload.schemes,
        size_budget=workload.size_budget,
    )


def _budget_notes(workload: Workload) -> tuple[str, ...]:
    if workload.size_budget is None:
        return ()
    fixed = {name for name, policy in workload.resolved.items() if policy is None}
    least = least_bytes(workload.architecture, workload.schemes, fixed)
    full = least_bytes(workload.architecture, {})
    return (
        f"bits are chosen so that the linears take {format_bytes(workload.size_budget)} at most: in float they take "
        f"{format_bytes(full)}, with the fewest bits {format_bytes(least)}",
        f"until the end, statistics of {format_bytes(sum(workload.set_bytes))} are kept in the output",
    )


def _states_moved(config: CalibrationConfig, workload: Workload, device: DeviceKind, spread: Spread) -> int:
    """Hidden states over every boundary of stages once."""
    data, architecture = config.calibration, workload.architecture
    states = data.num_micro_batches * data.samples_per_micro_batch * data.sequence_length * architecture.hidden_size
    return states * compute_bytes(architecture, device) * (spread.pipeline_parallel_size - 1)


def _statistics_moved(config: CalibrationConfig, workload: Workload, spread: Spread) -> int:
    """Partial sums from each replica to a layer's owner."""
    moved = 0
    _, at_end, _ = shares(config, spread.data_parallel_size)
    for choice in spread.choices:
        first = choice.waves[0][0]
        for layer in (layer for wave in choice.waves for layer in wave):
            owner = (layer - first) % spread.data_parallel_size
            sets = sum(at_end) - at_end[owner]
            moved += sets * workload.set_bytes[layer]
    return moved
