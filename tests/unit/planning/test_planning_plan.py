"""Plans: stages, replicas, waves and memory, decided from headers."""

from __future__ import annotations

import bisect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import header_only_checkpoint, tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import CheckpointError, PlanError, PolicyConflictError, UserError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.model.statistics import (
    HISTOGRAM_BYTES_PER_CHANNEL,
    InputStatistics,
    StatisticsSettings,
    TreeAccumulator,
    block_bounds,
)
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.memory import layer_set_bytes
from gs_dist.planning.plan import CalibrationPlan, make_plan
from gs_dist.planning.probe import choose_groups, evaluation_shape
from gs_dist.planning.spread import threads_of
from gs_dist.planning.waves import count_partial_sums, split_evenly, split_stages
from gs_dist.planning.workload import make_workload
from gs_dist.recipe.config import CalibrationConfig, load_recipe
from gs_dist.recipe.sizes import format_bytes

GIB = 1 << 30
LAPTOP = ClusterFacts(num_cpus=2, num_npus=0, memory_bytes=24 * GIB)
BIG_HOST = ClusterFacts(num_cpus=64, num_npus=0, memory_bytes=1024 * GIB)
W8A8 = {
    "act_quant_dtype": "int8",
    "outliers_suppression": "smooth",
    "act_range": "minmax",  # needs no statistics beyond the Gram matrix, and that for errors only
    "opname_blacklist": ["lm_head"],
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    return CheckpointReader(header_only_checkpoint(tmp_path_factory.mktemp("large") / "m", "llama-3-70b"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    return CheckpointReader(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "m", num_layers=5, dtype="bfloat16"))


def recipe(*, ptq: dict[str, Any] | None = None, calibration: dict[str, Any] | None = None, **rest: Any) -> Any:
    """A recipe; `parallel`'s keys and those of the top level are told apart by name."""
    names = ("gram", "sketch_rows", "propagation", "layer_policies", "format", "max_perplexity_increase", "probe")
    top = {k: rest.pop(k) for k in names if k in rest}
    return CalibrationConfig.model_validate(
        {
            "model": "m",
            "output": "o",
            "calibration": {"data": "d", "num_samples": 512, "sequence_length": 2048, **(calibration or {})},
            "ptq": W8A8 if ptq is None else ptq,
            "parallel": rest,
            **top,
        }
    )


def planned(reader: CheckpointReader, config: Any, available: ClusterFacts = LAPTOP) -> CalibrationPlan:
    return make_plan(config, reader.architecture, reader.tensors, available)


@given(num_layers=st.integers(1, 90), data=st.data())
def test_stages_are_contiguous_and_balanced(num_layers: int, data: st.DataObject) -> None:
    """Every layer is in one stage, sizes differ by one at most, and later stages take the remainder."""
    stages = split_stages(num_layers, data.draw(st.integers(1, num_layers)))
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert sizes == sorted(sizes)
    assert sizes[-1] - sizes[0] <= 1


@given(num_layers=st.integers(1, 40), data=st.data())
def test_waves_are_contiguous_and_equal(num_layers: int, data: st.DataObject) -> None:
    """Every layer of a stage is in one wave and no wave is empty."""
    waves = split_evenly(range(7, 7 + num_layers), data.draw(st.integers(1, num_layers)))
    assert [layer for wave in waves for layer in wave] == list(range(7, 7 + num_layers))
    sizes = [len(wave) for wave in waves]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@given(blocks=st.sets(st.integers(0, 31), min_size=1).map(sorted))
def test_partial_sums_are_counted_as_the_accumulator_holds_them(blocks: list[int]) -> None:
    """The plan's count is what `TreeAccumulator` holds, the block being summed included."""
    zeros = np.zeros(1, np.float32)
    accumulator, most = TreeAccumulator(), 0
    for block in blocks:
        most = max(most, len(accumulator.nodes()) + 1)
        seen = InputStatistics(num_tokens=1, minimum=zeros, maximum=zeros, sum_abs=zeros, sum_squares=zeros)
        accumulator.push(block, {"x": seen})
    assert count_partial_sums(blocks) == (most, len(accumulator.nodes()))


def test_a_70b_model_fits_8_by_2_cards_of_64_gb(large: CheckpointReader) -> None:
    """Headers alone give stages of ten layers in waves that stay below 60 GiB."""
    plan = planned(
        large, recipe(pipeline_parallel_size=8, data_parallel_size=2, memory_per_worker="60GiB", device="ascend")
    )
    assert [tuple(stage.layers) for stage in plan.stages] == [tuple(range(i, i + 10)) for i in range(0, 80, 10)]
    assert all(stage.resident for stage in plan.stages)
    assert all([layer for wave in stage.waves for layer in wave] == list(stage.layers) for stage in plan.stages)
    assert max(stage.memory.peak for stage in plan.stages) <= 60 * GIB
    # Weights by hand: q, o (8192 x 8192), k, v (1024 x 8192), three of 28672 x 8192, two norms, in bfloat16.
    layer = 2 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192 + 2 * 8192)
    assert plan.stages[1].memory.items["weights"] == 10 * layer
    assert plan.stages[0].memory.items["weights"] == 10 * layer
    # Rows of the embedding are looked up on the host.
    assert plan.stages[0].memory.host_items["weights"] == 2 * 128256 * 8192
    assert plan.stages[1].memory.host_items["weights"] == 0


def test_one_layer_waves_take_a_70b_model_through_one_small_card(large: CheckpointReader) -> None:
    """Where a stage's weights do not fit, a wave's are loaded at a time."""
    settings = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "memory_per_worker": "20GiB"}
    plan = planned(large, recipe(device="ascend", gram="on", **settings))
    (stage,) = plan.stages
    assert stage.waves == tuple((layer,) for layer in range(80))
    assert not stage.resident
    assert stage.memory.peak <= 20 * GIB


def test_a_70b_model_is_refused_on_one_card_of_14_gib(large: CheckpointReader) -> None:
    """The refusal names stage, largest item and settings."""
    settings = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "memory_per_worker": "14GiB"}
    with pytest.raises(PlanError) as caught:
        planned(large, recipe(device="ascend", gram="on", **settings))
    message = str(caught.value)
    assert message.startswith("stage 0 of 1 (layers 0 to 79, 1 in a wave) needs ")
    assert "memory_per_worker is 14.0 GiB; the largest item is statistics" in message
    assert "\n  parallel.memory_per_worker: " in message
    assert "\n  gram: off" in message


@pytest.mark.parametrize(
    ("available", "settings"),
    [
        (LAPTOP, {"pipeline_parallel_size": 1, "memory_per_worker": "14GiB", "device": "ascend"}),
        (LAPTOP, {"pipeline_parallel_size": 1, "memory_per_worker": "32GiB", "device": "ascend", "layers_per_wave": 8}),
        (
            BIG_HOST,
            {"pipeline_parallel_size": 8, "data_parallel_size": 2, "memory_per_worker": "36GiB"},
        ),
        (
            ClusterFacts(num_cpus=96, num_npus=4, memory_bytes=2048 * GIB),
            {"calibration": {"micro_batch_size": 32}, "pipeline_parallel_size": 4, "memory_per_worker": "40GiB"},
        ),
    ],
)
def test_every_change_that_a_refusal_names_makes_the_job_fit(
    large: CheckpointReader, tmp_path: Path, available: ClusterFacts, settings: dict[str, Any]
) -> None:
    """Advice is tried before it is given: laid over the recipe, each line of it is a plan that fits."""
    config = recipe(gram="on", **settings)
    with pytest.raises(PlanError) as caught:
        planned(large, config, available)
    advice = re.findall(r"^  (\S+): (\S+)", str(caught.value), flags=re.MULTILINE)
    assert advice
    path = tmp_path / "recipe.yaml"
    path.write_text(config.model_dump_json(exclude_unset=True), encoding="utf-8")  # JSON is YAML
    for setting, value in advice:
        changed = load_recipe(path, [f"{setting}={value}"])
        plan = planned(large, changed, available)
        assert max(stage.memory.peak for stage in plan.stages) <= plan.memory_per_worker


def test_what_no_setting_mends_is_refused_without_false_hope(large: CheckpointReader) -> None:
    """A 70B model in float32 on a small machine asks for more machines."""
    with pytest.raises(PlanError, match="No single setting makes it fit: spread it over more or larger machines"):
        planned(large, recipe(calibration={"num_samples": 4096}), LAPTOP)


def test_statistics_by_hand(tiny: CheckpointReader) -> None:
    """Vectors, Gram matrices and histograms of one layer, counted field by field from real arrays."""
    architecture = tiny.architecture
    settings = {
        "attention_input": StatisticsSettings(gram=True, weighted_gram=True, histogram=True),
        "mlp_activation": StatisticsSettings(gram=True),
        "key": StatisticsSettings(gram=False),
    }
    total = 0
    for channels, grams in ((64, 2), (architecture.layers[0].mlp.widest, 1), (architecture.kv_size, 0)):
        real = InputStatistics(
            num_tokens=0,
            minimum=np.zeros(channels, np.float32),
            maximum=np.zeros(channels, np.float32),
            sum_abs=np.zeros(channels),
            sum_squares=np.zeros(channels),
            gram=np.zeros((channels, channels), np.float32) if grams else None,
            weighted_gram=np.zeros((channels, channels), np.float32) if grams == 2 else None,
        )
        total += sum(array.nbytes for name, array in real.to_arrays().items() if name != "num_tokens")
    total += 64 * HISTOGRAM_BYTES_PER_CHANNEL
    assert layer_set_bytes(architecture.layers[0], settings) == total


def test_the_cpu_holds_weights_in_float32(tiny: CheckpointReader) -> None:
    """A bfloat16 checkpoint takes four bytes a weight, since the CPU has no bfloat16 product."""
    plan = planned(tiny, recipe(pipeline_parallel_size=2, data_parallel_size=1))
    layer = sum(int(np.prod(shape)) for shape in tiny.architecture.layer_tensors(0).values())
    embedding = tiny.architecture.vocab_size * tiny.architecture.hidden_size
    assert [len(stage.layers) for stage in plan.stages] == [2, 3]
    assert plan.stages[0].memory.items["weights"] == 4 * 2 * layer + 2 * embedding  # of which rows are looked up
    assert plan.stages[1].memory.items["weights"] == 4 * 3 * layer


def test_layers_that_may_stay_in_float_are_written_in_float(tiny: CheckpointReader) -> None:
    """Which linears fail is known once they are solved: a shard may be as large as the source's."""
    failing, keeping = (
        make_workload(recipe().model_copy(update={"on_bad_layer": how}), tiny.architecture, tiny.tensors)
        for how in ("fail", "keep_float")
    )
    assert keeping.layer_output_nbytes == keeping.layer_nbytes
    assert all(a < b for a, b in zip(failing.layer_output_nbytes, keeping.layer_output_nbytes, strict=True))


def test_hidden_states_are_kept_only_between_waves(tiny: CheckpointReader) -> None:
    """One wave keeps none; several keep those of the replica's share of the samples."""
    sizes = {"pipeline_parallel_size": 1, "data_parallel_size": 2}
    one = planned(tiny, recipe(**sizes)).stages[0]
    several = planned(tiny, recipe(**sizes, layers_per_wave=2)).stages[0]
    kept = 512 // 2 * 2048 * tiny.architecture.hidden_size * 4
    assert [len(wave) for wave in several.waves] == [2, 2, 1]
    assert several.memory.items["activations"] - one.memory.items["activations"] == kept
    assert several.memory.items["statistics"] < one.memory.items["statistics"]


def test_replicas_take_neighbouring_blocks_once(tiny: CheckpointReader) -> None:
    """Every micro-batch is run by one replica, in runs."""
    for replicas in (1, 2, 3, 5, 8):
        plan = planned(tiny, recipe(pipeline_parallel_size=1, data_parallel_size=replicas))
        dealt = [i for replica in range(replicas) for i in plan.micro_batches_of(replica)]
        assert dealt == list(range(plan.config.calibration.num_micro_batches))


def test_owners_spread_the_solves(tiny: CheckpointReader) -> None:
    """Neighbouring layers of a stage are solved by different replicas."""
    plan = planned(tiny, recipe(pipeline_parallel_size=2, data_parallel_size=2))
    assert [plan.owner(layer) for layer in range(5)] == [0, 1, 0, 1, 0]
    assert [plan.stage_of(layer).stage for layer in range(5)] == [0, 0, 1, 1, 1]


def test_bytes_moved_by_hand(tiny: CheckpointReader) -> None:
    """Hidden states over each boundary, and each replica's partial sums to a layer's owner."""
    plan = planned(tiny, recipe(pipeline_parallel_size=2, data_parallel_size=2))
    states = 512 * 2048 * 64 * 4
    one_set = layer_set_bytes(tiny.architecture.layers[0], plan.layer_settings(0))
    assert plan.bytes_moved == states + 5 * one_set  # four blocks each merge to one partial sum
    alone = planned(tiny, recipe(pipeline_parallel_size=1, data_parallel_size=1))
    assert alone.bytes_moved == 0


def test_bytes_read_by_hand(tiny: CheckpointReader) -> None:
    """Each replica reads layers and embedding; what is carried over is read once more."""
    layers = sum(info.nbytes for name, info in tiny.tensors.items() if ".layers." in name)
    outer = sum(info.nbytes for name, info in tiny.tensors.items() if ".layers." not in name)
    embedding = tiny.tensors["model.embed_tokens.weight"].nbytes
    plan = planned(tiny, recipe(pipeline_parallel_size=1, data_parallel_size=2))
    assert plan.bytes_read == 2 * (layers + embedding) + outer


def test_operations_by_hand(tiny: CheckpointReader) -> None:
    """Products, half of the attention scores, half of the Gram matrices."""
    a = tiny.architecture
    plan = planned(tiny, recipe(calibration={"num_samples": 3, "sequence_length": 16}))
    tokens, layers = 48, 5
    products = sum(2 * linear.in_features * linear.out_features for linear in a.linears(0)) * tokens
    pairs = 3 * 16 * 17 // 2  # of a token and one it attends to, itself included
    attention = pairs * a.num_heads * a.head_dim * 2 * 2
    assert plan.operations.forward == layers * (products + attention)
    vectors = sum(6 * i.channels for i in a.inputs(0)) * tokens
    gram = sum(i.channels * (i.channels + 1) // 2 * 2 for i in a.inputs(0)) * tokens
    assert plan.operations.statistics == layers * (vectors + gram)
    off = planned(tiny, recipe(calibration={"num_samples": 3, "sequence_length": 16}, gram="off"))
    assert off.operations.statistics == layers * vectors
    assert off.operations.solve == 0
    sketched = planned(tiny, recipe(calibration={"num_samples": 3, "sequence_length": 16}, sketch_rows=16))
    assert sketched.operations.statistics == layers * (vectors + sum(6 * i.channels for i in a.inputs(0)) * tokens)


def test_solves_by_hand(tiny: CheckpointReader) -> None:
    """tr(D G DT) of each weight and its change, of AWQ's candidates, and GPTQ's factors and updates."""
    a = tiny.architecture
    energies = sum(linear.out_features * linear.in_features**2 for linear in a.linears(0))
    factors = sum(linear.in_features**3 // 3 for linear in a.linears(0))
    entries = sum(linear.out_features * linear.in_features for linear in a.linears(0))
    awq = {"weight_quant_dtype": "qint4x2", "outliers_suppression": "awq", "opname_blacklist": ["lm_head"]}

    def solve(**changes: Any) -> int:
        args = {"smooth_alpha": [0.25, 0.5], "weight_clip_ratio": 1.0}
        return planned(tiny, recipe(ptq={**awq, "algo_args": args, **changes})).operations.solve // 5

    assert planned(tiny, recipe()).operations.solve == 5 * 2 * energies
    clipping = 2 * (2 * energies + 8 * entries)
    assert solve() == (2 + 1 + 2) * energies + 3 * 8 * entries + clipping
    assert solve(precision_recovery="gptq") - solve() == factors + energies + 8 * entries


@pytest.mark.parametrize(
    ("more", "than"),
    [
        ({"act_range": "mse", "act_symmetric": True}, {"act_range": "minmax", "act_symmetric": True}),
        ({"act_range": "mse", "act_symmetric": False}, {"act_range": "mse", "act_symmetric": True}),
        ({"act_range": "mse"}, {"act_range": "mse", "algo_args": {"alpha": 0.5}}),
        ({"outliers_suppression": "outlier-suppression+"}, {"outliers_suppression": "outlier-suppression-lite"}),
    ],
)
def test_searches_count_as_work(tiny: CheckpointReader, more: dict[str, Any], than: dict[str, Any]) -> None:
    """A recipe that searches a strength or a range more finely has more to solve."""
    solves = [
        planned(tiny, recipe(ptq={**W8A8, "act_range": "mse", **changes})).operations.solve for changes in (more, than)
    ]
    assert solves[0] > solves[1]


def test_gptq_counts_the_ranges_that_it_tries(tiny: CheckpointReader) -> None:
    """Fourteen ranges of each group cost more than one, and a second pass over the weight more than that."""
    grouped = {
        "weight_quant_dtype": "qint4x2",
        "weight_quant_granularity": "per_group",
        "group_size": 64,
        "precision_recovery": "gptq",
        "opname_blacklist": ["lm_head"],
    }
    second = {"weight_clip": True, "algo_args": {"desc_act": True, "static_groups": True}}
    solves = [
        planned(tiny, recipe(ptq={**grouped, **changes})).operations.solve
        for changes in ({}, {"weight_clip": True}, second)
    ]
    assert solves == sorted(set(solves))


# So that a layer takes most while it is solved.
ONE_BLOCK = {"reduction_blocks": 1}
W4_AWQ_GPTQ = {
    "weight_quant_dtype": "qint4x2",
    "weight_quant_granularity": "per_group",
    "group_size": 128,
    "outliers_suppression": "awq",
    "precision_recovery": "gptq",
    "opname_blacklist": ["lm_head"],
}


@pytest.mark.parametrize("ptq", [W8A8, {**W8A8, "outliers_suppression": "outlier-suppression-lite"}, W4_AWQ_GPTQ])
def test_threads_of_a_solve_are_planned_for(large: CheckpointReader, ptq: dict[str, Any]) -> None:
    """All of a worker's threads solve where memory is ample, and the plan grows by at least the tiles they hold."""
    cards = {"pipeline_parallel_size": 8, "data_parallel_size": 2}
    facts = [ClusterFacts(num_cpus=16 * n, num_npus=16, memory_bytes=8192 * GIB) for n in (1, 12)]
    config = recipe(ptq=ptq, calibration={"reduction_blocks": 2}, **cards)
    one, many = (planned(large, config, known) for known in facts)
    assert (one.solver_threads, many.solver_threads) == (1, many.threads_per_worker) == (1, 12)
    for alone, shared in zip(one.stages, many.stages, strict=True):
        assert alone.waves == shared.waves
        assert alone.memory.items == shared.memory.items  # a card's worker solves on its host
        more = shared.memory.host_items["solver workspace"] - alone.memory.host_items["solver workspace"]
        tile = 2048 * 28672 * 5 if "precision_recovery" in ptq else 0  # float32 and int8
        assert more >= 11 * (tile + (16 << 20))
        assert shared.memory.host_peak == alone.memory.host_peak + more


def test_a_worker_observes_and_solves_one_after_the_other(large: CheckpointReader) -> None:
    """Its peak is the larger of both: partial sums of several blocks, or one sum beside what the solve takes."""
    settings = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "layers_per_wave": 1, "device": "cpu"}
    facts = ClusterFacts(num_cpus=1, num_npus=0, memory_bytes=4096 * GIB)
    by_blocks = {
        blocks: planned(large, recipe(ptq=W4_AWQ_GPTQ, calibration={"reduction_blocks": blocks}, **settings), facts)
        .stages[0]
        .memory
        for blocks in (1, 2, 8, 64)
    }
    one, few, many, most = by_blocks.values()
    assert one.items["solver workspace"] > one.items["statistics"] > 0
    # Blocks are merged as they end: two of them, or four where there are eight, stand beside each other.
    assert few.items == one.items
    assert (many.items["statistics"], many.items["solver workspace"]) == (4 * one.items["statistics"], 0)
    assert most.items["statistics"] == 7 * one.items["statistics"]
    assert one.peak == few.peak < many.peak < most.peak


@given(num_samples=st.integers(1, 300), exponent=st.integers(0, 6))
def test_fewer_blocks_than_asked_sum_in_the_same_order(num_samples: int, exponent: int) -> None:
    """Where there are fewer micro-batches than reduction blocks, each block that holds one stays a block of its own."""
    asked = recipe(calibration={"num_samples": num_samples, "reduction_blocks": 1 << exponent}).calibration

    def tree(blocks: list[tuple[int, int]]) -> Any:
        filled: list[Any] = [block if block[0] < block[1] else None for block in blocks]
        while len(filled) > 1:
            pairs = zip(filled[::2], filled[1::2], strict=True)
            filled = [left if right is None else right if left is None else (left, right) for left, right in pairs]
        return filled[0]

    assert asked.num_blocks <= asked.reduction_blocks
    full, fewer = (block_bounds(asked.num_micro_batches, n) for n in (asked.reduction_blocks, asked.num_blocks))
    assert tree(full) == tree(fewer)
    assert asked.num_blocks < 2 * asked.num_micro_batches


@pytest.mark.parametrize("device", ["cpu", "ascend"])
def test_no_more_threads_solve_than_memory_has_room_for(large: CheckpointReader, device: str) -> None:
    """With less memory fewer threads solve: as many as fit, and one before a job is refused or takes more waves."""
    settings = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "layers_per_wave": 1, "device": device}
    config = recipe(ptq=W4_AWQ_GPTQ, calibration=ONE_BLOCK, **settings)
    npus = 1 if device == "ascend" else 0

    def on(memory_bytes: int, num_cpus: int = 20) -> CalibrationPlan:
        return planned(large, config, ClusterFacts(num_cpus=num_cpus, num_npus=npus, memory_bytes=memory_bytes))

    def peak(plan: CalibrationPlan) -> int:
        return plan.stages[0].memory.host_peak

    ample = on(4096 * GIB)
    least = peak(on(4096 * GIB, num_cpus=1))
    assert ample.solver_threads == 20
    seen = []
    for total in range(least, peak(ample) + 4 * GIB, 2 * GIB):
        plan = on(int(total / 0.8) + 4096)
        assert plan.threads_per_worker == 20
        assert peak(plan) <= total + 4096
        assert plan.stages[0].waves == ample.stages[0].waves
        seen.append(plan.solver_threads)
    assert seen[0] == 1
    assert seen[-1] == 20
    assert seen == sorted(seen)
    assert len(set(seen)) > 4


def test_auto_sizes_use_the_machine(tiny: CheckpointReader) -> None:
    """On two cores one worker of two threads is nearly as fast as two workers, and takes half their memory.

    With many cores replicas are faster than threads.
    """
    plan = planned(tiny, recipe(), LAPTOP)
    assert (plan.num_workers, plan.threads_per_worker, plan.device) == (1, 2, "cpu")
    assert plan.memory_per_worker == int(24 * GIB * 0.8)
    many = planned(tiny, recipe(), BIG_HOST)
    assert many.num_workers > 4
    assert many.num_workers * many.threads_per_worker == 64


def test_auto_never_refuses_what_a_smaller_choice_of_its_own_fits(large: CheckpointReader) -> None:
    """Two replicas of a wide layer do not fit this machine and one does: it is taken without being asked for."""
    wide = {"device": "cpu", "pipeline_parallel_size": 1, "layers_per_wave": 1, "threads_per_worker": 1}
    few = {"num_samples": 8}

    def on(num_cpus: int, memory: int, **parallel: Any) -> CalibrationPlan:
        facts = ClusterFacts(num_cpus=num_cpus, num_npus=0, memory_bytes=memory)
        return planned(large, recipe(calibration=few, **wide, **parallel), facts)

    def fits(memory: int) -> bool:
        try:
            return on(1, memory).data_parallel_size == 1
        except PlanError:
            return False

    least = GIB * bisect.bisect_left(range(200), True, key=lambda size: fits(size * GIB))
    with pytest.raises(PlanError):
        on(2, least, data_parallel_size=2)
    plan = on(2, least)
    assert plan.data_parallel_size == 1


def test_auto_sizes_use_all_cards(large: CheckpointReader) -> None:
    """A cluster with cards is used, in stages that need one pass."""
    plan = planned(large, recipe(), ClusterFacts(num_cpus=192, num_npus=16, memory_bytes=2048 * GIB))
    assert plan.device == "ascend"
    assert plan.num_workers == 16
    assert all(len(stage.waves) == 1 and stage.resident for stage in plan.stages)


def test_auto_sizes_ask_for_few_cards_where_the_cluster_is_unknown(large: CheckpointReader) -> None:
    """Planned on a laptop for cards elsewhere, the job gets the fewest that hold it in one pass."""
    plan = planned(large, recipe(device="ascend"))
    with pytest.raises(PlanError):
        planned(
            large,
            recipe(device="ascend", pipeline_parallel_size=plan.pipeline_parallel_size - 1, layers_per_wave=80),
        )


def test_auto_replicas_never_stand_idle(tiny: CheckpointReader) -> None:
    """With three micro-batches there are at most three replicas, and each has one."""
    calibration = {"num_samples": 3, "sequence_length": 2048}
    plan = planned(tiny, recipe(calibration=calibration, pipeline_parallel_size=1), BIG_HOST)
    assert all(len(plan.micro_batches_of(replica)) for replica in range(plan.data_parallel_size))
    assert plan.data_parallel_size <= 3


def test_a_host_too_small_for_its_cards_is_refused(large: CheckpointReader) -> None:
    """Partial sums of cards lie on the host, whose memory is checked where it is known."""
    cards = {"pipeline_parallel_size": 8, "data_parallel_size": 2}
    planned(large, recipe(**cards), ClusterFacts(num_cpus=192, num_npus=16, memory_bytes=2048 * GIB))
    facts = ClusterFacts(num_cpus=192, num_npus=16, memory_bytes=128 * GIB)
    with pytest.raises(PlanError, match=r"needs .* of host memory"):
        planned(large, recipe(gram="on", **cards), facts)


def test_quantized_propagation_solves_layer_by_layer(tiny: CheckpointReader) -> None:
    """Each layer is a wave of its own."""
    plan = planned(tiny, recipe(propagation="quantized", pipeline_parallel_size=1, data_parallel_size=1))
    assert plan.stages[0].waves == ((0,), (1,), (2,), (3,), (4,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_parallel_size": 6}, r"pipeline_parallel_size is 6 and the model has 5 decoder layers: set it to 5"),
        ({"data_parallel_size": 9}, r"data_parallel_size is 9 and the samples form 8 blocks: set it to 8 or less"),
        (
            {"data_parallel_size": 8, "calibration": {"num_samples": 2}},
            r"data_parallel_size is 8 and there are 2 micro-batches .* set it to 2",
        ),
        ({"threads_per_worker": 2, "pipeline_parallel_size": 2}, r"threads_per_worker is 2, .* set it to 1"),
        ({"propagation": "quantized", "layers_per_wave": 2}, r"layers_per_wave is 2 and propagation is quantized"),
        ({"ptq": {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 256}},
         r"layers.0.self_attn.q_proj: 64 input channels do not divide into groups of 256: set group_size: 64"),
        ({"ptq": {}, "layer_policies": {"lm_head": {"act_quant_dtype": "int8"}}}, r"lm_head, which is always carried"),
        ({"layer_policies": {".*v_proj": None}}, r"layers.0.self_attn.q_proj, .*read one activation, which smooth"),
        (
            {"ptq": {"kvcache_quant_dtype": "int8"}, "layer_policies": {".*v_proj": None}},
            r"k_proj and v_proj differ in kvcache_quant_dtype",
        ),
    ],
)  # fmt: skip
def test_sizes_and_policies_that_contradict_the_model_are_refused(
    tiny: CheckpointReader, settings: dict[str, Any], message: str
) -> None:
    """Each refusal names the setting, what was found and a value that would do."""
    with pytest.raises(PlanError, match=message):
        planned(tiny, recipe(**{"data_parallel_size": 1, **settings}))


def test_policies_that_match_nothing_or_twice_are_refused(tiny: CheckpointReader) -> None:
    """Silently quantising something else is not an option."""
    with pytest.raises(UserError, match="matches no linear of the model"):
        planned(tiny, recipe(layer_policies={"q_proj": None}))
    with pytest.raises(PolicyConflictError, match="matching same layer"):
        planned(tiny, recipe(layer_policies={".*q_proj": None, ".*layers.0.*": None}))
    with pytest.raises(UserError, match=r"leave every linear .* unquantised"):
        planned(tiny, recipe(layer_policies={".*layers.*": None}, ptq={}))


def test_the_head_is_carried_over_and_said_so(tiny: CheckpointReader) -> None:
    """A policy for all linears does not reach lm_head, and the plan notes it."""
    plan = planned(tiny, recipe(ptq={"weight_quant_dtype": "int8"}))
    assert plan.policies["lm_head"] is None
    assert plan.notes == ("lm_head is carried over as it is; add it to ptq.opname_blacklist to say so in the recipe",)
    assert planned(tiny, recipe()).notes == ()


def test_a_missing_tensor_is_named(tiny: CheckpointReader) -> None:
    """Headers must hold what config.json implies."""
    tensors = {name: info for name, info in tiny.tensors.items() if not name.endswith("4.mlp.up_proj.weight")}
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.4\.mlp\.up_proj\.weight"):
        make_plan(recipe(), tiny.architecture, tensors, LAPTOP)


def test_keys_and_values_are_observed_where_their_cache_is_scaled(tiny: CheckpointReader) -> None:
    """A static KV cache needs the ranges of keys and values; a dynamic one needs nothing."""
    static = planned(tiny, recipe(ptq={"kvcache_quant_dtype": "int8"}))
    assert {"key", "value"} <= set(static.layer_settings(0))
    dynamic = planned(tiny, recipe(ptq={"kvcache_quant_dtype": "int8", "kvcache_quant_granularity": "per_token"}))
    assert not {"key", "value"} & set(dynamic.layer_settings(0))


@given(size=st.integers(0, 1 << 50))
def test_bytes_are_printed_near_their_size(size: int) -> None:
    """The printed number times its unit is the size, to a twentieth of the unit."""
    number, unit = format_bytes(size).split()
    scale = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert abs(float(number) * scale - size) <= 0.051 * scale


def test_a_cluster_says_what_it_lacks() -> None:
    """What a job will have to wait for is known before it waits."""
    cluster = ClusterFacts(num_cpus=8, num_npus=2, memory_bytes=GIB)
    assert cluster.lacking(cpus=8, npus=2) == ""
    assert cluster.lacking(cpus=4, npus=8) == "2 of 8 NPU"
    assert cluster.lacking(cpus=16, npus=8) == "8 of 16 CPU, 2 of 8 NPU"


NODES = {"cpus": 160, "npus": 8, "memory": 768 * GIB}
W4A16 = {
    "weight_quant_dtype": "qint4x2",
    "weight_quant_granularity": "per_group",
    "group_size": 128,
    "outliers_suppression": "awq",
    "precision_recovery": "gptq",
    "algo_args": {"desc_act": True, "static_groups": True},
    "opname_blacklist": ["lm_head"],
}
CARDS = {"pipeline_parallel_size": 8, "data_parallel_size": 2, "memory_per_worker": "60GiB", "device": "ascend"}


def described(device: str = "ascend", **changes: Any) -> ClusterFacts | None:
    return ClusterFacts.described(**{"num_nodes": None, **NODES, "device": device, **changes})


def test_a_described_cluster_holds_its_nodes_together() -> None:
    """Totals over the nodes, one of which is meant where no number is given; nothing said describes nothing."""
    assert described(num_nodes=2) == ClusterFacts(
        num_cpus=320, num_npus=16, memory_bytes=1536 * GIB, num_nodes=2
    )  # fmt: skip
    assert described() == ClusterFacts(num_cpus=160, num_npus=8, memory_bytes=768 * GIB)
    assert described("cpu", npus=None) == ClusterFacts(num_cpus=160, num_npus=0, memory_bytes=768 * GIB)
    assert described(cpus=None, npus=None, memory=None) is None


@pytest.mark.parametrize(
    ("device", "changes", "message"),
    [
        ("ascend", {"npus": None}, "lacks --npus-per-node: waves"),
        ("auto", {"cpus": None, "npus": 8}, "lacks --cpus-per-node: waves"),
        ("ascend", {"num_nodes": 2, "cpus": None, "memory": None}, "lacks --cpus-per-node and --memory-per-node: "),
        ("ascend", {"npus": 0}, "parallel.device is ascend and --npus-per-node is 0: give the cards of a node, or "),
    ],
)
def test_part_of_a_description_describes_nothing(device: str, changes: dict[str, Any], message: str) -> None:
    """All that is missing is named at once, and what contradicts the recipe."""
    with pytest.raises(UserError, match=message):
        described(device, **changes)


def test_waves_are_those_that_the_nodes_memory_allows(large: CheckpointReader) -> None:
    """Waves that the cards alone would allow shrink until eight workers fit their node, and no further."""
    config = recipe(ptq=W4A16, gram="on", **CARDS)
    unknown = planned(large, config)
    assert max(len(wave) for stage in unknown.stages for wave in stage.waves) > 1
    assert (unknown.host_memory, unknown.nodes_known) == (None, False)
    for memory, waves in ((768, 10), (1024, 5)):
        plan = planned(large, config, described(num_nodes=2, memory=memory * GIB) or LAPTOP)
        assert {len(stage.waves) for stage in plan.stages} == {waves}
        assert plan.threads_per_worker == 20
        assert plan.host_memory == int(0.8 * memory * GIB) // 8
        assert plan.host_peak <= plan.host_memory
        assert plan.nodes_known


def test_nodes_too_small_are_refused_with_a_size_that_would_do(large: CheckpointReader) -> None:
    """The memory named is enough, and a GiB less is not."""
    config = recipe(ptq=W4A16, gram="on", **CARDS)
    with pytest.raises(PlanError) as caught:
        planned(large, config, described(num_nodes=2, memory=548 * GIB) or LAPTOP)
    assert "of host memory a worker and the cluster has 54.8 GiB for each" in str(caught.value)
    (size,) = map(int, re.findall(r"nodes of (\d+) GiB of memory each", str(caught.value)))
    planned(large, config, described(num_nodes=2, memory=size * GIB) or LAPTOP)
    with pytest.raises(PlanError):
        planned(large, config, described(num_nodes=2, memory=(size - 1) * GIB) or LAPTOP)


def test_a_node_may_be_given_all_workers_that_it_has_cards_for(large: CheckpointReader) -> None:
    """Eight workers of few threads may come to lie on one of two nodes; cores for all on both keep them apart."""
    config = {**CARDS, "data_parallel_size": 1}
    nodes = described(num_nodes=2) or LAPTOP
    assert planned(large, recipe(**config), nodes).host_memory == int(0.8 * 768 * GIB) // 4
    assert planned(large, recipe(**config), nodes).threads_per_worker == 40
    assert planned(large, recipe(**config, threads_per_worker=20), nodes).host_memory == int(0.8 * 768 * GIB) // 8


@given(num_nodes=st.integers(1, 5), cpus=st.integers(1, 64), npus=st.integers(1, 8), num_workers=st.integers(1, 40))
def test_threads_leave_room_for_every_worker_on_some_node(
    num_nodes: int, cpus: int, npus: int, num_workers: int
) -> None:
    """Where cards and cores suffice, the cores of no worker are spread over two nodes, and no node gets too many."""
    facts = ClusterFacts(num_cpus=num_nodes * cpus, num_npus=num_nodes * npus, memory_bytes=GIB, num_nodes=num_nodes)
    threads = threads_of(recipe(device="ascend"), DeviceKind.ASCEND, facts, num_workers)
    beside = facts.workers_per_node(num_workers, threads=threads, npus=1)
    assert 1 <= beside <= npus
    if num_workers <= num_nodes * min(npus, cpus):
        assert facts.room(threads=threads, npus=1) >= num_workers
        assert beside * threads <= cpus
        assert beside * num_nodes >= num_workers


def probing(**changes: Any) -> Any:
    return recipe(**{"device": "ascend", "data_parallel_size": 1, "max_perplexity_increase": 0.05, **changes})


def test_the_plan_says_what_a_probe_needs(large: CheckpointReader) -> None:
    """Weights of ten layers, the head, one micro-batch's logits at a time; nothing is said where nothing is probed."""
    settings = {"pipeline_parallel_size": 8, "memory_per_worker": "60GiB"}
    (note,) = [note for note in planned(large, probing(**settings)).notes if "probed" in note]
    assert "probed on 8 samples: " in note
    size = float(note.split(": ")[1].split(" GiB")[0])
    layer = 2 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192 + 2 * 8192)
    head = 2 * 128256 * 8192
    assert (10 * layer + head) / GIB < size < (10 * layer + head) / GIB + 6
    plain = planned(large, probing(**settings, max_perplexity_increase=None))
    assert not [note for note in plain.notes if "probed" in note]


def test_a_probe_takes_as_many_layers_at_a_time_as_fit(large: CheckpointReader) -> None:
    """The fewest loads whose layers fit; the plan says how many, and how often the weights are read for it."""
    settings: dict[str, Any] = {"pipeline_parallel_size": 2, "memory_per_worker": "30GiB"}
    plan = planned(large, probing(**settings))
    layer = 2 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192 + 2 * 8192)
    (note,) = [note for note in plan.notes if "probed" in note]
    for stage, groups in zip(plan.stages, plan.probe_stages, strict=True):
        assert [i for first, end in groups for i in range(first, end)] == list(stage.layers)
        most = max(end - first for first, end in groups)
        assert most * layer < 30 * GIB < -(-40 // (len(groups) - 1)) * layer + 6 * GIB
        assert f"up to {most} of a stage's layers in memory at a time" in note
    assert float(note.split(": ")[1].split(" GiB")[0]) <= 30
    weights = f"the float model's weights ({format_bytes(80 * layer)}) are read"
    assert f"{weights} up to 17 times (once a token of probe.max_new_tokens, which 0 leaves out)" in note
    assert note.endswith("those of the published model twice")
    two = planned(large, probing(**settings, probe={"max_new_tokens": 0}, format=["compressed-tensors", "ascend"]))
    assert f"{weights} once, those of each of the 2 published models once" in two.notes[-1]
    assert planned(large, probing(pipeline_parallel_size=2, memory_per_worker="100GiB")).probe_stages == (
        ((0, 40),),
        ((40, 80),),
    )
    assert planned(large, probing(**settings, max_perplexity_increase=None)).probe_stages == ()


@pytest.mark.parametrize("device", DeviceKind)
def test_hidden_states_kept_between_layers_are_planned_for(large: CheckpointReader, device: DeviceKind) -> None:
    """Of every micro-batch, in host memory and to the byte; none where a stage holds all its layers."""
    shape = evaluation_shape(large.architecture, device, probing().probe_data, max_in_flight=2)

    def peak(num_micro_batches: int, limit: int) -> int:
        groups = choose_groups(
            shape,
            range(10),
            embeds=True,
            last=False,
            num_micro_batches=num_micro_batches,
            limit=limit,
            host_limit=None,
        )
        assert groups.most_layers == (1 if limit == 1 else 10)
        return groups.memory.host_peak

    assert peak(64, 1) - peak(16, 1) == 48 * 2048 * 8192 * (4 if device.on_host else 2)
    assert peak(64, 1 << 50) == peak(16, 1 << 50)


@pytest.mark.seconds
def test_a_probe_of_which_no_layer_fits_is_refused_before_a_weight_is_read(large: CheckpointReader) -> None:
    """One-layer waves take the model through a small card, a probe holds the head, too; each value named would do."""
    settings: dict[str, Any] = {"pipeline_parallel_size": 1, "memory_per_worker": "7GiB", "gram": "off"}
    planned(large, probing(**settings, max_perplexity_increase=None))
    with pytest.raises(PlanError) as refused:
        planned(large, probing(**settings))
    text = str(refused.value)
    assert "with one layer in memory at a time stage 0 of 1 needs 7." in text
    assert "memory_per_worker is 7.0 GiB; the largest item is weights, " in text
    (size,) = re.findall(r"parallel\.memory_per_worker: (\d+GiB)", text)
    assert "pipeline_parallel_size" not in text, "the last stage holds head and layer whatever their number"
    planned(large, probing(**{**settings, "memory_per_worker": size}))
    assert "max_perplexity_increase: null" in text


def test_a_searched_strength_of_smoothquant_is_planned_with_the_sketches_it_reads(large: CheckpointReader) -> None:
    """The search multiplies with both sketches, whether weights are clipped or not; one given strength with none."""

    def solver(**changes: Any) -> int:
        ptq = {"act_quant_dtype": "int8", "outliers_suppression": "smooth", "weight_clip": False, **changes}
        return max(make_workload(recipe(ptq=ptq), large.architecture, large.tensors).solver_bytes(1))

    channels = max(layer_input.channels for layer_input in large.architecture.inputs(0))
    factor = 4 * channels * (256 + 1)  # rows of a sketch, and the mean
    assert solver() - solver(algo_args={"alpha": 0.5}) >= 2 * factor
    assert solver(weight_clip=True) > solver()
