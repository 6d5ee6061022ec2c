"""Whether the published model can be probed in the memory of the job: all weights of a stage at once."""

from __future__ import annotations

from gs_dist.config import CalibrationConfig
from gs_dist.errors import PlanError
from gs_dist.memory import GIB, MemoryPlan, probe_memory
from gs_dist.spread import ClusterFacts, Spread, choose_spread, device_of, format_bytes
from gs_dist.workload import Workload

__all__ = ["check_probe"]


def check_probe(
    config: CalibrationConfig, workload: Workload, available: ClusterFacts, spread: Spread
) -> tuple[str, ...]:
    """What the probe will need, for people; nothing where the recipe asks for none.

    Args:
        config: the recipe.
        workload: of the job.
        available: what there is to run on.
        spread: the job's stages, which the probe uses too.

    Raises:
        PlanError: a stage's weights do not fit all at once; the message names settings and values that would do.
    """
    if config.max_perplexity_increase is None:
        return ()
    plans = _plans(config, workload, available, spread)
    stage, needed = max(enumerate(plans), key=lambda pair: (not _fits(spread, pair[1]), pair[1].peak))
    if not _fits(spread, needed):
        raise PlanError(_explain_misfit(config, workload, available, spread, stage, needed))
    data = config.probe_data
    return (
        f"before the job counts as done, float and published model are probed on {data.num_samples} samples: "
        f"{format_bytes(needed.peak)} a worker at most, all weights of a stage in memory",
    )


def _plans(config: CalibrationConfig, workload: Workload, available: ClusterFacts, spread: Spread) -> list[MemoryPlan]:
    data = config.probe_data
    shape = workload.shape(
        device=device_of(config, available),
        micro_batch_size=data.samples_per_micro_batch,
        sequence_length=data.sequence_length,
        max_in_flight=min(spread.max_in_flight, data.num_micro_batches),
    )
    last = len(spread.choices) - 1
    stages = [[layer for wave in choice.waves for layer in wave] for choice in spread.choices]
    return [probe_memory(shape, layers, embeds=stage == 0, last=stage == last) for stage, layers in enumerate(stages)]


def _fits(spread: Spread, needed: MemoryPlan) -> bool:
    on_host = spread.host_memory is None or needed.host_peak <= spread.host_memory
    return needed.peak <= spread.memory_per_worker and on_host


def _explain_misfit(
    config: CalibrationConfig,
    workload: Workload,
    available: ClusterFacts,
    spread: Spread,
    stage: int,
    needed: MemoryPlan,
) -> str:
    waves = spread.choices[stage].waves
    memory = f"{format_bytes(needed.peak)} a worker and memory_per_worker is {format_bytes(spread.memory_per_worker)}"
    if needed.peak <= spread.memory_per_worker and spread.host_memory is not None:
        share = format_bytes(spread.host_memory)
        memory = f"{format_bytes(needed.host_peak)} of host memory a worker and the cluster has {share} for each"
    unit = GIB if needed.peak > 4 * GIB else 64 << 20
    size = -(-needed.peak // unit) * unit
    ways = [
        f"parallel.{setting}: {shown}"
        for setting, value, shown in (
            ("memory_per_worker", size, f"{size // GIB}GiB" if size % GIB == 0 else f"{size >> 20}MiB"),
            *(
                ("pipeline_parallel_size", count, str(count))
                for count in range(len(spread.choices) + 1, workload.architecture.num_layers + 1)
            ),
        )
        if _would_fit(config, workload, available, setting, value)
    ]
    # More stages than the fewest that would do are no further advice.
    advice = [*[way for way in ways if "memory" in way], *[way for way in ways if "pipeline" in way][:1]]
    return (
        f"max_perplexity_increase is set, and to probe float and published model stage {stage} of "
        f"{len(spread.choices)} (layers {waves[0][0]} to {waves[-1][-1]}) holds all its weights at once: it needs "
        f"{memory}. Set {', or '.join([*advice, 'max_perplexity_increase: null'])}; `gs-dist evaluate` can compare "
        "the models elsewhere"
    )


def _would_fit(
    config: CalibrationConfig, workload: Workload, available: ClusterFacts, setting: str, value: int
) -> bool:
    changed = config.model_copy(update={"parallel": config.parallel.model_copy(update={setting: value})})
    try:
        spread = choose_spread(changed, workload, available)
    except PlanError:
        return False
    asked = spread.memory_per_worker * spread.pipeline_parallel_size * spread.data_parallel_size
    if device_of(changed, available) == "cpu" and asked > available.memory_bytes:
        return False
    return all(_fits(spread, plan) for plan in _plans(changed, workload, available, spread))
