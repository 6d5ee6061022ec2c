"""How layers are cut into stages and waves, and what fits.

A wave is the layers of a stage that are observed in one pass: all of them where memory allows, fewer
where Gram matrices or weights would not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gs_dist.planning.memory import JobShape, MemoryPlan, StageShape, SumCounts, stage_memory

__all__ = ["WaveChoice", "choose_waves", "count_partial_sums", "one_by_one", "split_evenly", "split_stages"]


def split_evenly(items: Sequence[int], parts: int) -> tuple[tuple[int, ...], ...]:
    """Cuts `items` into `parts` runs whose lengths differ by one at most, the longer ones first."""
    base, extra = divmod(len(items), parts)
    edges = [part * base + min(part, extra) for part in range(parts + 1)]
    return tuple(tuple(items[edges[part] : edges[part + 1]]) for part in range(parts))


def split_stages(num_layers: int, num_stages: int) -> list[range]:
    """Contiguous layers of each stage; the longer stages come last, since the first one also embeds."""
    base, extra = divmod(num_layers, num_stages)
    edges = [stage * base + max(0, stage - (num_stages - extra)) for stage in range(num_stages + 1)]
    return [range(edges[stage], edges[stage + 1]) for stage in range(num_stages)]


def count_partial_sums(blocks: Iterable[int]) -> tuple[int, int]:
    """How many partial sums a worker holds while it sums `blocks` in ascending order: at most, and at the end.

    Follows `statistics.TreeAccumulator`; the block being summed counts as one.
    """
    held: list[tuple[int, int]] = []
    most = 0
    for block in blocks:
        most = max(most, len(held) + 1)
        node = (0, block)
        while held and held[-1][0] == node[0] and held[-1][1] % 2 == 0 and held[-1][1] + 1 == node[1]:
            held.pop()
            node = (node[0] + 1, node[1] // 2)
        held.append(node)
    return most, len(held)


@dataclass(frozen=True, kw_only=True)
class WaveChoice:
    """A stage's waves, whether all its weights stay in memory, and the peak of its costliest wave."""

    waves: tuple[tuple[int, ...], ...]
    resident: bool
    memory: MemoryPlan
    fits: bool

    def moved_to(self, first_layer: int) -> WaveChoice:
        """The same for layers of the same sizes that start at `first_layer`."""
        shift = first_layer - self.waves[0][0]
        return replace(self, waves=tuple(tuple(layer + shift for layer in wave) for wave in self.waves))


def _choices(
    shape: JobShape, layers: Sequence[int], *, embeds: bool, sums: SumCounts, kept: int, counts: Iterable[int]
) -> Iterator[tuple[tuple[tuple[int, ...], ...], bool, MemoryPlan]]:
    """Ways to run a stage, the best first: all weights in memory before fewer, few waves before many.

    With all weights in memory the first pass already feeds the next stage, so that stages overlap.
    """
    counts = list(counts)
    for resident in (True, False):
        for count in counts:
            if not resident and count == 1:
                continue  # one wave holds all layers anyway
            waves = split_evenly(layers, count)
            plans = [
                stage_memory(
                    shape,
                    StageShape(
                        layers=layers,
                        wave=wave,
                        resident=resident,
                        embeds=embeds,
                        sums=sums,
                        kept_micro_batches=kept if count > 1 else 0,
                    ),
                )
                for wave in waves
            ]
            yield waves, resident, max(plans, key=lambda plan: (plan.peak, plan.host_peak))


def choose_waves(
    shape: JobShape,
    layers: Sequence[int],
    *,
    embeds: bool,
    sums: SumCounts,
    kept_micro_batches: int,
    layers_per_wave: int | None,
    limit: int,
    host_limit: int | None = None,
) -> WaveChoice:
    """The best way to run a stage within `limit` bytes of the device (and `host_limit` of its host).

    Where none fits, the one that needs least, with `fits` False.

    Args:
        shape: what stages share.
        layers: the stage's.
        embeds: whether it holds the embedding.
        sums: sets of statistics of an observed layer alive at once.
        kept_micro_batches: hidden states kept between waves if there are several.
        layers_per_wave: fixed by the recipe, or None for as many as fit.
        limit: bytes of the device.
        host_limit: bytes of the host, where the device is a card and the host is known.
    """
    counts = range(1, len(layers) + 1)
    if layers_per_wave is not None:
        counts = range(-(-len(layers) // layers_per_wave), -(-len(layers) // layers_per_wave) + 1)
    # Memory falls with the number of waves, but for the states kept between them: if neither end fits, none does.
    ends = [counts[0], counts[-1]] if len(counts) > 2 else []
    least: WaveChoice | None = None
    for tried in (ends, counts):
        for waves, resident, memory in _choices(
            shape, layers, embeds=embeds, sums=sums, kept=kept_micro_batches, counts=tried
        ):
            fits = memory.peak <= limit and (host_limit is None or memory.host_peak <= host_limit)
            choice = WaveChoice(waves=waves, resident=resident, memory=memory, fits=fits)
            if fits and tried is counts:
                return choice
            if least is None or (choice.fits, -memory.peak) > (least.fits, -least.memory.peak):
                least = choice
        if least is not None and not least.fits:
            break
    assert least is not None, "a stage has at least one layer"
    return least


def one_by_one(shape: JobShape, layers: Sequence[int], *, limit: int) -> WaveChoice:
    """A stage that solves its layers one after another, each from its tensors and one set of its statistics."""
    waves = tuple((layer,) for layer in layers)
    parts = [
        StageShape(
            layers=wave,
            wave=wave,
            resident=False,
            embeds=False,
            sums=SumCounts(observed=0, solved=1, merged=0),
            kept_micro_batches=0,
        )
        for wave in waves
    ]
    memory = max((stage_memory(shape, part) for part in parts), key=lambda plan: plan.peak)
    return WaveChoice(waves=waves, resident=False, memory=memory, fits=memory.peak <= limit)
