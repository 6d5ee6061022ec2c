"""Plans of the largest mixtures, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import header_only_checkpoint

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import PlanError
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import make_plan
from gs_dist.recipe.config import CalibrationConfig

DYNAMIC = {
    "weight_quant_dtype": "int8",
    "act_quant_dtype": "int8",
    "act_quant_granularity": "per_token",
    "outliers_suppression": "smooth",
    "opname_blacklist": ["lm_head"],
}


def recipe(**parallel: Any) -> CalibrationConfig:
    return CalibrationConfig.model_validate(
        {
            "model": "m",
            "output": "o",
            "calibration": {"data": "d", "num_samples": 512, "sequence_length": 2048},
            "ptq": DYNAMIC,
            "parallel": {"device": "ascend", **parallel},
            "format": ["ascend"],
        }
    )


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "billions", "linears"),
    [
        ("qwen3-235b-a22b", 235.09, 94 * (4 + 1 + 3 * 128) + 1),
        pytest.param(
            "deepseek-v3", 671.03, 61 * 5 + 3 * 3 + 58 * (1 + 3 * 256 + 3) + 1, marks=pytest.mark.slow(reason="10 s")
        ),
    ],
)
def test_two_nodes_of_eight_cards_hold_the_largest_mixtures(
    name: str, billions: float, linears: int, tmp_path: Path
) -> None:
    """No card is above its memory; one that holds no layer is refused with the setting to change."""
    reader = CheckpointReader(header_only_checkpoint(tmp_path / "m", name))
    further = dict(reader.architecture.carried)
    run = [info for name, info in reader.tensors.items() if name not in further]
    parameters = sum(info.nbytes / (4 if info.dtype == "float32" else 2) for info in run)
    assert parameters / 1e9 == pytest.approx(billions, abs=0.01)
    cluster = ClusterFacts.described(num_nodes=2, npus=8, cpus=160, memory=896 << 30, device="ascend")
    assert cluster is not None
    plan = make_plan(recipe(), reader.architecture, reader.tensors, cluster)
    assert plan.pipeline_parallel_size * plan.data_parallel_size <= 16
    assert len(plan.policies) == linears
    mlp = reader.architecture.layers[-1].mlp
    assert plan.tokens_of_experts == {(mlp.num_experts, 8): 512 * 2048 * 8 // mlp.num_experts}
    assert all(stage.memory.peak <= 60 << 30 for stage in plan.stages)
    with pytest.raises(PlanError, match="memory_per_worker"):
        make_plan(recipe(memory_per_worker="4GiB"), reader.architecture, reader.tensors, cluster)
