"""How a job is spread over stages, replicas and waves, and what to change where no way fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gs_dist.errors import PlanError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.model.statistics import block_bounds
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.memory import SumCounts
from gs_dist.planning.waves import WaveChoice, choose_waves, count_partial_sums, one_by_one, split_stages
from gs_dist.planning.workload import Operations, Workload, count_operations, without_gram
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.sizes import GIB, format_bytes

__all__ = [
    "ClusterFacts",
    "Spread",
    "blocks_of",
    "choose_spread",
    "device_of",
    "host_share",
    "pass_operations",
    "shares",
    "threads_of",
]

IN_FLIGHT_PER_STAGE = 2  # one at work and one waiting keeps a stage busy; more only fills memory
CPU_MEMORY_SHARE = 0.8  # of a node's memory, for workers: the rest is the object store's and the system's
_THREADS_POWER = (
    0.8  # of its threads, what a CPU worker does at a time: two do 1.74 times as much as one in a forward pass
)
# Ways that take up to this times as long as the fastest count as equally fast: the one of least memory is taken.
_AS_FAST = 1.2
_FEW = 8  # replicas: every number up to this one is tried, and beyond it halves of the largest
ASCEND_MEMORY_PER_WORKER = 60 * GIB  # of a card with 64 GB, what its driver leaves free


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One way to spread the job, and how each stage would be run."""

    pipeline_parallel_size: int
    data_parallel_size: int
    memory_per_worker: int
    host_memory: int | None  # that a card's worker may use, where the cluster is known
    max_in_flight: int
    choices: tuple[WaveChoice, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage stays within its memory."""
        return all(choice.fits for choice in self.choices)

    @property
    def total_memory(self) -> int:
        """Peak of all workers together, of devices and hosts."""
        memory = [choice.memory for choice in self.choices]
        one_each = sum(plan.peak + (plan.host_peak if plan.host_items else 0) for plan in memory)
        return one_each * self.data_parallel_size

    @property
    def overshoot(self) -> float:
        """The costliest stage's peak over what a worker may use, of the device or of its host."""
        device = max(choice.memory.peak for choice in self.choices) / self.memory_per_worker
        if self.host_memory is None:
            return device
        return max(device, max(choice.memory.host_peak for choice in self.choices) / self.host_memory)

    @property
    def streams(self) -> bool:
        """Whether one pass with all weights in memory is enough."""
        return all(choice.resident and len(choice.waves) == 1 for choice in self.choices)


def pass_operations(
    waves: Sequence[Sequence[int]], *, resident: bool, num_layers: int, operations: Operations, propagation: str
) -> float:
    """Forward passes and statistics of one stage, over all samples.

    Args:
        waves: the stage's.
        resident: whether it holds all its weights.
        num_layers: of the model.
        operations: of the whole job, each layer run once.
        propagation: the recipe's.
    """
    # With all weights in memory the first pass runs every layer, and each later one its wave.
    passes = 2 - 1 / len(waves) if resident and propagation == "original" else 1
    return sum(map(len, waves)) / num_layers * (operations.forward * passes + operations.statistics)


def _relative_time(
    spread: Spread, config: CalibrationConfig, workload: Workload, available: ClusterFacts, operations: Operations
) -> float:
    """How long the job takes, in operations of a worker of one thread; to compare spreads, not to promise a time."""
    data, device = config.calibration, device_of(config, workload, available)
    times = [
        pass_operations(
            choice.waves,
            resident=choice.resident,
            num_layers=len(workload.policies),
            operations=operations,
            propagation=config.propagation,
        )
        for choice in spread.choices
    ]
    share = data.num_micro_batches / spread.data_parallel_size
    num_workers = spread.pipeline_parallel_size * spread.data_parallel_size
    if config.propagation == "original" and all(choice.resident for choice in spread.choices):
        passes = max(times) / spread.data_parallel_size * (share + len(times) - 1) / share
    else:
        passes = sum(times) / spread.data_parallel_size  # each stage waits for the one before
    if not device.on_host:
        return passes  # solves are the hosts', whose rate is another
    threads = _threads_share(config, device, available, num_workers)
    return float((passes + operations.solve / num_workers) / threads**_THREADS_POWER)


def _threads_share(config: CalibrationConfig, device: DeviceKind, available: ClusterFacts, num_workers: int) -> int:
    share, asked = available.threads_share(num_workers, npus=device.npus), config.parallel.threads_per_worker
    return share if asked == "auto" else min(share, asked)  # more is refused, by `threads_of`


def blocks_of(replica: int, num_replicas: int, num_blocks: int) -> range:
    """Reduction blocks that a replica runs: neighbours, so that it can merge most of what it holds."""
    return range(replica * num_blocks // num_replicas, (replica + 1) * num_blocks // num_replicas)


def choose_spread(config: CalibrationConfig, workload: Workload, available: ClusterFacts) -> Spread:
    """The fastest way to spread the job that fits.

    Raises:
        PlanError: sizes that contradict each other, or no way fits; the message names the settings to
            change, with values that would do.
    """
    if device_of(config, workload, available).on_host and available.memory_bytes < 1:
        raise PlanError(
            "no node is known that a worker could run on: its memory is 0. Wait until worker nodes have joined the "
            "cluster, or describe them with --nodes, --cpus-per-node and --memory-per-node"
        )
    spread = _best(config, workload, available)
    if not spread.fits:
        raise PlanError(_explain_misfit(config, workload, available, spread))
    return spread


def device_of(config: CalibrationConfig, workload: Workload, available: ClusterFacts) -> DeviceKind:
    """As the recipe says, else cards where there are any; a solve is the host's."""
    if not workload.runs_model:
        return DeviceKind.CPU
    if config.parallel.device != "auto":
        return DeviceKind(config.parallel.device)
    return DeviceKind.ASCEND if available.num_npus > 0 else DeviceKind.CPU


def _num_slots(config: CalibrationConfig, workload: Workload, available: ClusterFacts) -> int | None:
    """How many workers the cluster has room for, or None where it is not known."""
    if device_of(config, workload, available).on_host:
        return available.num_cpus
    return available.num_npus or None


def _busy(config: CalibrationConfig, data_parallel_size: int) -> bool:
    """Whether every replica gets at least one micro-batch."""
    bounds = block_bounds(config.calibration.num_micro_batches, config.calibration.num_blocks)
    shares = [blocks_of(replica, data_parallel_size, len(bounds)) for replica in range(data_parallel_size)]
    return all(len(share) and bounds[share.stop - 1][1] > bounds[share.start][0] for share in shares)


def _check_sizes(config: CalibrationConfig, num_layers: int) -> None:
    parallel, data = config.parallel, config.calibration
    if parallel.pipeline_parallel_size != "auto" and parallel.pipeline_parallel_size > num_layers:
        raise PlanError(
            f"parallel.pipeline_parallel_size is {parallel.pipeline_parallel_size} and the model has {num_layers} "
            f"decoder layers: set it to {num_layers} or less"
        )
    replicas = parallel.data_parallel_size
    if replicas != "auto":
        if replicas > data.reduction_blocks:
            raise PlanError(
                f"parallel.data_parallel_size is {replicas} and the samples form {data.reduction_blocks} blocks: set "
                f"it to {data.reduction_blocks} or less, or calibration.reduction_blocks to a larger power of two"
            )
        if not _busy(config, replicas):
            raise PlanError(
                f"parallel.data_parallel_size is {replicas} and there are {data.num_micro_batches} micro-batches of "
                f"{data.samples_per_micro_batch} samples, so that a replica would have none: set it to "
                f"{_most_replicas(config, replicas)}, raise calibration.num_samples, or lower "
                "calibration.micro_batch_size"
            )
    if config.propagation == "quantized" and parallel.layers_per_wave not in ("auto", 1):
        raise PlanError(
            f"parallel.layers_per_wave is {parallel.layers_per_wave} and propagation is quantized, which solves each "
            "layer before the next is observed: set layers_per_wave: 1 or auto, or propagation: original"
        )


def _most_replicas(config: CalibrationConfig, limit: int) -> int:
    limit = min(limit, config.calibration.reduction_blocks)
    return next((n for n in range(limit, 1, -1) if _busy(config, n)), 1)


def _candidates(config: CalibrationConfig, num_layers: int, slots: int | None) -> Iterator[tuple[int, int]]:
    """Numbers of stages and replicas to try, few stages and many replicas first."""
    stages, replicas = config.parallel.pipeline_parallel_size, config.parallel.data_parallel_size
    reserved = 1 if replicas == "auto" else replicas
    if stages != "auto":
        counts = range(stages, stages + 1)
    else:
        counts = range(1, max(1, min(num_layers, num_layers if slots is None else slots // reserved)) + 1)
    for count in counts:
        if replicas != "auto":
            yield count, replicas
            continue
        room = 1 if slots is None else max(1, slots // count)
        least = config.parallel.min_data_parallel_size
        most = max(_most_replicas(config, room), least)
        tried = {most >> halved for halved in range(most.bit_length())} | set(range(1, min(most, _FEW) + 1))
        yield from ((count, n) for n in sorted(tried, reverse=True) if n >= least and (n == most or _busy(config, n)))


def _best(config: CalibrationConfig, workload: Workload, available: ClusterFacts) -> Spread:
    """The fastest way that fits, or one nearly as fast that takes less memory.

    On a cluster of unknown size the one with fewest workers that needs one pass. Where none fits, the nearest to it.
    """
    num_layers, slots = workload.architecture.num_layers, _num_slots(config, workload, available)
    _check_sizes(config, num_layers)
    if slots is None:
        return _smallest(config, workload, available)
    tried = [_try(config, workload, available, *sizes) for sizes in _candidates(config, num_layers, slots)]
    fitting = [spread for spread in tried if spread.fits]
    if not fitting:
        return min(tried, key=lambda spread: spread.overshoot)
    operations = count_operations(workload, config.calibration, device=device_of(config, workload, available))
    times = [_relative_time(spread, config, workload, available, operations) for spread in fitting]
    slowest = _AS_FAST * min(times)
    near = [(spread, time) for spread, time in zip(fitting, times, strict=True) if time <= slowest]
    return min(near, key=lambda pair: (pair[0].total_memory, pair[1]))[0]


def _smallest(config: CalibrationConfig, workload: Workload, available: ClusterFacts) -> Spread:
    """On a cluster of unknown size: few workers, and one pass if any number of them allows it."""
    best: tuple[tuple[float, ...], Spread] | None = None
    for stages, replicas in _candidates(config, workload.architecture.num_layers, None):
        spread = _try(config, workload, available, stages, replicas)
        passes = max(len(choice.waves) for choice in spread.choices)
        key = (0.0, not spread.streams, passes, stages) if spread.fits else (1.0, spread.overshoot)
        if best is None or key < best[0]:
            best = (key, spread)
        if spread.fits and spread.streams:
            break
    assert best is not None, "there is always a candidate"
    return best[1]


def _try(
    config: CalibrationConfig, workload: Workload, available: ClusterFacts, num_stages: int, num_replicas: int
) -> Spread:
    device, parallel, data = device_of(config, workload, available), config.parallel, config.calibration
    in_flight = IN_FLIGHT_PER_STAGE * num_stages if parallel.max_in_flight == "auto" else parallel.max_in_flight
    num_workers = num_stages * num_replicas
    threads = _threads_share(config, device, available, num_workers)
    on_host = host_share(available, num_workers, threads=threads, npus=device.npus)
    limit = parallel.memory_per_worker
    if limit == "auto":
        limit = on_host if device.on_host else ASCEND_MEMORY_PER_WORKER
    host_limit = on_host if not device.on_host and available.num_npus else None
    shape = workload.shape(data, device=device, max_in_flight=min(in_flight, data.num_micro_batches))
    sums, _, kept = shares(config, num_replicas)
    per_wave = 1 if config.propagation == "quantized" else parallel.layers_per_wave
    known: dict[tuple[bool, tuple[tuple[int, ...], ...]], WaveChoice] = {}
    choices = []
    for stage, layers in enumerate(split_stages(workload.architecture.num_layers, num_stages)):
        alike = (stage == 0, workload.kinds[layers.start : layers.stop])
        if alike not in known and not workload.runs_model:
            known[alike] = one_by_one(shape, layers, limit=limit)
        elif alike not in known:
            known[alike] = choose_waves(
                shape,
                layers,
                embeds=stage == 0,
                sums=sums,
                kept_micro_batches=kept,
                layers_per_wave=None if per_wave == "auto" else per_wave,
                limit=limit,
                host_limit=host_limit,
            )
        choices.append(known[alike].moved_to(layers.start))
    return Spread(
        pipeline_parallel_size=num_stages,
        data_parallel_size=num_replicas,
        memory_per_worker=limit,
        host_memory=host_limit,
        max_in_flight=in_flight,
        choices=tuple(choices),
    )


def shares(config: CalibrationConfig, num_replicas: int) -> tuple[SumCounts, list[int], int]:
    """Of the busiest replica: partial sums alive at once; of each: partial sums at the end; most micro-batches."""
    bounds = block_bounds(config.calibration.num_micro_batches, config.calibration.num_blocks)
    most, at_end, kept = 1, [], 0
    for replica in range(num_replicas):
        share = blocks_of(replica, num_replicas, len(bounds))
        filled = [block for block in share if bounds[block][0] < bounds[block][1]]
        alive, final = count_partial_sums(filled)
        most = max(most, alive)
        at_end.append(final)
        kept = max(kept, sum(bounds[block][1] - bounds[block][0] for block in filled))
    others = sum(at_end) - min(at_end)
    return SumCounts(observed=most, solved=max(at_end), merged=others + 1 if sum(at_end) > 1 else 0), at_end, kept


def host_share(available: ClusterFacts, num_workers: int, *, threads: int, npus: int) -> int:
    """Memory of its node that a worker may use, where as many share the node as may come to lie on it.

    Args:
        available: what there is to run on.
        num_workers: of the job.
        threads: of each worker.
        npus: cards of each worker.
    """
    beside = available.workers_per_node(num_workers, threads=threads, npus=npus)
    return int(available.memory_per_node * CPU_MEMORY_SHARE) // beside


def threads_of(config: CalibrationConfig, device: DeviceKind, available: ClusterFacts, num_workers: int) -> int:
    """Threads of each worker: an even share of its node's cores, or fewer.

    Raises:
        PlanError: the recipe asks for more.
    """
    share, asked = available.threads_share(num_workers, npus=device.npus), config.parallel.threads_per_worker
    if asked == "auto":
        return share
    known = device.on_host or available.num_npus > 0
    if known and asked > share:
        raise PlanError(
            f"parallel.threads_per_worker is {asked}, and {available.num_cpus} cores over {num_workers} workers give "
            f"{share} each; workers that share cores run many times slower: set it to {share} or auto"
        )
    return asked


def _explain_misfit(
    config: CalibrationConfig,
    workload: Workload,
    available: ClusterFacts,
    spread: Spread,
) -> str:
    """What does not fit, and which single change of a setting would make it fit."""
    stage, choice = max(enumerate(spread.choices), key=lambda pair: (not pair[1].fits, pair[1].memory.peak))
    memory = choice.memory
    name, size = memory.largest
    asked = f"{format_bytes(memory.peak)} a worker and memory_per_worker is {format_bytes(spread.memory_per_worker)}"
    if memory.peak <= spread.memory_per_worker and spread.host_memory is not None:
        name, size = memory.largest_of_host
        share = format_bytes(spread.host_memory)
        asked = f"{format_bytes(memory.host_peak)} of host memory a worker and the cluster has {share} for each"
    per_wave = max(len(wave) for wave in choice.waves)
    first, last = choice.waves[0][0], choice.waves[-1][-1]
    ways = [f"  {way}" for way in _ways_out(config, workload, available, spread)]
    if memory.peak <= spread.memory_per_worker and spread.host_memory is not None:
        node = _node_memory(available, spread, memory.host_peak)
        ways.append(f"  nodes of {node} GiB of memory each, as Ray counts it")
    advice = ["Any one of these would make it fit:", *ways]
    if not ways:
        advice = [
            "No single setting makes it fit: spread it over more or larger machines (parallel.pipeline_parallel_size, "
            "parallel.memory_per_worker), or lower calibration.num_samples and calibration.sequence_length."
        ]
    return "\n".join(
        [
            f"stage {stage} of {spread.pipeline_parallel_size} (layers {first} to {last}, {per_wave} in a wave) needs "
            f"{asked}; the largest item is {name}, {format_bytes(size)}.",
            *advice,
        ]
    )


def _node_memory(available: ClusterFacts, spread: Spread, host_peak: int) -> int:
    """GiB of a node of which each of its workers would have `host_peak` bytes."""
    assert spread.host_memory is not None
    return -(-available.memory_per_node * host_peak // (spread.host_memory * GIB))


def _changed(config: CalibrationConfig, section: str, **values: Any) -> CalibrationConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _ways_out(config: CalibrationConfig, workload: Workload, available: ClusterFacts, spread: Spread) -> Iterator[str]:
    """Changes of one setting each, tried until one of its values fits."""
    parallel, data = config.parallel, config.calibration
    num_layers, stages, replicas = len(workload.policies), spread.pipeline_parallel_size, spread.data_parallel_size
    peak = max(choice.memory.peak for choice in spread.choices)
    unit = GIB if peak > 4 * GIB else 64 << 20
    needed = -(-peak // unit) * unit
    more_stages = range(stages + 1, num_layers + 1)
    fewer_blocks = [1 << n for n in reversed(range(data.reduction_blocks.bit_length() - 1)) if 1 << n >= replicas]
    smaller_batches = [data.samples_per_micro_batch >> n for n in range(1, data.samples_per_micro_batch.bit_length())]
    fewer_in_flight = [n for n in (stages, 1) if n < spread.max_in_flight]
    fixed_wave = [] if parallel.layers_per_wave == "auto" else range(parallel.layers_per_wave - 1, 0, -1)
    trials: list[tuple[str, str, Iterable[Any]]] = [
        ("parallel", "memory_per_worker", [needed]),
        ("parallel", "pipeline_parallel_size", more_stages),
        ("parallel", "data_parallel_size", range(replicas - 1, 0, -1)),
        ("parallel", "layers_per_wave", fixed_wave),
        ("parallel", "max_in_flight", fewer_in_flight),
        ("calibration", "micro_batch_size", smaller_batches),
        ("calibration", "reduction_blocks", fewer_blocks),
    ]
    for section, setting, values in trials:
        for value in values:
            if _would_fit(_changed(config, section, **{setting: value}), workload, available):
                size = f"{value // GIB}GiB" if value % GIB == 0 else f"{value >> 20}MiB"
                shown = size if setting == "memory_per_worker" else value
                yield f"{section}.{setting}: {shown}"
                break
    without = config.model_copy(update={"gram": "off"})
    if config.takes_gram and not config.judges_schemes and _would_fit(without, without_gram(workload), available):
        yield "gram: off (errors are then estimated from the diagonal)"


def _would_fit(config: CalibrationConfig, workload: Workload, available: ClusterFacts) -> bool:
    try:
        spread = _best(config, workload, available)
    except PlanError:
        return False
    on_host = device_of(config, workload, available).on_host
    asked = spread.memory_per_worker * spread.pipeline_parallel_size * spread.data_parallel_size
    return spread.fits and not (on_host and asked > available.memory_bytes)
