"""The model card says what a directory is and nothing of the machine it was made on."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dialects
import pytest
import yaml
from checkpoints import tiny_config
from markdown_it import MarkdownIt

from gs_dist.checkpoint.check import EngineVerdict, Problem
from gs_dist.checkpoint.dialects.ascend.codec import AscendCodec
from gs_dist.checkpoint.dialects.compressed_tensors.codec import CompressedTensorsCodec
from gs_dist.checkpoint.dialects.golden_stick.codec import GoldenStickCodec
from gs_dist.checkpoint.model_card import card_texts, render_card, write_model_card
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.families import read_architecture
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import CalibrationSummary, PerplexitySummary

ARCHITECTURE = read_architecture(tiny_config(torch_dtype="bfloat16"))
STATIC = "SmoothQuant-W8-perchannel-A8-pertensor"


def render_model_card(
    config: CalibrationConfig,
    summary: CalibrationSummary,
    architecture: DecoderArchitecture,
    dialect: str,
    verdicts: Sequence[EngineVerdict] = (),
) -> str:
    """The card of a calibrated model."""
    return render_card(card_texts(config, summary, architecture), summary, architecture, dialect, verdicts)


def recipe(**changes: Any) -> CalibrationConfig:
    content: dict[str, Any] = {
        "model": "/home/someone/models/Tiny-1B",
        "output": "/home/someone/runs/tiny",
        "calibration": {"data": "s3://key:secret@bucket/calib.parquet?token=abc", "sequence_length": 64},
        "ptq": {"act_quant_dtype": "int8", "outliers_suppression": "smooth", "opname_blacklist": ["lm_head"]},
        "layer_policies": {r".*(up|down)_proj": {"act_quant_granularity": "per_token"}, ".*o_proj": None},
    }
    return CalibrationConfig.model_validate({**content, **changes})


def summary(strategy: str = STATIC, **changes: Any) -> CalibrationSummary:
    rows = tuple(
        LinearSummary(
            layer=layer,
            name=f"model.layers.{layer}.{linear.name}",
            strategy="NA" if linear.name.endswith("o_proj") else strategy,
            relative_error=None if linear.name.endswith("o_proj") else 0.001 * (number + 1) * (layer + 1),
            error_source="gram",
            scale_min=0.1,
            scale_max=0.2,
            num_tokens=64,
        )
        for layer in range(2)
        for number, linear in enumerate(ARCHITECTURE.linears(layer))
    )
    values: dict[str, Any] = {
        "model": "Tiny-1B",
        "formats": ("ascend",),
        "propagation": "original",
        "num_samples": 8,
        "num_tokens": 512,
        "seconds": 3.0,
        "versions": {"gs-dist": "0.1.0", "mindspore": "2.10.0"},
        "fingerprints": {"recipe": "aa" * 32, "source": "bb" * 32, "data": "cc" * 32},
        "rows": rows,
        "stages": (),
    }
    return CalibrationSummary(**{**values, **changes})


def test_nothing_of_the_machine_is_told() -> None:
    """Paths and URIs appear by their last part, without keys or hosts."""
    card = render_model_card(recipe(), summary(), ARCHITECTURE, "ascend")
    for secret in ("/home", "someone", "secret", "bucket", "token"):
        assert secret not in re.sub("tokens|per_token|tokenizer|max_token_error", "", card)
    assert "Tiny-1B" in card
    assert "calib.parquet" in card


def test_it_counts_linears_by_strategy_and_lists_the_worst() -> None:
    """Counts, the largest error of each strategy, and the worst linears by name, first the worst of all."""
    card = render_model_card(recipe(), summary(), ARCHITECTURE, "ascend")
    assert f"| `{STATIC}` | 12 | 1.40e-02 |" in card
    assert "| `NA` | 2 | - |" in card
    worst = [line for line in card.splitlines() if line.startswith("| `model.layers")]
    assert len(worst) == 5
    assert worst[0].startswith("| `model.layers.1.mlp.down_proj` |")


def test_perplexities_are_shown_where_they_were_measured() -> None:
    """Both figures with the change between them, one alone, or the command; and what they are over."""
    found = PerplexitySummary(
        format="ascend",
        perplexity=30.6,
        float_perplexity=30.0,
        num_samples=64,
        sequence_length=512,
        num_tokens=32704,
        data=("evaluation.parquet",),
        data_fingerprint="ab" * 32,
    )
    measured = summary(evaluations=(found,))
    both = render_model_card(recipe(), measured, ARCHITECTURE, "ascend")
    assert "| float | 30.0000 |" in both
    assert "| quantised (+2.00%) | 30.6000 |" in both
    over = "Over 64 samples of 512 tokens of evaluation.parquet (32704 predicted tokens, data abababababab)."
    assert over in both
    alone = summary(evaluations=(dataclasses.replace(found, float_perplexity=None),))
    assert "| quantised | 30.6000 |" in render_model_card(recipe(), alone, ARCHITECTURE, "ascend")
    assert "gs-dist evaluate" in render_model_card(recipe(), summary(), ARCHITECTURE, "ascend")
    other_format = render_model_card(recipe(), measured, ARCHITECTURE, "golden-stick")
    assert "30.6" not in other_format
    assert "Perplexity was not measured" in other_format


FORMATS = {dialect.name: dialect for dialect in (CompressedTensorsCodec(), AscendCodec(), GoldenStickCodec())}


def serving(directory: Path, format_name: str, policy: QuantPolicy, **options: Any) -> str:
    """The section of the card that is written beside a model of that policy."""
    dialects.save_model(directory / format_name, FORMATS[format_name], policy, **options)
    architecture = CheckpointReader(directory / format_name, quantized=True).architecture
    write_model_card(directory / format_name, recipe(), summary(), architecture)
    card = (directory / format_name / "README.md").read_text()
    return card.split("## How to serve it")[1].split("## Origin")[0]


GROUPS_OF_64 = dialects.W4A16_GROUPS
ZERO_POINTS = GROUPS_OF_64.model_copy(update={"weight_symmetric": False})
ASYMMETRIC_WEIGHTS = dialects.W8A8_DYNAMIC.model_copy(update={"weight_symmetric": False})
PLAIN = 'from_pretrained("DIRECTORY")'
SERVED: list[tuple[str, str, QuantPolicy, dict[str, Any], list[str], list[str]]] = [
    (
        "static on Ascend",
        "ascend",
        dialects.W8A8,
        {},
        ["serve DIRECTORY --quantization ascend\n"],
        ["transformers", "Not"],
    ),
    (
        "static of Golden Stick",
        "golden-stick",
        dialects.W8A8,
        {},
        ["vllm-mindspore serve DIRECTORY --q"],
        ["Not", "Netw"],
    ),
    (
        "int8 of Golden Stick",
        "golden-stick",
        dialects.W8A16,
        {},
        ["Not with vLLM-MindSpore", "Golden Stick builds"],
        [],
    ),
    (
        "static for GPUs",
        "compressed-tensors",
        dialects.W8A8,
        {},
        [PLAIN, "With vLLM:", "Not with vLLM-Ascend", "format: [ascend]"],
        ["With vLLM-Ascend", "dequantize"],
    ),
    (
        "dynamic",
        "compressed-tensors",
        dialects.W8A8_DYNAMIC,
        {},
        [PLAIN, "With vLLM:", "With vLLM-Ascend:"],
        ["Not with"],
    ),
    (
        "asymmetric weights",
        "compressed-tensors",
        ASYMMETRIC_WEIGHTS,
        {},
        [PLAIN, "Not with vLLM**", "Not with vLLM-Ascend", "weight_symmetric: true"],
        ["vllm serve"],
    ),
    ("W4A8", "compressed-tensors", dialects.W4A8, {}, [PLAIN, "Not with vLLM**"], ["vllm serve"]),
    (
        "int8 cache",
        "compressed-tensors",
        dialects.W8A16,
        {"kv_cache": "per_channel"},
        [PLAIN, "Not with vLLM**", "NotImplementedError"],
        ["vllm serve"],
    ),
    (
        "packed zero points",
        "compressed-tensors",
        ZERO_POINTS,
        {"hidden_size": 128},
        [
            "import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig",
            'from_pretrained("DIRECTORY", quantization_config=CompressedTensorsConfig(dequantize=True))',
            "With vLLM:",
        ],
        ['model = AutoModelForCausalLM.from_pretrained("DIRECTORY")'],
    ),
    (
        "groups over cards",
        "compressed-tensors",
        GROUPS_OF_64,
        {"hidden_size": 128},
        ["With vLLM:", "* vLLM goes up to tensor_parallel_size 2"],
        ["dequantize"],
    ),
]


@pytest.mark.parametrize("case", SERVED, ids=[case[0] for case in SERVED])
def test_serving_is_told_as_the_engines_rules_have_it(
    case: tuple[str, str, QuantPolicy, dict[str, Any], list[str], list[str]], tmp_path: Path
) -> None:
    """An engine is shown with its command and what to know of it, or with the rule that keeps it from loading."""
    _, format_name, policy, options, said, unsaid = case
    section = html.unescape(serving(tmp_path, format_name, policy, **options))
    for text in said:
        assert text in section
    for text in unsaid:
        assert text not in section


def test_the_introduction_names_the_engines_that_load_it(tmp_path: Path) -> None:
    """Those that its rules let pass, and no others."""
    serving(tmp_path, "compressed-tensors", dialects.W8A8)
    assert (
        "in compressed-tensors for transformers and vLLM. " in (tmp_path / "compressed-tensors/README.md").read_text()
    )
    serving(tmp_path, "golden-stick", dialects.W8A16)
    assert "in Golden Stick's layout. " in (tmp_path / "golden-stick/README.md").read_text()


def test_many_reasons_are_cut_short(tmp_path: Path) -> None:
    """Three reasons against an engine, and the command that lists the rest."""
    problems = tuple(
        Problem(file="config.json", tensor="", rule="r", found=f"f{n}", expected="e") for n in (1, 2, 3, 4, 5, 5)
    )
    verdict = EngineVerdict(engine="vllm", problems=problems)
    card = render_model_card(recipe(), summary(), ARCHITECTURE, "compressed-tensors", [verdict])
    assert "* found f3; expected e\n* and 2 more, which `gs-dist check DIRECTORY --for vllm` lists" in card


@pytest.mark.parametrize("format_name", ["ascend", "compressed-tensors"])
def test_a_float32_model_is_served_in_bfloat16(format_name: str, tmp_path: Path) -> None:
    """Engines compute a float32 model in bfloat16, so the command says so."""
    assert "--dtype bfloat16" in serving(tmp_path, format_name, dialects.W8A8_DYNAMIC, dtype="float32")


def test_front_matter_and_recipe_are_yaml_and_patterns_do_not_break_the_tables() -> None:
    """Hubs can read the front matter, the recipe can be loaded back, and a '|' in a pattern is escaped."""
    card = render_model_card(recipe(), summary(model='Odd: "name"'), ARCHITECTURE, "ascend")
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"base_model": 'Odd: "name"', "tags": ["int8", "ascend", "gs-dist"]}
    written = yaml.safe_load(card.split("~~~~yaml\n")[1].split("\n~~~~")[0])
    assert written["model"] == "Tiny-1B"
    assert r".*(up\|down)_proj" in card
    assert r".*(up|down)_proj" in written["layer_policies"]


def test_provenance_and_notes_travel_with_the_model(tmp_path: Path) -> None:
    """Fingerprints, versions and the run's notes are in the README.md that is written."""
    directory = tmp_path / "ascend"
    directory.mkdir()
    write_model_card(directory, recipe(), summary(notes=("layer 3 stayed in float",)), ARCHITECTURE)
    card = (directory / "README.md").read_text()
    assert "cc" * 32 in card
    assert "| mindspore | 2.10.0 |" in card
    assert "* layer 3 stayed in float" in card


HOSTILE = "x<script>alert(1)</script>`b`|c [d](javascript:e)\n# f ~~~~"


def test_foreign_text_is_shown_and_never_markup() -> None:
    """A model's name, a pattern, a note, a package's version: none becomes HTML, a link, a heading or a cell."""
    policies = {HOSTILE.replace("(", "[(]").replace(")", "[)]"): None}
    card = render_model_card(
        recipe(layer_policies=policies),
        summary(model=HOSTILE, notes=(HOSTILE,), versions={"gs-dist": HOSTILE}),
        ARCHITECTURE,
        "ascend",
    )
    assert yaml.safe_load(card.split("---")[1])["base_model"] == HOSTILE
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card)
    assert "<script" not in html
    assert "<a " not in html
    assert "alert(1)" in html
    assert [line for line in html.splitlines() if line.startswith("<h1")] == [
        "<h1>x&lt;script&gt;alert(1)&lt;/script&gt;`b`|c [d](javascript:e) # f ~~~~, quantised</h1>"
    ]
