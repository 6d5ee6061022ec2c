"""Every algorithm through the whole job: the same bytes on any layout and after a loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from runs import inline_group, published_hashes, run_inline, small_recipe
from workers import InlineWorkerGroup

from gs_dist.recipe.config import CalibrationConfig
from gs_dist.results.summary import read_summary
from gs_dist.runtime.stage_worker import Job, StageWorker
from gs_dist.runtime.workers import WorkerKey

NUM_LAYERS = 4

W4 = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}
W8A8 = {"weight_quant_dtype": "int8", "act_quant_dtype": "int8"}
FEW = {"algo_args": {"smooth_alpha": [0.5, 0.65, 0.8]}}
TWO_PASSES = {"algo_args": {"desc_act": True, "static_groups": True}}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "W8-perchannel": {"weight_quant_dtype": "int8"},
    "SmoothQuant-wclip-W8-perchannel-A8-pertensor": {**W8A8, "outliers_suppression": "smooth"},
    "SmoothQuant-W8-perchannel-A8-pertoken": {
        **W8A8,
        "outliers_suppression": "smooth",
        "act_quant_granularity": "per_token",
    },
    "OSL-wclip-W8-perchannel-A8-pertensor": {**W8A8, **FEW, "outliers_suppression": "outlier-suppression-lite"},
    "OutlierSuppressionPlus-wclip-W8-perchannel-A8-pertensor": {
        **W8A8,
        **FEW,
        "outliers_suppression": "outlier-suppression+",
    },
    "W4-pergroup": {**W4, "weight_symmetric": False},
    "AWQ-wclip-W4-pergroup": {**W4, "outliers_suppression": "awq"},
    "GPTQ-W4-pergroup": {**W4, "precision_recovery": "gptq"},
    "AWQ-wclip-GPTQ-W4-pergroup": {**W4, **TWO_PASSES, "outliers_suppression": "awq", "precision_recovery": "gptq"},
    "GPTQ-W4-pergroup-A8-pertoken": {
        **W4,
        **TWO_PASSES,
        "precision_recovery": "gptq",
        "act_quant_dtype": "int8",
        "act_quant_granularity": "per_token",
    },
}
KV_CACHE = {"weight_quant_dtype": "int8", "kvcache_quant_dtype": "int8"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("algorithms")


def _recipe(directory: Path, name: str, ptq: dict[str, Any], **parallel: int) -> CalibrationConfig:
    # Fewer rows than the model's narrowest input has channels, so that every input is sketched.
    rest = {"max_relative_error": None, "sketch_rows": 16}
    return small_recipe(directory, name, num_layers=NUM_LAYERS, ptq=ptq, parallel=parallel, **rest)


def _hashes(directory: Path, name: str, ptq: dict[str, Any], pp: int, dp: int) -> dict[str, str]:
    config = _recipe(directory, f"{name}-{pp}-{dp}", ptq, pipeline_parallel_size=pp, data_parallel_size=dp)
    run_inline(config)
    return published_hashes(config)


def _hashes_after_a_loss(directory: Path, name: str, ptq: dict[str, Any]) -> dict[str, str]:
    """Two replicas, of which one dies when its stage's second layer is solved; then new ones."""
    config = _recipe(directory, f"{name}-loss", ptq, pipeline_parallel_size=2, data_parallel_size=2, layers_per_wave=1)
    attempts: list[InlineWorkerGroup] = []

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        solved: list[WorkerKey] = []

        def loses_worker_at(key: WorkerKey, method: str) -> bool:
            solved.extend([key] if method == "solve" else [])
            return len(solved) > NUM_LAYERS // 2

        lossy = InlineWorkerGroup(
            partial(StageWorker, job), num_stages=2, num_replicas=2, loses_worker_at=loses_worker_at
        )
        attempts.append(inline_group(job, min_replicas) if attempts else lossy)
        return attempts[-1]

    run_inline(config, make_group)
    counts = [sum(method == "solve" for _, method in group.calls) for group in attempts]
    assert len(counts) == 2, "the loss came"
    assert 0 < counts[1] < NUM_LAYERS, "layers finished before the loss were kept, the others solved again"
    return published_hashes(config)


@pytest.mark.parametrize("strategy", ALGORITHMS)
def test_every_algorithm_publishes_the_same_bytes_on_any_layout_and_after_a_loss(
    directory: Path, strategy: str
) -> None:
    """1 x 1 to 4 x 2 workers publish the same bytes, also after a loss; the summary names the algorithm."""
    ptq = ALGORITHMS[strategy]
    one = _hashes(directory, strategy, ptq, 1, 1)
    for pp, dp in ((2, 1), (2, 2), (1, 4), (3, 1), (4, 2)):
        assert _hashes(directory, strategy, ptq, pp, dp) == one, (pp, dp)
    assert _hashes_after_a_loss(directory, strategy, ptq) == one
    summary = read_summary(directory / f"{strategy}-1-1")
    assert {row.error_source for row in summary.rows} == {"sketch", "none"}
    strategies = summary.strategies
    assert strategies == {strategy: 7 * NUM_LAYERS, "NA": 1}


def test_a_quantized_cache_has_the_same_scales_on_any_layout_and_after_a_loss(directory: Path) -> None:
    """Scales of an int8 KV cache beside int8 weights do not depend on the layout either."""
    one = _hashes(directory, "cache", KV_CACHE, 1, 1)
    assert _hashes(directory, "cache", KV_CACHE, 2, 2) == one
    assert _hashes(directory, "cache", KV_CACHE, 4, 2) == one
    assert _hashes_after_a_loss(directory, "cache", KV_CACHE) == one
    assert read_summary(directory / "cache-1-1").strategies["C8-perchannel"] == NUM_LAYERS
