"""Advice: what to change for a linear, as an entry that a recipe takes."""

from __future__ import annotations

import re

import pytest
import yaml
from summaries import linear_row

from gs_dist.conversion.config import ConversionConfig
from gs_dist.conversion.schemes import find_scheme
from gs_dist.recipe.config import config_of
from gs_dist.recipe.presets import PRESETS
from gs_dist.report.advice import NEGLIGIBLE, advise, advise_converted
from gs_dist.results.quantized import LinearSummary


def row(role: str = "self_attn.k_proj", *, error: float = 0.02, **fields: object) -> LinearSummary:
    return linear_row(12, role, error, **fields)


def test_a_linear_that_loses_next_to_nothing_needs_nothing() -> None:
    """The worst ten of a good model are not trouble."""
    advice = advise(row(error=NEGLIGIBLE / 2))
    assert advice.entry is None
    assert advice.text.startswith("Nothing")


def test_an_expert_that_few_tokens_reached_needs_data_and_no_other_policy() -> None:
    """Its error is over tokens that were not its own."""
    advice = advise(row("mlp.experts.3.up_proj", num_given=3, num_tokens=512))
    assert advice.entry is None
    assert "calibration.num_samples" in advice.text


@pytest.mark.parametrize(
    ("strategy", "activation_error", "expected"),
    [
        ("W8-perchannel-A8-pertensor", 0.1, {"act_quant_granularity": "per_token"}),
        ("W8-perchannel-A8-pertoken", 0.1, {"act_quant_dtype": None, "act_quant_granularity": "per_tensor"}),
        ("W8-perchannel-A8-pertoken", 1e-4, None),
        ("W4-pergroup", None, {"precision_recovery": "gptq"}),
    ],
)
def test_what_costs_most_is_changed_first(strategy: str, activation_error: float | None, expected: object) -> None:
    """Scales for each token before floats, GPTQ before eight bits."""
    advice = advise(row(strategy=strategy, activation_error=activation_error))
    assert list(yaml.safe_load(advice.entry or "").values()) == [expected]


def test_an_entry_covers_what_engines_run_as_one_matrix() -> None:
    """q, k and v share a policy, and so do gate and up."""
    pattern = next(iter(yaml.safe_load(advise(row()).entry or "")))
    found = [
        name
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        if re.fullmatch(pattern, f"model.layers.12.self_attn.{name}")
    ]
    assert found == ["q_proj", "k_proj", "v_proj"]
    assert not re.match(pattern, "model.layers.1.self_attn.k_proj")


@pytest.mark.parametrize("preset", ["w8a8", "w8a8-dynamic", "w8a16", "w4a16", "w4a8"])
@pytest.mark.parametrize("activation_error", [1e-4, 0.1])
def test_every_entry_is_one_that_the_recipe_takes(preset: str, activation_error: float) -> None:
    """What the report says to write is not refused."""
    document = {
        "model": "/m",
        "output": "/o",
        "calibration": {"data": "a.parquet"},
        **PRESETS[preset].document([576, 1536]),
    }
    policy = config_of(document, source="test").network_policy
    entry = advise(row(strategy=policy.label, activation_error=activation_error)).entry
    assert entry is not None
    config_of({**document, "layer_policies": yaml.safe_load(entry)}, source="test")


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("W4-pergroup", "W8A16"),
        ("W4-perchannel-A8-pertoken", "W8A8_DYNAMIC"),
        ("W8-perchannel-A8-pertoken", None),
        ("WFP8-perchannel-AFP8-pertoken", None),
    ],
)
def test_what_a_conversion_is_told_its_recipe_takes(strategy: str, expected: str | None) -> None:
    """Schemes or null by pattern: settings of calibrated jobs are none of its keys."""
    entry = yaml.safe_load(advise_converted(row(strategy=strategy)).entry or "")
    assert list(entry.values()) == [expected]
    config = ConversionConfig(model="m", output="o", scheme="W4A16", layer_policies=entry)
    assert find_scheme(expected or "W4A16", None, "layer_policies").name
    assert config.layer_policies == entry


def test_a_conversion_that_lost_next_to_nothing_needs_nothing() -> None:
    """And a scheme without an eight-bit counterpart gets words alone."""
    assert advise_converted(row(error=NEGLIGIBLE / 2)).entry is None
    assert advise_converted(row(strategy="WMXFP4-pergroup-AMXFP4-pergroup")).entry is None
