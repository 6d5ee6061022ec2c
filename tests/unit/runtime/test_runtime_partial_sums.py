"""What replicas send to a layer's owner is checked before it is merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from runs import published_hashes, run_inline, small_recipe
from workers import InlineWorkerGroup

from gs_dist.checkpoint.lineage import checksum_of
from gs_dist.errors import CheckpointError, LayerError
from gs_dist.model.statistics import InputStatistics, TreeNode
from gs_dist.runtime.attempt import MakeGroup
from gs_dist.runtime.partial_sums import PartialSums, check_partial_sums
from gs_dist.runtime.stage_worker import Job, StageWorker

BLOCKS = [(0, 3), (3, 6), (6, 6), (6, 8)]
CHANNELS = 4


def sums(replica: int, start: int, stop: int, blocks: list[int], **more: Any) -> PartialSums:
    rng = np.random.default_rng(replica)
    nodes = [
        TreeNode(
            level=0,
            index=block,
            statistics={
                "mlp_input": InputStatistics(
                    num_tokens=7,
                    minimum=rng.random(CHANNELS, np.float32),
                    maximum=rng.random(CHANNELS, np.float32),
                    sum_abs=rng.random(CHANNELS),
                    sum_squares=rng.random(CHANNELS),
                    gram=rng.random((CHANNELS, CHANNELS), np.float32),
                )
            },
        )
        for block in blocks
    ]
    weights = {4: "11", 5: "12"}
    return PartialSums(
        **{"layer": 5, "replica": replica, "start": start, "stop": stop, "weights": weights, "nodes": nodes} | more
    ).sealed()


def check(own: PartialSums, *others: PartialSums) -> None:
    check_partial_sums(own, others, BLOCKS, prefix="model.layers.5")


def test_whole_partial_sums_pass_in_any_order() -> None:
    """Ranges need not come in order; an empty block and a replica without micro-batches are nothing to complain of."""
    check(sums(1, 3, 8, [1, 3]), sums(2, 8, 8, []), sums(0, 0, 3, [0]))
    check(sums(0, 0, 8, [0, 1, 3]))


@pytest.mark.parametrize("name", ["minimum", "sum_abs", "gram"])
def test_a_flipped_bit_is_told_with_layer_replica_and_node(name: str) -> None:
    """Any array that is not what its sender had is noticed."""
    sent = sums(1, 3, 8, [1, 3], node="node-b")
    getattr(sent.nodes[1].statistics["mlp_input"], name).reshape(-1).view(np.uint8)[5] ^= 1
    with pytest.raises(LayerError, match=r"model\.layers\.5: .* replica 1 \(node node-b\) were damaged .*checksum"):
        check(sums(0, 0, 3, [0]), sent)


@pytest.mark.parametrize(
    "change", [{"start": 2}, {"replica": 7}, {"weights": {}}, {"nodes": []}], ids=lambda change: next(iter(change))
)
def test_what_goes_with_the_sums_is_under_the_checksum_too(change: dict[str, Any]) -> None:
    """Range, replica, weights and number of nodes cannot change on the way either."""
    with pytest.raises(LayerError, match="damaged"):
        check(sums(0, 0, 3, [0]), replace(sums(1, 3, 8, [1, 3]), **change))


def test_other_weights_are_told_with_the_layer_that_differs_and_both_nodes() -> None:
    """A layer that was only run on the way to the observed one counts as well."""
    other = sums(1, 3, 8, [1, 3], weights={4: "99", 5: "12"}, node="node-b")
    with pytest.raises(CheckpointError, match=r"layer 4 differ .* 1 \(node node-b, .* is another\. .*storage"):
        check(sums(0, 0, 3, [0], node="node-a"), other)


@pytest.mark.parametrize(
    ("own", "other", "says"),
    [
        ((0, 3, [0]), (6, 8, [3]), "micro-batches 3 to 5 are in none .*replica 0 and replica 1"),
        ((3, 6, [1]), (6, 8, [3]), "micro-batches 0 to 2 are in none"),
        ((0, 3, [0]), (3, 6, [1]), "micro-batches 6 to 7 are in none"),
        ((0, 6, [0, 1]), (3, 8, [1, 3]), "overlapping .*replica 0 and replica 1"),
        ((0, 3, [0]), (3, 8, [3]), r"replica 1 ran micro-batches \[3, 8\), .* blocks \[1, 3\], .* blocks \[3\]"),
    ],
)
def test_ranges_must_cover_every_micro_batch_once(own: Any, other: Any, says: str) -> None:
    """A gap, an overlap, and sums that are not of the range they claim are told apart."""
    with pytest.raises(LayerError, match=says):
        check(sums(0, *own), sums(1, *other))


def test_a_checksum_does_not_depend_on_how_an_array_lies_in_memory() -> None:
    """Fortran order and strides give the sum of the same values in C order; dtype, shape and name count."""
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = checksum_of({"a": array})
    assert checksum_of({"a": np.asfortranarray(array)}) == expected
    assert checksum_of({"a": np.repeat(array, 2, axis=1)[:, ::2]}) == expected
    others = [{"b": array}, {"a": array.reshape(6, 4)}, {"a": array.view(np.int32)}, {"a": array + 1}]
    assert len({expected, *map(checksum_of, others)}) == 1 + len(others)
    half = array.astype(ml_dtypes.bfloat16)
    assert checksum_of({"a": half}) != checksum_of({"a": half.view(np.uint16)})


class _FlipsABit(StageWorker):
    def partial_sums(self, layer: int) -> PartialSums | None:
        sent = super().partial_sums(layer)
        assert sent is not None
        sent.nodes[0].statistics["mlp_input"].sum_abs.view(np.uint8)[3] ^= 1
        return sent


class _SendsNothing(StageWorker):
    def partial_sums(self, layer: int) -> PartialSums | None:
        super().partial_sums(layer)
        return None


def _group_of(second: Callable[[Job, int, int], StageWorker]) -> MakeGroup:
    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        def make(stage: int, replica: int) -> StageWorker:
            return (second if replica else StageWorker)(job, stage, replica)

        return InlineWorkerGroup(make, num_stages=1, num_replicas=2)

    return make_group


@pytest.mark.parametrize(
    ("second", "says"),
    [(_FlipsABit, r"model\.layers\.0: .* replica 1 .* damaged"), (_SendsNothing, "micro-batches 5 to 9 are in none")],
)
def test_a_job_whose_partial_sums_are_not_whole_publishes_nothing(tmp_path: Path, second: Any, says: str) -> None:
    """The owner refuses them before the layer is solved."""
    config = small_recipe(tmp_path, num_layers=1, parallel={"data_parallel_size": 2})
    with pytest.raises(LayerError, match=says):
        run_inline(config, _group_of(second))
    assert published_hashes(config) == {}


def test_a_replica_with_another_copy_of_the_model_is_noticed(tmp_path: Path) -> None:
    """One weight that differs, far from what a checkpoint's fingerprint looks at, ends the job as a user's error."""
    config = small_recipe(tmp_path, num_layers=2, parallel={"data_parallel_size": 2})
    other = tmp_path / "other"
    shutil.copytree(config.model, other)
    _change_a_weight(other / "model.safetensors", "model.layers.1.mlp.up_proj.weight")

    def second(job: Job, stage: int, replica: int) -> StageWorker:
        changed = job.config.model_copy(update={"model": str(other)})
        return StageWorker(replace(job, config=changed), stage, replica)

    with pytest.raises(CheckpointError, match=r"model\.layers\.1: the weights of layer 1 differ .* is another"):
        run_inline(config, _group_of(second))
    assert not any("layer-00001" in name for name in published_hashes(config))


def _change_a_weight(path: Path, name: str) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + begin + 2] ^= 1
    path.write_bytes(bytes(data))
