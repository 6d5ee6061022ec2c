"""How float and published model are probed in the memory of the job: as many layers of a stage at a time as fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gs_dist.errors import PlanError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.memory import JobShape, MemoryPlan, probe_memory
from gs_dist.planning.spread import Spread, choose_spread, device_of
from gs_dist.planning.waves import split_evenly
from gs_dist.planning.workload import Workload, compute_bytes
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.sections import CalibrationData
from gs_dist.recipe.sizes import GIB, format_bytes

__all__ = ["PROMPT_TOKENS", "LayerGroups", "choose_groups", "evaluation_shape", "plan_probe"]

PROMPT_TOKENS = 32  # enough of a context that a sound model is sure of what follows


@dataclass(frozen=True, kw_only=True)
class LayerGroups:
    """Bounds of the layers that a stage holds at a time, the peak of the costliest of them, and whether that fits."""

    bounds: tuple[tuple[int, int], ...]
    memory: MemoryPlan
    fits: bool

    @property
    def most_layers(self) -> int:
        """Layers of the largest group."""
        return max(end - first for first, end in self.bounds)


def evaluation_shape(
    architecture: DecoderArchitecture,
    device: DeviceKind,
    data: CalibrationData,
    *,
    max_in_flight: int,
    longest: int = 0,
) -> JobShape:
    """What the memory of an evaluation depends on: as a job's, but nothing is observed, solved or written.

    Args:
        architecture: of both models.
        device: what it runs on.
        data: what perplexity is taken on.
        max_in_flight: micro-batches between the first and the last stage.
        longest: tokens of another sample that runs by itself and may be longer than those of `data`.
    """
    element = compute_bytes(architecture, device)
    none = (0,) * architecture.num_layers
    layers = {kind: element * sum(math.prod(shape) for shape in kind.tensors.values()) for kind in architecture.kinds}
    return JobShape(
        architecture=architecture,
        device=device,
        micro_batch_size=data.samples_per_micro_batch,
        sequence_length=max(data.sequence_length, longest),
        max_in_flight=max_in_flight,
        element_bytes=element,
        layer_weight_bytes=tuple(layers[layer] for layer in architecture.layers),
        embedding_bytes=element * architecture.vocab_size * architecture.hidden_size,
        decoded_bytes=0,  # a layer that is loaded is counted twice
        layer_output_bytes=none,
        set_bytes=none,
        solver_bytes=none,
        largest_gram_bytes=none,
    )


def choose_groups(
    shape: JobShape,
    layers: Sequence[int],
    *,
    embeds: bool,
    last: bool,
    num_micro_batches: int,
    limit: int,
    host_limit: int | None,
    compares: bool = False,
) -> LayerGroups:
    """The fewest groups of a stage's layers that fit; one layer a group, with `fits` False, where that does not.

    Args:
        shape: of the evaluation's micro-batches.
        layers: the stage's.
        embeds: whether it is the first stage.
        last: whether it is the last one.
        num_micro_batches: of the evaluation, whose hidden states are kept between groups.
        limit: bytes of the device.
        host_limit: bytes of the host, where the device is a card and the host is known.
        compares: whether distributions are compared with the float model's.
    """
    found = None
    for count in range(1, len(layers) + 1):
        groups = split_evenly(layers, count)
        kept = num_micro_batches if count > 1 else 0
        plans = [
            probe_memory(shape, group, embeds=embeds, last=last, kept_micro_batches=kept, compares=compares)
            for group in groups
        ]
        memory = max(plans, key=lambda plan: (plan.peak, plan.host_peak))
        found = LayerGroups(
            bounds=tuple((group[0], group[-1] + 1) for group in groups),
            memory=memory,
            fits=memory.peak <= limit and (host_limit is None or memory.host_peak <= host_limit),
        )
        if found.fits:
            break
    assert found is not None, "a stage has at least one layer"
    return found


def plan_probe(
    config: CalibrationConfig, workload: Workload, available: ClusterFacts, spread: Spread
) -> tuple[tuple[tuple[tuple[int, int], ...], ...], tuple[str, ...]]:
    """How the probe runs; nothing where the recipe asks for none.

    Args:
        config: the recipe.
        workload: of the job.
        available: what there is to run on.
        spread: the job's stages, which the probe uses too.

    Returns:
        Of each stage the bounds of the layers that it holds at a time, and what is to be said of it to people.

    Raises:
        PlanError: not even one layer of a stage fits; the message names settings and values that would do.
    """
    if config.max_perplexity_increase is None:
        return (), ()
    stages = _stages(config, workload, available, spread)
    stage, costliest = max(enumerate(stages), key=lambda pair: (not pair[1].fits, pair[1].memory.peak))
    if not costliest.fits:
        raise PlanError(_explain_misfit(config, workload, available, spread, stage, costliest))
    note = (
        f"before the job counts as done, float and published model are probed on {config.probe_data.num_samples} "
        f"samples: {format_bytes(costliest.memory.peak)} a worker at most, "
    )
    if all(len(groups.bounds) == 1 for groups in stages):
        note += "all weights of a stage in memory"
    else:
        note += _reads(config, workload, stages)
    return tuple(groups.bounds for groups in stages), (note,)


def _reads(config: CalibrationConfig, workload: Workload, stages: Sequence[LayerGroups]) -> str:
    """What it costs that weights do not stay in memory."""
    read = sum(
        workload.layer_nbytes[layer]
        for groups in stages
        if len(groups.bounds) > 1
        for first, end in groups.bounds
        for layer in range(first, end)
    )
    tokens, count = config.probe.max_new_tokens, len(config.dialects)
    at_a_time = max(groups.most_layers for groups in stages if len(groups.bounds) > 1)
    times, often = "once", "once"
    if tokens:
        times = f"up to {1 + tokens} times (once a token of probe.max_new_tokens, which 0 leaves out)"
        often = "twice"
    published = "those of the published model" if count == 1 else f"those of each of the {count} published models"
    return (
        f"up to {at_a_time} of a stage's layers in memory at a time, since they do not all fit: the float model's "
        f"weights ({format_bytes(read)}) are read {times}, {published} {often}"
    )


def _stages(
    config: CalibrationConfig, workload: Workload, available: ClusterFacts, spread: Spread
) -> list[LayerGroups]:
    data = config.probe_data
    shape = evaluation_shape(
        workload.architecture,
        device_of(config, workload, available),
        data,
        max_in_flight=min(spread.max_in_flight, data.num_micro_batches),
        longest=PROMPT_TOKENS + config.probe.max_new_tokens,
    )
    last = len(spread.choices) - 1
    return [
        choose_groups(
            shape,
            [layer for wave in choice.waves for layer in wave],
            embeds=stage == 0,
            last=stage == last,
            num_micro_batches=data.num_micro_batches,
            limit=spread.memory_per_worker,
            host_limit=spread.host_memory,
        )
        for stage, choice in enumerate(spread.choices)
    ]


def _explain_misfit(
    config: CalibrationConfig,
    workload: Workload,
    available: ClusterFacts,
    spread: Spread,
    stage: int,
    found: LayerGroups,
) -> str:
    needed = found.memory
    memory = f"{format_bytes(needed.peak)} a worker and memory_per_worker is {format_bytes(spread.memory_per_worker)}"
    name, size = needed.largest
    if needed.peak <= spread.memory_per_worker and spread.host_memory is not None:
        share = format_bytes(spread.host_memory)
        memory = f"{format_bytes(needed.host_peak)} of host memory a worker and the cluster has {share} for each"
        name, size = needed.largest_of_host
    advice = [*_ways_out(config, workload, available, spread, needed.peak), "max_perplexity_increase: null"]
    return (
        "max_perplexity_increase is set, and to probe float and published model with one layer in memory at a time "
        f"stage {stage} of {len(spread.choices)} needs {memory}; the largest item is {name}, {format_bytes(size)}. Set "
        f"{', or '.join(advice)}; `gs-dist evaluate` can compare the models elsewhere"
    )


def _ways_out(
    config: CalibrationConfig, workload: Workload, available: ClusterFacts, spread: Spread, peak: int
) -> list[str]:
    """Changes of one setting each, of every setting the first value that fits."""
    unit = GIB if peak > 4 * GIB else 64 << 20
    needed = -(-peak // unit) * unit
    data = config.probe_data
    halves = [
        [size >> n for n in range(1, size.bit_length())] for size in (data.num_samples, data.samples_per_micro_batch)
    ]
    trials: list[tuple[str, str, Iterable[int]]] = [
        ("parallel", "memory_per_worker", [needed]),
        (
            "parallel",
            "pipeline_parallel_size",
            range(len(spread.choices) + 1, workload.architecture.num_layers + 1),
        ),
        ("probe", "num_samples", halves[0]),
        ("calibration", "micro_batch_size", halves[1]),
    ]
    ways = []
    for section, setting, values in trials:
        for value in values:
            if _would_fit(config, workload, available, section, {setting: value}):
                size = f"{value // GIB}GiB" if value % GIB == 0 else f"{value >> 20}MiB"
                ways.append(f"{section}.{setting}: {size if setting == 'memory_per_worker' else value}")
                break
    return ways


def _would_fit(
    config: CalibrationConfig, workload: Workload, available: ClusterFacts, section: str, values: dict[str, Any]
) -> bool:
    changed = config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
    try:
        spread = choose_spread(changed, workload, available)
    except PlanError:
        return False
    asked = spread.memory_per_worker * spread.pipeline_parallel_size * spread.data_parallel_size
    if device_of(changed, workload, available).on_host and asked > available.memory_bytes:
        return False
    return all(groups.fits for groups in _stages(changed, workload, available, spread))
