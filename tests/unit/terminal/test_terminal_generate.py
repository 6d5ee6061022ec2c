"""`gs-dist generate`: answers side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from runs import run_inline, small_recipe
from typer.testing import CliRunner

from gs_dist.terminal.cli import app

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished job over a tiny model that has a tokenizer and a chat template; output and model."""
    directory = tmp_path_factory.mktemp("generate")
    tiny_checkpoint(directory / "tokens", tokenizer=True)
    config = small_recipe(directory, num_layers=2, format=["compressed-tensors"])
    place = Path(config.model)
    shutil.copy(directory / "tokens" / "tokenizer.json", place)
    (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    run_inline(config)
    return Path(config.output), Path(config.model)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["-q", "generate", *arguments])
    return result.exit_code, result.output


def test_answers_stand_side_by_side(job: tuple[Path, Path]) -> None:
    """Both models are named, and how far they agree is told in tokens; the same command gives the same answers."""
    output, model = job
    arguments = (str(output), "It is a truth", "--model", str(model), "--max-new-tokens", "6")
    code, printed = run(*arguments)
    assert code == 0, printed
    assert "float" in printed
    assert "compressed-tensors: the" in printed
    assert run(*arguments) == (0, printed)
    code, written = run(*arguments, "--json")
    found = json.loads(written)
    assert [entry["model"] for entry in found] == ["float", "compressed-tensors"]
    assert {entry["prompt"] for entry in found} == {"It is a truth"}
    assert all(0 < len(entry["tokens"]) <= 6 for entry in found)


def test_text_is_continued_as_it_is_without_the_template(job: tuple[Path, Path]) -> None:
    """--no-chat leaves the template out, and the answer is another one's."""
    output, _ = job
    chat = json.loads(run(str(output), "It is a truth", "--json", "--max-new-tokens", "8")[1])
    plain = json.loads(run(str(output), "It is a truth", "--json", "--max-new-tokens", "8", "--no-chat")[1])
    assert chat[0]["tokens"] != plain[0]["tokens"]


def test_what_is_missing_is_named(job: tuple[Path, Path], tmp_path: Path) -> None:
    """An empty prompt, a model without tokenizer, and a template that is not there: exit code 2 and what to do."""
    output, _ = job
    code, printed = run(str(output), "", "--no-chat")
    assert code == 2
    assert "has no token" in printed
    bare = tmp_path / "bare"
    shutil.copytree(output / "compressed-tensors", bare)
    (bare / "tokenizer_config.json").unlink()
    code, printed = run(str(bare), "a", "--chat")
    assert code == 2
    assert "has no chat template" in printed
    (bare / "tokenizer.json").unlink()
    code, printed = run(str(bare), "a")
    assert code == 2
    assert "no tokenizer.json" in printed
