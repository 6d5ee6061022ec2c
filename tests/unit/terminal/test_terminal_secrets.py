"""What a URI keeps secret is nowhere: in no message, on no page, in no file that a job writes."""

from __future__ import annotations

import re
from pathlib import Path

import dialects
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from checkpoints import tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from runs import run_inline, small_recipe
from typer.testing import CliRunner

from gs_dist.checkpoint.dialects.compressed_tensors.codec import CompressedTensorsCodec
from gs_dist.errors import JobFailure
from gs_dist.progress import SilentProgress
from gs_dist.terminal.cli import app
from gs_dist.terminal.request import again
from gs_dist.wording import printable, without_secrets

URIS = (
    "s4://AKIAUSER:open+sesame@bucket/x.parquet",
    "s4://AKIAUSER:open/sesame@bucket/x.parquet",
    "s4://AKIAUSER:open?sesame@bucket/x.parquet",
    "s4://AKIAUSER:open@sesame@bucket/x.parquet",
    "s4://bucket/x.parquet?key=AKIAUSER&token=sesame",
    "s4://bucket/x.parquet?key=AKIAUSER&token=open@sesame",
)
SECRETS = re.compile("AKIAUSER|sesame")
RECIPE = "model: {model}\noutput: {output}\ncalibration: {{data: '{data}', num_samples: 2, sequence_length: 16}}\n"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ground")
    tiny_checkpoint(root / "model", num_layers=1)
    dialects.save_model(root / "made", CompressedTensorsCodec(), dialects.W8A8)
    return root


COMMANDS = {
    "quantize a recipe": ["quantize", "{recipe}"],
    "quantize with another model": ["quantize", "{recipe}", "model={uri}"],
    "quantize into": ["quantize", "{recipe}", "output={uri}"],
    "quantize and probe": ["quantize", "{recipe}", "max_perplexity_increase=1", "probe.data={uri}"],
    "quantize a model": ["quantize", "{model}", "--scheme", "w8a8", "--data", "{uri}", "-o", "{root}/out"],
    "quantize a model into": ["quantize", "{model}", "--scheme", "w8a8", "-o", "{uri}"],
    "quantize what is no model": ["quantize", "{uri}", "--scheme", "w8a8", "--data", "d", "-o", "{root}/out"],
    "plan what is not there": ["plan", "{uri}"],
    "a key that does not exist": ["plan", "{recipe}", "calibration.column=3", "parallel={uri}", "nothing={uri}"],
    "evaluate on": ["evaluate", "{made}", "--data", "{uri}"],
    "evaluate against": ["evaluate", "{made}", "--data", "d.parquet", "--model", "{uri}"],
    "check": ["check", "{uri}"],
    "check against": ["check", "{made}", "--model", "{uri}"],
    "check for": ["check", "{made}", "--for", "{uri}"],
    "summary": ["summary", "{uri}"],
    "report": ["report", "{uri}"],
    "resolve": ["resolve", "{uri}", "{recipe}"],
    "convert": ["convert", "{uri}", "-o", "{root}/out"],
    "convert into": ["convert", "{model}", "-o", "{uri}"],
}


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_a_secret(command: str, uri: str, ground: Path) -> None:
    """Every place that takes a path, and is refused, tells of it without user, password and query."""
    model, output = ground / "model", ground / "out"
    recipe = ground / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, output=output, data=uri))
    places = {"recipe": recipe, "model": model, "made": ground / "made", "root": ground, "uri": uri}
    result = CliRunner().invoke(app, [part.format(**places) for part in COMMANDS[command]])
    assert result.exit_code == 2
    assert not SECRETS.search(result.output), result.output
    assert not (ground / "out").exists()


class Heard(SilentProgress):
    """Keeps what a job says."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        """Kept."""
        self.messages.append(text)


@pytest.mark.parametrize("uri", [URIS[1], URIS[-1]])
def test_no_file_of_a_job_holds_a_secret(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what it says on the way, or the line that runs it again; a probe that refuses included."""
    config = small_recipe(
        tmp_path,
        num_layers=1,
        ptq={"weight_quant_dtype": "int8"},
        format=["compressed-tensors", "ascend"],
        keep_statistics=True,
        sensitivity=True,
        max_perplexity_increase=100.0,
    )
    place = config.calibration.data[0]
    monkeypatch.setattr("gs_dist.data.locations._locate", lambda entry: (pafs.LocalFileSystem(), place, "s4://"))
    own = config.calibration.model_copy(update={"data": (uri,)})
    config = config.model_copy(update={"calibration": own, "probe": config.probe.model_copy(update={"data": (uri,)})})
    heard = Heard()
    run_inline(config, progress=heard)
    with pytest.raises(JobFailure, match="perplexity"):
        run_inline(config.model_copy(update={"max_perplexity_increase": -0.999}), progress=heard)
    run_inline(config, progress=heard)
    told = "\n".join([*heard.messages, again(config)])
    assert "s4://" in told
    assert not SECRETS.search(told)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"provenance.json", "README.md", "recipe.yaml", "report.html", "done", "run.json"} <= {f.name for f in files}
    for path in files:
        text = path.read_bytes().decode("utf-8", "replace")
        if path.suffix == ".parquet":
            text = f"{pq.read_table(path).to_pylist()} {pq.read_schema(path).metadata}"
        assert not SECRETS.search(text), path


@given(
    user=st.text("abc:+%", min_size=1),
    password=st.text("xyz/?#@:%+", min_size=1).map(lambda text: f"@{text}"),
    place=st.text("mno/.-", min_size=1),
)
def test_whatever_a_password_holds_is_left_out(user: str, password: str, place: str) -> None:
    """Whatever stands before the last @ is gone, in a URI alone and in a text; one slash of a path object included."""
    for scheme in ("s3://", "s3:/"):
        uri = f"{scheme}{user}:{password}@{place}"
        for shown in (without_secrets(uri), printable(f"it is {uri!r}, there"), printable(f"it is {uri} there")):
            assert not set(shown.replace("s3:", "").replace("***@", "")) & set("abcxyz#%+@")


def test_what_is_no_uri_is_shown_as_it_is() -> None:
    """Paths, patterns and names with signs of their own."""
    for text in ("/data/a@b?.parquet", "re:.*proj?", "me@host", "C:/x", "3:4?", "s3://bucket/a.parquet", "a: /x@y"):
        assert without_secrets(text) == text
        assert printable(text) == text
