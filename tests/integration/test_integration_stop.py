"""A job that is told to end: `ray job stop` and Kubernetes send SIGTERM."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs import small_recipe

from gs_dist.checkpoint.job_log import read_status


@pytest.mark.ray
def test_a_job_that_is_told_to_end_says_how_to_go_on_and_leaves_no_stack_trace(tmp_path: Path) -> None:
    """As Ctrl-C does; its status says that it was stopped, and does not look like a failure."""
    config = small_recipe(tmp_path, "job", calibration={"micro_batch_size": 1})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "gs_dist", "quantize", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while read_status(Path(config.output)) is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "stopped; run the same command again" in said
    assert "SIGTERM" not in said
    assert "Traceback" not in said
    status = read_status(Path(config.output))
    assert status is not None
    assert status.state == "stopped"
