"""Summaries: what is kept, written, read again and shown."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from gs_dist.errors import DamagedError, OutputError
from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import (
    CalibrationSummary,
    FloatComparison,
    PerplexitySummary,
    ProbeSummary,
    StageSummary,
    read_summary,
    table_sha256,
    write_summary,
)
from gs_dist.terminal.tables import print_summary

W8A8 = "SmoothQuant-W8-perchannel-A8-pertensor"


def row(name: str, error: float | None, layer: int = 0, notes: tuple[str, ...] = ()) -> LinearSummary:
    return LinearSummary(
        layer=layer,
        name=name,
        strategy="NA" if error is None else W8A8,
        relative_error=error,
        error_source="none" if error is None else "gram",
        scale_min=None if error is None else 0.001,
        scale_max=None if error is None else 0.25,
        num_tokens=65536,
        notes=notes,
    )


def stage(number: int, measured: int | None = 3 << 30) -> StageSummary:
    return StageSummary(
        stage=number,
        replica=0,
        first_layer=2 * number,
        end_layer=2 * number + 2,
        seconds=12.5,
        idle_share=0.25,
        peak_memory_planned=4 << 30,
        peak_memory_measured=measured,
    )


def make(*rows: LinearSummary) -> CalibrationSummary:
    return CalibrationSummary(
        model="SmolLM2",
        formats=("compressed-tensors",),
        propagation="original",
        num_samples=128,
        num_tokens=65536,
        seconds=30.0,
        versions={"gs_dist": "0.1.0"},
        fingerprints={"recipe": "ab", "source": "cd", "data": "ef"},
        rows=rows,
        stages=(stage(0), stage(1, None)),
    )


SMALL = make(
    row("model.layers.0.self_attn.q_proj", 1e-4),
    row("model.layers.0.mlp.down_proj", 3e-2, notes=("more damping: 0.1",)),
    row("model.layers.1.self_attn.q_proj", 2e-4, layer=1),
    row("lm_head", None, layer=2),
)


PROBE = ProbeSummary(
    format="ascend",
    perplexity=31.5,
    float_perplexity=30.0,
    num_samples=8,
    num_tokens=4088,
    calibration_data=False,
    num_new_tokens=16,
    num_equal_tokens=11,
)


EVALUATION = PerplexitySummary(
    format="ascend",
    perplexity=31.5,
    float_perplexity=30.0,
    num_samples=64,
    sequence_length=512,
    num_tokens=32704,
    data=("evaluation.parquet",),
    data_fingerprint="ab" * 32,
)


def shown(summary: CalibrationSummary, width: int = 200, **options: object) -> str:
    stream = io.StringIO()
    print_summary(Console(file=stream, width=width), summary, **options)  # type: ignore[arg-type]  # passed on as they come
    return stream.getvalue()


def test_a_summary_survives_json(tmp_path: Path) -> None:
    """What is written is what is read, field by field."""
    made = FloatComparison(loss_increase=0.1, standard_error=None, mean_kl=0.2, kl_99th_percentile=2.0, equal_top1=0.9)
    measured = (EVALUATION, replace(EVALUATION, format="golden-stick", comparison=made, engine="mindformers"))
    full = replace(SMALL, notes=("resumed",), probes=(PROBE,), evaluations=measured)
    write_summary(tmp_path, full)
    assert read_summary(tmp_path) == full


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    """The file is JSON that any reader takes."""
    summary = make(row("a", float("nan")), row("b", float("inf")))
    document = json.loads(summary.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [r["relative_error"] for r in document["rows"]] == [None, None]
    write_summary(tmp_path, summary)
    assert pq.read_table(tmp_path / "summary.parquet").column("relative_error").to_pylist() == [None, None]


def test_the_table_holds_one_row_a_linear(tmp_path: Path) -> None:
    """summary.parquet can be queried by column."""
    write_summary(tmp_path, SMALL)
    table = pq.read_table(tmp_path / "summary.parquet")
    assert table.column("name").to_pylist() == [r.name for r in SMALL.rows]
    assert table.column("relative_error").to_pylist() == [1e-4, 3e-2, 2e-4, None]
    assert table.column("notes").to_pylist()[1] == ["more damping: 0.1"]
    assert table.schema.metadata[b"model"] == b"SmolLM2"


def test_every_field_of_a_row_is_a_column(tmp_path: Path) -> None:
    """A field added to LinearSummary must not be lost from the table."""
    write_summary(tmp_path, SMALL)
    assert set(pq.read_schema(tmp_path / "summary.parquet").names) == set(LinearSummary.__dataclass_fields__)


def test_writing_leaves_nothing_beside_the_files(tmp_path: Path) -> None:
    """Files appear whole, under their names alone, also over older ones."""
    write_summary(tmp_path, make())
    write_summary(tmp_path, SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.json", "summary.parquet"]
    assert read_summary(tmp_path).rows == SMALL.rows


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The error is the user's to mend."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="make output writable"):
        write_summary(tmp_path / "file", SMALL)


def test_a_directory_without_summary_is_named(tmp_path: Path) -> None:
    """The message says what to name instead."""
    with pytest.raises(OutputError, match=r"holds no summary\.json .*: name the output directory of a finished job"):
        read_summary(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"version": 1}', '{"version": 1, "rows": 3}'])
def test_a_damaged_summary_is_refused(tmp_path: Path, text: str) -> None:
    """Whatever stands in the file, the outcome is one message."""
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(OutputError, match=r"is not a summary|has no checksum"):
        read_summary(tmp_path)
    with pytest.raises(OutputError, match="is not a summary"):
        CalibrationSummary.from_json(text)


def test_a_figure_that_was_changed_is_noticed(tmp_path: Path) -> None:
    """One bit anywhere in summary.json, or another table beside it: nothing of it is believed."""
    write_summary(tmp_path, SMALL)
    path = tmp_path / "summary.json"
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(bytes(changed))
        with suppress(OutputError):
            assert read_summary(tmp_path) == SMALL, "white space may differ"
    path.write_bytes(whole.replace(b"0.0001", b"0.0002"))
    with pytest.raises(DamagedError, match=r"summary\.json: does not hold what was written to it, by its checksum"):
        read_summary(tmp_path)
    path.write_bytes(whole)
    assert table_sha256(tmp_path) == hashlib.sha256((tmp_path / "summary.parquet").read_bytes()).hexdigest()


def test_a_summary_of_a_later_version_is_refused(tmp_path: Path) -> None:
    """A format this version does not know is not guessed at."""
    (tmp_path / "summary.json").write_text(SMALL.to_json().replace('"version": 1', '"version": 9'))
    with pytest.raises(OutputError, match="has version 9 and this gs-dist reads version 1"):
        read_summary(tmp_path)


def test_rows_sort_by_error_with_unquantized_linears_last() -> None:
    """The worst linear comes first."""
    names = [r.name.removeprefix("model.layers.") for r in SMALL.sorted_rows("error")]
    assert names == ["0.mlp.down_proj", "1.self_attn.q_proj", "0.self_attn.q_proj", "lm_head"]
    with pytest.raises(ValueError, match="ask for 'layer', 'error' or 'sensitivity'"):
        SMALL.sorted_rows("size")


def test_strategies_are_counted() -> None:
    """Totals say how many linears got what."""
    assert SMALL.strategies == {W8A8: 3, "NA": 1}


def test_a_small_model_is_shown_linear_by_linear() -> None:
    """Strategy, error, scales and notes of each, NA for those that stay."""
    text = shown(SMALL)
    assert "Network Quantization Summary" in text
    line = next(line for line in text.splitlines() if "layers.0.mlp.down_proj" in line)
    for part in (W8A8, "0.03", "gram", "0.001 .. 0.25", "65536", "more damping: 0.1"):
        assert part in line
    assert "NA" in next(line for line in text.splitlines() if "lm_head" in line)
    assert f"strategies: {W8A8} 3, NA 1" in text


def test_workers_are_shown_with_time_idle_share_and_memory() -> None:
    """Planned memory stands beside what was measured; nothing is invented where it was not."""
    text = shown(SMALL)
    first = next(line for line in text.splitlines() if "0-1" in line)
    for part in ("12.5", "25%", "4.0 GiB", "3.0 GiB"):
        assert part in first
    assert "3.0 GiB" not in next(line for line in text.splitlines() if "2-3" in line)


def test_a_large_model_is_shown_role_by_role() -> None:
    """Linears of one role share a line with median and worst error; the worst are listed."""
    rows = [row(f"model.layers.{i}.mlp.up_proj", (i + 1) / 1000, layer=i) for i in range(99)]
    text = shown(make(*rows, row("lm_head", None, layer=99)))
    line = next(line for line in text.splitlines() if "model.layers.*.mlp.up_proj" in line)
    for part in ("99", "0.05", "0.099 (layer 98)"):
        assert part in line
    assert "Largest errors" in text
    assert "model.layers.98.mlp.up_proj" in text
    assert "model.layers.5.mlp.up_proj" not in text


def test_a_limit_says_what_it_hides() -> None:
    """With a limit, linears are listed one by one, and the rest is counted."""
    text = shown(SMALL, sort="error", limit=1)
    assert "layers.0.mlp.down_proj" in text
    assert "q_proj" not in text
    assert "3 more linears are not shown" in text


def test_text_from_outside_is_not_taken_for_markup() -> None:
    """Brackets in names and notes are printed as they are."""
    text = shown(make(row("a[bold]b", 0.1, notes=("[red]x",))))
    assert "a[bold]b" in text
    assert "[red]x" in text


JUDGED = make(
    row("model.layers.0.self_attn.q_proj", 1e-4),
    replace(row("model.layers.0.mlp.up_proj", 1e-4), scheme_errors={"W8": 1e-5, "W4": 2e-3}),
    replace(row("model.layers.0.mlp.down_proj", None), scheme_errors={"W8": 2e-5, "W4": 7e-3}),
)


def test_what_schemes_would_cost_is_kept_ranked_and_shown(tmp_path: Path) -> None:
    """Costs of schemes come back from JSON, are structs in Parquet, rank linears and have a column of their own."""
    write_summary(tmp_path, JUDGED)
    assert read_summary(tmp_path) == JUDGED
    column = pq.read_table(tmp_path / "summary.parquet").column("scheme_errors").to_pylist()
    found = [None if row is None else [tuple(entry.values()) for entry in row] for row in column]
    assert found == [None, [("W8", 1e-5), ("W4", 2e-3)], [("W8", 2e-5), ("W4", 7e-3)]]
    assert list(column[1][0]) == ["scheme", "relative_error"]
    names = [r.name.rpartition(".")[2] for r in JUDGED.sorted_rows("sensitivity")]
    assert names == ["down_proj", "up_proj", "q_proj"], "those that were not judged come last"
    assert "W8 2e-05, W4 0.007" in shown(JUDGED, sort="sensitivity")
    assert "would cost" not in shown(SMALL, sort="layer")


def test_a_probe_is_shown_with_its_increase() -> None:
    """Perplexities, what they were taken on, and how long both models said the same."""
    assert (
        "probe of ascend: perplexity 31.5, of the float model 30 (+5.00%), over 8 samples of other data "
        "(4088 predicted tokens); 11 of 16 generated tokens equal before the first difference\n"
    ) in shown(replace(SMALL, probes=(PROBE,)))


def test_tokens_that_were_not_generated_are_not_spoken_of() -> None:
    """Without generated tokens the sentence ends with the perplexities."""
    sentence = replace(PROBE, num_new_tokens=0, num_equal_tokens=0).sentence()
    assert sentence.endswith("over 8 samples of other data (4088 predicted tokens)")


def test_a_summary_without_probes_is_still_read(tmp_path: Path) -> None:
    """Summaries written before there were probes have no such key."""
    document = json.loads(SMALL.to_json())
    del document["probes"]
    assert CalibrationSummary.from_json(json.dumps(document)) == SMALL


def test_what_was_evaluated_is_kept_by_format() -> None:
    """A new figure takes the place of the same format's; a float figure over the same samples is known already."""
    other = replace(EVALUATION, format="compressed-tensors", float_perplexity=None, perplexity=32.0)
    both = replace(SMALL, formats=("compressed-tensors", "ascend")).with_evaluations([EVALUATION])
    both = both.with_evaluations([other])
    assert both.evaluations == (replace(other, float_perplexity=30.0), EVALUATION)
    elsewhere = replace(other, data_fingerprint="cd" * 32, perplexity=9.0)
    assert both.with_evaluations([elsewhere]).evaluations == (elsewhere, EVALUATION)
    text = shown(both)
    assert (
        "ascend: perplexity 31.5, of the float model 30 (+5.00%), over 64 samples of 512 tokens of evaluation.parquet "
        "(32704 predicted tokens, data abababababab)\n"
    ) in text
    assert "compressed-tensors: perplexity 32, of the float model 30 (+6.67%)" in text


def test_a_figure_without_format_and_samples_is_none(tmp_path: Path) -> None:
    """A summary that was written with one perplexity for all formats is read without it."""
    document = {**json.loads(SMALL.to_json()), "perplexity": 31.5, "float_perplexity": 30.0}
    assert CalibrationSummary.from_json(json.dumps(document)) == SMALL


@pytest.mark.parametrize("width", [50, 60, 80, 99])
@pytest.mark.parametrize("copies", [1, 21])
def test_a_narrow_terminal_shows_fewer_columns_and_whole_words(width: int, copies: int) -> None:
    """Names without their common part, no cell broken within a word, no line cut; what says least is left out."""
    text = shown(replace(SMALL, rows=SMALL.rows * copies), width=width)
    tables = text.split("strategies: ")[0]
    assert "names without model.layers." in " ".join(tables.split())
    assert all(len(line.rstrip()) <= width for line in tables.splitlines())
    number = "*" if copies > 1 else "0"
    for word in (f"{number}.self_attn.q_proj", f"{number}.mlp.down_proj", "lm_head", "W8-perchannel", "A8-pertensor"):
        assert f" {word} " in tables
    for heading in ("linear", "strategy", "error", "stage", "replica", "layers", "seconds", "measured"):
        assert f" {heading}" in tables
    assert "65536" not in tables
    assert "tokens" in shown(SMALL, width=100)


def test_there_is_no_order_by_what_was_not_found_out() -> None:
    """Sorting by sensitivity is refused where no scheme was judged, with the setting that has them judged."""
    with pytest.raises(OutputError, match=r"sensitivity: true; from the statistics of .* `gs-dist resolve` does so"):
        shown(SMALL, sort="sensitivity")
