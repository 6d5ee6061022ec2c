"""Directories that other tools wrote: sound ones pass without a false alarm."""

from __future__ import annotations

from pathlib import Path

import pytest

from gs_dist.checkpoint.check import check

DIRECTORIES = sorted(path.parent for path in (Path(__file__).parents[2] / "data/llm_compressor").glob("*/config.json"))


def test_there_are_directories_of_each_scheme() -> None:
    """As `tests/data/make_llm_compressor.py` makes them."""
    assert [path.name for path in DIRECTORIES] == ["w4a16", "w8a8-dynamic", "w8a8-static"]


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
@pytest.mark.parametrize("engine", [None, "vllm", "transformers"])
def test_what_llm_compressor_wrote_passes(directory: Path, engine: str | None) -> None:
    """No rule is broken, and nothing says that it was verified; groups of 16 have no kernel in vLLM in bfloat16."""
    report = check(directory, engine)
    rules = {problem.rule for problem in report.problems}
    assert rules == ({"engine-kind"} if (directory.name, engine) == ("w4a16", "vllm") else set()), report.render()
    assert not report.verified
