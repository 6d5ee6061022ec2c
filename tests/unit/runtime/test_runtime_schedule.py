from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gs_dist.planning.memory import MemoryPlan
from gs_dist.planning.plan import StagePlan
from gs_dist.runtime.schedule import StageWave, Stream, plan_streams


def _stages(sizes: list[int], per_wave: int, *, resident: bool) -> list[StagePlan]:
    stages, first = [], 0
    for number, size in enumerate(sizes):
        layers = list(range(first, first + size))
        waves = tuple(tuple(layers[i : i + per_wave]) for i in range(0, size, per_wave))
        stages.append(
            StagePlan(
                stage=number,
                first_layer=first,
                end_layer=first + size,
                waves=waves,
                resident=resident,
                memory=MemoryPlan(items={}),
            )
        )
        first += size
    return stages


def _run(streams: list[Stream], num_stages: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Executes streams on symbols: a hidden state is the list of layers it passed; returns what was observed."""
    stored: dict[int, list[int]] = {}
    sent: dict[int, list[int]] = {}
    observed: list[int] = []
    inputs: list[tuple[int, int]] = []
    seen_waves: dict[int, int] = dict.fromkeys(range(num_stages), -1)
    solved: set[int] = set()
    for stream in streams:
        for position, wave in enumerate(stream.waves):
            assert wave.number == seen_waves[wave.stage] + 1, "a stage's waves come in order"
            seen_waves[wave.stage] = wave.number
            assert (position > 0) == (wave.stage > 0 and not wave.from_store and wave.number == 0)
            state = list(stored[wave.stage] if wave.from_store else sent.get(wave.stage - 1, []))
            assert state == list(range(wave.first_layer)), "a layer sees everything before it, once"
            for layer in range(wave.first_layer, wave.end_layer):
                if wave.keep_at == layer:
                    stored[wave.stage] = list(state)
                if wave.quantized:
                    assert layer in solved, "a layer runs in its published form only after it was published"
                if layer in wave.observed:
                    observed.append(layer)
                    inputs.append((layer, len(state)))
                state.append(layer)
            if wave.keep_at == wave.end_layer:
                stored[wave.stage] = list(state)
            if wave.emits:
                sent[wave.stage] = state
        solved.update(layer for wave in stream.waves for layer in wave.observed)
    return observed, inputs


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 5),
    st.booleans(),
    st.sets(st.integers(0, 19)),
)
@settings(max_examples=300, deadline=None)
def test_each_unfinished_layer_is_observed_once_on_the_output_of_all_before_it(
    sizes: list[int], per_wave: int, resident: bool, finished: set[int]
) -> None:
    """Whatever the stages, waves and finished layers, every unfinished layer is observed exactly once."""
    streams = plan_streams(_stages(sizes, per_wave, resident=resident), finished)
    observed, _ = _run(streams, len(sizes))
    assert sorted(observed) == [i for i in range(sum(sizes)) if i not in finished]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.sets(st.integers(0, 11)))
@settings(max_examples=200, deadline=None)
def test_quantized_propagation_runs_published_layers_before_each_observed_one(
    sizes: list[int], finished: set[int]
) -> None:
    """With quantised propagation each layer is observed on what the published layers before it give."""
    finished &= set(range(sum(sizes)))
    streams = plan_streams(_stages(sizes, 1, resident=False), finished, propagate_quantized=True)
    stored: dict[int, list[str]] = {}
    sent: dict[int, list[str]] = {}
    published = set(finished)
    observed = []
    for stream in streams:
        for wave in stream.waves:
            state = list(stored[wave.stage] if wave.from_store else sent.get(wave.stage - 1, []))
            for layer in range(wave.first_layer, wave.end_layer):
                if wave.keep_at == layer:
                    stored[wave.stage] = list(state)
                if layer in wave.observed:
                    assert state == [f"quantised {i}" for i in range(layer)]
                    observed.append(layer)
                assert not wave.quantized or layer in published
                state.append(f"{'quantised' if wave.quantized else 'float'} {layer}")
            if wave.keep_at == wave.end_layer:
                stored[wave.stage] = list(state)
            if wave.emits:
                sent[wave.stage] = state
        published.update(layer for wave in stream.waves for layer in wave.observed)
    assert sorted(observed) == [i for i in range(sum(sizes)) if i not in finished]


def test_one_wave_a_stage_streams_through_all_stages_at_once() -> None:
    """With all weights resident the first pass is one stream over all stages, so that none waits for another."""
    streams = plan_streams(_stages([3, 3], 1, resident=True), set())
    assert [len(stream.waves) for stream in streams] == [2, 1, 1, 1, 1]
    first = streams[0].waves[0]
    assert first == StageWave(stage=0, number=0, first_layer=0, end_layer=3, observed=(0,), keep_at=1, emits=True)


def test_stages_behind_the_last_unfinished_layer_do_nothing() -> None:
    """On resuming, nothing is run beyond the last layer that is still to be observed."""
    streams = plan_streams(_stages([2, 2, 2], 2, resident=True), {1, 2, 3, 4, 5})
    assert {wave.stage for stream in streams for wave in stream.waves} == {0}
    assert plan_streams(_stages([2, 2], 2, resident=True), {0, 1, 2, 3}) == []
