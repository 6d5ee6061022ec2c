"""A conversion that is cut short, goes on, and gives the bytes of one that was not; so do any number of workers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conversions import family_checkpoint, run_conversion

from gs_dist.checkpoint.check import check
from gs_dist.conversion import parts
from gs_dist.conversion.config import ConversionConfig
from gs_dist.conversion.job import task_of
from gs_dist.conversion.plan import plan_conversion
from gs_dist.conversion.worker import convert_part
from gs_dist.errors import JobFailure, OutputError, PlanError, RefusedError, UserError

pytestmark = pytest.mark.seconds
SMALL = 24 << 10  # bytes of a part, so that a tiny model has several


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SMALLEST_PART", SMALL)


def contents(output: Path) -> dict[str, bytes]:
    """Every file of a job's model directories, by name."""
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.parts[len(output.parts)] in ("ascend", "compressed-tensors")
    }


def model_of(directory: Path) -> Path:
    """A mixture of which several parts are made."""
    return family_checkpoint(directory, "deepseek_v3")[0]


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_files(tmp_path: Path, workers: int) -> None:
    """Names and bytes of all files, those that describe the model too."""
    model = model_of(tmp_path / "model")
    run_conversion(model, tmp_path / "one", format=["ascend", "compressed-tensors"])
    run_conversion(model, tmp_path / "more", format=["ascend", "compressed-tensors"], workers=workers)
    assert len(list((tmp_path / "one" / "manifests").glob("part-*.json"))) > 5
    assert contents(tmp_path / "one") == contents(tmp_path / "more")


def start(model: Path, output: Path, workers: int = 1) -> subprocess.Popen[bytes]:
    """A conversion in a process of its own."""
    script = f"""
        from gs_dist.conversion import parts
        parts.SMALLEST_PART = {SMALL}
        from conversions import run_conversion
        from pathlib import Path
        if __name__ == "__main__":
            run_conversion(Path({str(model)!r}), Path({str(output)!r}), workers={workers})
    """
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    file = output.with_suffix(".py")
    file.write_text(textwrap.dedent(script))
    return subprocess.Popen([sys.executable, str(file)], env={**os.environ, "PYTHONPATH": path}, start_new_session=True)


def kill_after(process: subprocess.Popen[bytes], output: Path, finished: int) -> None:
    """Kills a conversion and its workers once so many parts are there."""
    deadline = time.monotonic() + 60
    while process.poll() is None and len(list(output.glob("manifests/part-*.json"))) < finished:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Its workers die a moment later, and hold the locks on their files until then.
    deadline = time.monotonic() + 5
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_kill_finished_files_are_kept_and_the_rest_is_made_as_it_would_have_been(
    tmp_path: Path, workers: int
) -> None:
    """SIGKILL to all processes; nothing that was finished is written again, and no half file stays."""
    model = model_of(tmp_path / "model")
    run_conversion(model, tmp_path / "undisturbed")
    output = tmp_path / "killed"
    kill_after(start(model, output, workers), output, 3)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("compressed-tensors/model-*.safetensors")}
    manifests = {path.stem.removeprefix("part-") for path in output.glob("manifests/part-*.json")}
    assert len(manifests) >= 3
    run_conversion(model, output)
    assert contents(output) == contents(tmp_path / "undisturbed")
    kept = {name: time for name, time in before.items() if name[len("model-") :][:5] in manifests}
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("compressed-tensors/model-*.safetensors")}
    assert kept.items() <= after.items()
    assert not list(output.rglob(".gs-dist-*"))


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_the_same_bytes(tmp_path: Path) -> None:
    """Wherever the processes happen to be."""
    model = model_of(tmp_path / "model")
    run_conversion(model, tmp_path / "undisturbed")
    rng = random.Random(7)
    for number in range(10):
        output = tmp_path / f"killed-{number}"
        process = start(model, output, workers=1 + number % 2)
        time.sleep(rng.uniform(0.2, 2.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        run_conversion(model, output)
        assert contents(output) == contents(tmp_path / "undisturbed")


def test_a_file_that_changed_is_made_anew(tmp_path: Path) -> None:
    """Its hash tells; a manifest vouches for nothing that is not there."""
    model = model_of(tmp_path / "model")
    run_conversion(model, tmp_path / "out")
    expected = contents(tmp_path / "out")
    first, second, *_ = sorted((tmp_path / "out" / "compressed-tensors").glob("model-*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(bytes(data))
    second.unlink()
    run_conversion(model, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("change", "said"), [({"scheme": "W8A16"}, "the scheme, layer_policies or format"), ({}, "the model")]
)
def test_an_output_of_another_conversion_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """The message says what differs; nothing of it is touched."""
    model = model_of(tmp_path / "model")
    run_conversion(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    if not change:
        model = family_checkpoint(tmp_path / "other", "deepseek_v3", seed=1)[0]
    with pytest.raises(OutputError, match=said):
        run_conversion(model, tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


def test_a_worker_that_is_killed_ends_the_job_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of memory, say; finished files are kept, and the same command goes on."""
    import multiprocessing

    model = model_of(tmp_path / "model")

    def kill_one(number: int) -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    from gs_dist.conversion.job import convert
    from gs_dist.progress import SilentProgress

    class Killer(SilentProgress):
        def part_finished(self, part: int, done: int, total: int) -> None:
            kill_one(part)

    config = {"model": str(model), "output": str(tmp_path / "out"), "workers": 2}
    with pytest.raises(JobFailure, match="a worker process was killed"):
        convert(plan_conversion(ConversionConfig.model_validate(config)), Killer())
    assert not (tmp_path / "out" / "done").exists()
    run_conversion(model, tmp_path / "out")
    run_conversion(model, tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_conversion_that_is_not_finished_is_told_by_the_check(tmp_path: Path) -> None:
    """How many files are there, and how to go on."""
    model = model_of(tmp_path / "model")
    plan = plan_conversion(
        ConversionConfig.model_validate({"model": str(model), "output": str(tmp_path / "out"), "workers": 1})
    )
    (tmp_path / "out" / "manifests").mkdir(parents=True)
    (tmp_path / "out" / "compressed-tensors").mkdir()
    for part in plan.parts[:3]:
        convert_part(task_of(plan), part)
    with pytest.raises(UserError, match="is unfinished; 3 files of weights are published; submit the same again"):
        check(tmp_path / "out")


def test_a_conversion_that_is_refused_says_so_and_looks_like_no_model(tmp_path: Path) -> None:
    """A finished one, too, that is submitted again with a lower limit; a higher one makes a model of it again."""
    model, output = model_of(tmp_path / "model"), tmp_path / "out"
    run_conversion(model, output)
    before = contents(output)
    with pytest.raises(RefusedError, match="destroyed by rounding"):
        run_conversion(model, output, max_relative_error=1e-9)
    assert not [path for path in output.rglob("*") if path.name in ("config.json", "model.safetensors.index.json")]
    with pytest.raises(
        UserError, match=r"the conversion in .* was refused: destroyed by rounding: .* files of weights"
    ):
        check(output)
    assert "the job was refused: destroyed by rounding" in check(output / "compressed-tensors").render()
    run_conversion(model, output)
    assert contents(output) == before
    assert not (output / "refused").exists()


def test_memory_that_does_not_suffice_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """The message names the largest weight and the size to set."""
    config = {"model": str(model_of(tmp_path / "model")), "output": str(tmp_path / "out"), "memory_per_worker": 1 << 20}
    with pytest.raises(PlanError, match=r"a worker needs .* for it, and memory_per_worker is 1\.0 MiB"):
        plan_conversion(ConversionConfig.model_validate(config))
