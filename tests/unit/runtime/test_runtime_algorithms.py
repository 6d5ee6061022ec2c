"""Every algorithm through the whole job: the same bytes on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import published_hashes, run_inline, small_recipe

from gs_dist.summary import read_summary

W4 = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}
W8A8 = {"weight_quant_dtype": "int8", "act_quant_dtype": "int8"}
TWO_PASSES = {"algo_args": {"desc_act": True, "static_groups": True}}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "W8-perchannel": {"weight_quant_dtype": "int8"},
    "SmoothQuant-W8-perchannel-A8-pertensor": {**W8A8, "outliers_suppression": "smooth"},
    "SmoothQuant-W8-perchannel-A8-pertoken": {
        **W8A8,
        "outliers_suppression": "smooth",
        "act_quant_granularity": "per_token",
    },
    "OSL-wclip-W8-perchannel-A8-pertensor": {**W8A8, "outliers_suppression": "outlier-suppression-lite"},
    "OutlierSuppressionPlus-W8-perchannel-A8-pertensor": {**W8A8, "outliers_suppression": "outlier-suppression+"},
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


def _hashes(directory: Path, name: str, ptq: dict[str, Any], pp: int, dp: int) -> dict[str, str]:
    config = small_recipe(
        directory,
        f"{name}-{pp}-{dp}",
        num_layers=2,
        ptq=ptq,
        max_relative_error=None,
        parallel={"pipeline_parallel_size": pp, "data_parallel_size": dp},
    )
    run_inline(config)
    return published_hashes(config)


@pytest.mark.parametrize("strategy", ALGORITHMS)
def test_every_algorithm_publishes_the_same_bytes_on_any_layout(directory: Path, strategy: str) -> None:
    """1 x 1, 2 x 1, 2 x 2 and 1 x 4 workers publish the same bytes, and the summary names the algorithm."""
    ptq = ALGORITHMS[strategy]
    one = _hashes(directory, strategy, ptq, 1, 1)
    for pp, dp in ((2, 1), (2, 2), (1, 4)):
        assert _hashes(directory, strategy, ptq, pp, dp) == one, (pp, dp)
    strategies = read_summary(directory / f"{strategy}-1-1").strategies
    assert strategies == {strategy: 14, "NA": 1}


def test_a_quantised_cache_has_the_same_scales_on_any_layout(directory: Path) -> None:
    """Scales of an int8 KV cache beside int8 weights do not depend on the layout either."""
    one = _hashes(directory, "cache", KV_CACHE, 1, 1)
    assert _hashes(directory, "cache", KV_CACHE, 2, 2) == one
    assert read_summary(directory / "cache-1-1").strategies["C8-perchannel"] == 2
