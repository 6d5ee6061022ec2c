"""The report: one file that says what the summary says, whatever the names in it are, and needs nothing else."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from summaries import ROLES, a_summary, dense_rows, expert_rows, linear_row

from gs_dist.recipe.config import CalibrationConfig, config_of
from gs_dist.report.page import render_report

pytestmark = pytest.mark.seconds
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = 'x"><script>alert(1)</script>\x1b[2J\u202e'


class Page(HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.titles: list[str] = []
        self.cells: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        if self._inside == "title":
            self.titles.append(data)
        elif self._inside in ("td", "th"):
            self.cells.append(data)


def a_recipe(**settings: object) -> CalibrationConfig:
    document = {"model": "/m", "output": "/o", "calibration": {"data": "calib.parquet"}, **settings}
    return config_of(document, source="test")


def test_the_page_of_eighty_layers_is_small_and_needs_no_other_file() -> None:
    """It opens from disk on a machine without network: no script, no style sheet, no picture elsewhere."""
    text = render_report(a_summary(dense_rows(80)), a_recipe(max_perplexity_increase=0.05))
    page = Page(text)
    assert len(text.encode()) < 2_000_000
    assert "script" not in page.tags
    assert {reference[0] for reference in page.references} <= {"#", "d"}  # sections of its own, and an empty icon


def test_every_linear_has_a_cell_that_tells_its_number() -> None:
    """What is under the pointer, a screen reader hears and the table repeats is the larger of a linear's errors."""
    rows = dense_rows(3)
    page = Page(render_report(a_summary(rows)))
    told = [title for title in page.titles if ": error " in title]
    assert told == [f"{row.name}: error {row.largest_error:.3g}" for row in rows if row.largest_error is not None]
    assert {f"{row.largest_error:.3g}" for row in rows if row.largest_error is not None} <= set(page.cells)


def test_names_cannot_become_part_of_the_page() -> None:
    """Names of models, linears and packages come from other people's files."""
    rows = (linear_row(0, NASTY, 0.1, notes=(NASTY,), strategy=NASTY), *dense_rows(1))
    summary = a_summary(rows, model=NASTY, notes=(NASTY,), versions={NASTY: NASTY}, formats=(NASTY,))
    text = render_report(replace(summary, model_bytes={NASTY: 1}), a_recipe())
    assert "script" not in Page(text).tags
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_experts_of_a_layer_share_a_cell_that_names_the_worst() -> None:
    """A mixture of many experts stays one matrix that can be read."""
    page = Page(render_report(a_summary(expert_rows(2, 4))))
    told = [title for title in page.titles if ": error " in title]
    assert len(told) == 2 * 3
    assert "model.layers.1.mlp.experts.3.up_proj: error 0.0006, the worst of 4 linears" in told
    assert "experts: 24 in 2 layers, given 100 to 512 tokens each" in render_report(a_summary(expert_rows(2, 4)))


def test_sensitivity_is_drawn_for_each_scheme_that_was_judged() -> None:
    """A job without `sensitivity` has no such section."""
    judged = [replace(row, scheme_errors={"W8": 1e-5, "W4": 7e-3}) for row in dense_rows(2) if row.relative_error]
    page = Page(render_report(a_summary(tuple(judged))))
    assert sum(": error as W4 0.007" in title for title in page.titles) == 2 * len(ROLES)
    assert 'id="sensitivity"' not in render_report(a_summary(dense_rows(2)))


def test_what_is_not_known_is_left_out() -> None:
    """A summary of an earlier version has no sizes, no account and no ranges; a recipe may be gone."""
    bare = [replace(r, input_min=None, input_max=None, input_typical=None, outlier_channels=()) for r in dense_rows(2)]
    text = render_report(
        a_summary(tuple(bare), source_bytes=None, model_bytes={}, stages=(), probes=(), evaluations=())
    )
    for section in ("activations", "workers", "recipe"):
        assert f'id="{section}"' not in text
    assert "Perplexity was not measured" in text


def test_drawings_of_one_page_do_not_share_names() -> None:
    """Two gradients of one name would have one drawing's colours explain the other's."""
    text = render_report(a_summary(dense_rows(2)))
    names = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(names) == len(set(names))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium, then pytest -m slow")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_without_complaint_at_any_width(tmp_path: Path, width: int) -> None:
    """No console message, and the page itself never scrolls sideways."""
    page = tmp_path / "report.html"
    probe = "<script>document.title=document.documentElement.scrollWidth</script>"
    text = render_report(a_summary(dense_rows(80)), a_recipe())
    allowed = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    page.write_text(allowed.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    shown = subprocess.run(
        [*command, f"--window-size={width},900", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in shown.stderr
    title = shown.stdout.split("<title>")[1].split("<")[0]
    assert int(title) <= max(width, 500)  # Chromium's windows are no narrower than that


def test_a_page_that_cannot_be_drawn_has_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is foreign code in a process of its own: it may die, and the numbers are there all the same."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    page = Page(render_report(a_summary(dense_rows(2))))
    assert "svg" not in page.tags
    assert f"{dense_rows(2)[0].largest_error:.3g}" in page.cells
    assert "nothing was drawn" in render_report(a_summary(dense_rows(2)))


def test_a_conversions_page_speaks_of_weights_and_of_its_own_recipe() -> None:
    """No data was seen, and settings of calibrated jobs would be refused where the page sends them."""
    converted = {"num_samples": 0, "num_tokens": 0, "propagation": "none", "stages": (), "probes": ()}
    rows = (linear_row(0, "mlp.down_proj", 0.02, strategy="W4-pergroup"),)
    text = render_report(a_summary(rows, **converted))
    assert "Converted without data" in text
    assert "W8A16" in text
    for foreign in ("precision_recovery", "gs-dist resolve", "calibration data", "0 samples"):
        assert foreign not in text, foreign
