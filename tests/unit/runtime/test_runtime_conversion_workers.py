"""A conversion on a Ray cluster."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from conversions import family_checkpoint, run_conversion

from gs_dist.conversion import parts
from gs_dist.conversion.config import ConversionConfig
from gs_dist.conversion.job import convert
from gs_dist.conversion.plan import plan_conversion
from gs_dist.errors import CheckpointError
from gs_dist.progress import SilentProgress
from gs_dist.runtime.conversion_workers import ClusterPool

pytestmark = pytest.mark.ray


def contents(output: Path) -> dict[str, bytes]:
    """Every file of the model directory."""
    return {path.name: path.read_bytes() for path in (output / "ascend").iterdir()}


class Killer(SilentProgress):
    """Kills a worker of Ray once: one that converts, or from the second half on one that waits for its next part.

    Small parts take so little that none may be at work in the moment that a part is finished.
    """

    def __init__(self) -> None:
        self.killed = 0

    def part_finished(self, part: int, done: int, total: int) -> None:
        """Looks for a process of Ray."""
        if self.killed:
            return
        titles = (b"ray::convert_part", b"ray::IDLE") if 2 * done >= total else (b"ray::convert_part",)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if command.startswith(titles) and is_descendant(parent):
                os.kill(int(entry.name), signal.SIGKILL)
                self.killed = int(entry.name)
                return


def is_descendant(pid: int) -> bool:
    """Whether a process was started by this one, at whatever distance."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return False
    return False


def test_a_cluster_writes_the_files_that_one_process_writes_and_survives_a_lost_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same names, same bytes; errors of the user's come back as they are."""
    monkeypatch.setattr(parts, "SMALLEST_PART", 24 << 10)
    model, tensors = family_checkpoint(tmp_path / "model", "deepseek_v3")
    run_conversion(model, tmp_path / "alone", format="ascend")
    settings = {"model": str(model), "output": str(tmp_path / "out"), "format": "ascend", "workers": 2}
    plan = plan_conversion(ConversionConfig.model_validate(settings))
    assert len(plan.parts) > 5
    pool = ClusterPool(address=None, workers=2, memory_per_worker=plan.memory_per_worker)
    killer = Killer()
    convert(plan, killer, pool)
    assert killer.killed
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")

    name = "model.layers.0.self_attn.o_proj.weight"
    broken = tensors[name].copy()
    broken[0, 0] = float("nan")
    import json

    config = json.loads((model / "config.json").read_text())
    save_checkpoint(tmp_path / "broken", config, {**tensors, name: broken})
    settings |= {"model": str(tmp_path / "broken"), "output": str(tmp_path / "no")}
    plan = plan_conversion(ConversionConfig.model_validate(settings))
    with pytest.raises(CheckpointError, match="o_proj: a value is not finite"):
        convert(plan, SilentProgress(), pool)
