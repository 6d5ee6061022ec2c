"""What each stage does in which pass over the data: plain data, decided before anything runs.

A stage wave runs micro-batches through some of a stage's layers. It takes them from upstream (the data
or the stage before) or from the stage's own store, observes some layers, may keep the hidden states at
one boundary for a later wave, and may send the stage's output on. Waves that feed each other micro-batch
by micro-batch form a stream; streams on different stages run at the same time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gs_dist.planning.plan import StagePlan

__all__ = ["StageWave", "Stream", "plan_solves", "plan_streams"]


@dataclass(frozen=True, kw_only=True)
class StageWave:
    """One pass of one stage over its micro-batches.

    Attributes:
        stage: the stage.
        number: position among the stage's waves.
        first_layer, end_layer: layers run, the last one excluded.
        observed: layers whose statistics are taken, and which are solved when the pass is over.
        from_store: whether hidden states come from the stage's store instead of from upstream.
        keep_at: the layer before which hidden states are kept for the next wave, None for nowhere.
        emits: whether the hidden states after `end_layer` go on to the next stage.
        quantised: whether the layers run as they were published, instead of as they are in the source.
        frees_layers: whether the stage's weights are dropped before this wave's are loaded.
    """

    stage: int
    number: int
    first_layer: int
    end_layer: int
    observed: tuple[int, ...] = ()
    from_store: bool = False
    keep_at: int | None = None
    emits: bool = False
    quantized: bool = False
    frees_layers: bool = False


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Waves of consecutive stages that a micro-batch passes in one go."""

    waves: tuple[StageWave, ...]


def plan_streams(
    stages: Sequence[StagePlan], finished: Collection[int], *, propagate_quantized: bool = False
) -> list[Stream]:
    """Streams that observe every layer not in `finished`, in an order in which they can start.

    A stream may start once the earlier waves of its first stage are done and solved; those of its other
    stages are that stage's first. Stages after the last unfinished layer have nothing to do.
    """
    last = max((s.stage for s in stages if any(i not in finished for w in s.waves for i in w)), default=-1)
    waves_of = _quantized_waves if propagate_quantized else _waves
    per_stage = [waves_of(stage, finished, emits=stage.stage < last) for stage in stages if stage.stage <= last]
    streams: list[Stream] = []
    for waves in per_stage:
        for wave in waves:
            if wave.number == 0 and wave.stage > 0:
                continue  # fed by the stage before, below
            chain = [wave]
            while chain[-1].emits:
                chain.append(per_stage[chain[-1].stage + 1][0])
            streams.append(Stream(waves=tuple(chain)))
    return streams


def plan_solves(stages: Sequence[StagePlan], finished: Collection[int]) -> list[Stream]:
    """Streams without a forward pass: every unfinished layer is solved, from statistics that are at hand."""
    waves = [
        StageWave(
            stage=stage.stage,
            number=0,
            first_layer=stage.first_layer,
            end_layer=stage.first_layer,
            observed=tuple(i for i in range(stage.first_layer, stage.end_layer) if i not in finished),
            from_store=True,
        )
        for stage in stages
    ]
    return [Stream(waves=(wave,)) for wave in waves if wave.observed]


def _waves(stage: StagePlan, finished: Collection[int], *, emits: bool) -> list[StageWave]:
    """Waves of a stage where unquantised outputs are sent on."""
    unfinished = [tuple(i for i in wave if i not in finished) for wave in stage.waves]
    if stage.resident:
        return _resident_waves(stage, [w for w in unfinished if w], emits=emits)
    # Only one wave's weights fit: a finished wave is run again where something after it needs its output.
    needed = len(unfinished) if emits else max(k + 1 for k, w in enumerate(unfinished) if w)
    waves = []
    for number in range(needed):
        is_last = number == needed - 1
        end = stage.waves[number][-1] + 1
        waves.append(
            StageWave(
                stage=stage.stage,
                number=number,
                first_layer=stage.waves[number][0],
                end_layer=end,
                observed=unfinished[number],
                from_store=number > 0,
                keep_at=None if is_last else end,
                emits=emits and is_last,
                frees_layers=True,
            )
        )
    return waves


def _resident_waves(stage: StagePlan, unfinished: Sequence[tuple[int, ...]], *, emits: bool) -> list[StageWave]:
    """All weights fit: the first wave sends the stage's output on, so that no stage waits for another's waves."""
    if not unfinished:
        return [
            StageWave(
                stage=stage.stage, number=0, first_layer=stage.first_layer, end_layer=stage.end_layer, emits=emits
            )
        ]
    waves = []
    start = stage.first_layer
    for number, observed in enumerate(unfinished):
        boundary = observed[-1] + 1
        is_last = number == len(unfinished) - 1
        sends = emits and number == 0
        waves.append(
            StageWave(
                stage=stage.stage,
                number=number,
                first_layer=start,
                end_layer=stage.end_layer if sends else boundary,
                observed=observed,
                from_store=number > 0,
                keep_at=None if is_last else boundary,
                emits=sends,
            )
        )
        start = boundary
    return waves


def _quantized_waves(stage: StagePlan, finished: Collection[int], *, emits: bool) -> list[StageWave]:
    """Waves of a stage where each layer sees what the quantised layers before it give.

    A layer is observed in one wave and run in its published form in the next; finished layers run in
    their published form at once.
    """
    layers = range(stage.first_layer, stage.end_layer)
    needed = [i for i in layers if emits or any(j not in finished for j in range(i, stage.end_layer))]
    waves: list[StageWave] = []

    def add(*, first: int, end: int, observed: tuple[int, ...], keep_at: int | None, sends: bool) -> None:
        waves.append(
            StageWave(
                stage=stage.stage,
                number=len(waves),
                first_layer=first,
                end_layer=end,
                observed=observed,
                from_store=bool(waves),
                keep_at=keep_at,
                emits=sends,
                quantized=not observed,
                frees_layers=True,
            )
        )

    for i in needed:
        is_last = i == needed[-1]
        if i not in finished:
            # The input stays in the store for the published form to run on, unless nothing follows.
            follows = emits or not is_last
            add(first=i, end=i + 1, observed=(i,), keep_at=i if follows and not waves else None, sends=False)
            if not follows:
                continue
        add(first=i, end=i + 1, observed=(), keep_at=None if is_last else i + 1, sends=emits and is_last)
    return waves
