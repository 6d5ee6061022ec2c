"""A job beside a peer that quantises the same model on the same tokens: whole processes, one after the other."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.dataset import open_dataset
from gs_dist.errors import JobFailure
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.results.summary import read_summary

_MARK = "GS_DIST_BENCHMARK"  # an environment variable that all processes of a run inherit, however they were started
_EVERY = 0.2  # seconds between looks at them
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """A command from start to end: seconds of the clock and of all its processes' CPUs, and bytes at the peak."""

    wall: float
    cpu: float
    memory: int


class _Watch:
    """CPU seconds and resident memory of all processes that carry a mark."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{_MARK}={mark}".encode()
        self._cpu: dict[int, float] = {}
        self.peak = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ends.wait(_EVERY):
            resident = 0
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if self._mark not in (process / "environ").read_bytes():
                        continue
                    fields = (process / "stat").read_text().rpartition(")")[2].split()
                    resident += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                except OSError:
                    continue  # it has ended, or is another user's
                self._cpu[int(process.name)] = (int(fields[11]) + int(fields[12])) / _TICKS
            self.peak = max(self.peak, resident)

    def end(self) -> float:
        """CPU seconds of all, as last seen."""
        self._ends.set()
        self._thread.join()
        return sum(self._cpu.values())


def run_whole(command: Sequence[str]) -> WholeRun:
    """Runs a command and measures it.

    Raises:
        JobFailure: it failed; the message ends with the last of what it said.
    """
    mark = uuid.uuid4().hex
    began = time.perf_counter()
    watch = _Watch(mark)
    ended = subprocess.run(command, env={**os.environ, _MARK: mark}, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - began
    cpu = watch.end()
    if ended.returncode:
        raise JobFailure(f"{command[0]} ended with {ended.returncode}: {(ended.stderr or ended.stdout)[-2000:]}")
    return WholeRun(wall=wall, cpu=cpu, memory=watch.peak)


def save_tokens(config: CalibrationConfig, directory: Path) -> None:
    """The samples of a recipe as tokens.npy, and as tokens.parquet for the job: both read the same."""
    reader = CheckpointReader(Path(config.model))
    dataset = open_dataset(
        config.calibration,
        reader.architecture.vocab_size,
        reader.tokenizer_file,
        eos_token_id=reader.architecture.end_of_text_id,
    )
    ids = np.concatenate([batch.input_ids for batch in dataset.batches(0, config.calibration.num_micro_batches)])
    np.save(directory / "tokens.npy", ids)
    pq.write_table(pa.table({"input_ids": list(ids.astype(np.int32))}), directory / "tokens.parquet")


def compare(recipe: Path, overrides: Sequence[str], config: CalibrationConfig, peer: str, repeat: int) -> list[str]:
    """Runs the job and the peer in turn; lines with medians of each and their ratios.

    A job's memory is the sum of its workers' peaks, as they measured them; the peer is one process.

    Args:
        recipe: a file, as `gs-dist quantize` takes it.
        overrides: laid over it.
        config: what they say.
        peer: an interpreter that has llm-compressor.
        repeat: runs of each.
    """
    ours, theirs = [], []
    policy = json.dumps(config.network_policy.model_dump(mode="json"))
    program = str(Path(__file__).with_name("llm_compressor_run.py"))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        save_tokens(config, place)
        for number in range(repeat):
            output = place / f"ours{number}"
            settings = [*overrides, f"output={output}", f"calibration.data={place}/tokens.parquet"]
            run = run_whole([sys.executable, "-m", "gs_dist", "quantize", str(recipe), *settings])
            workers = sum(stage.peak_memory_measured or 0 for stage in read_summary(output).stages)
            ours.append(WholeRun(wall=run.wall, cpu=run.cpu, memory=workers))
            command = [peer, program, config.model, f"{place}/tokens.npy", f"{place}/peer{number}", policy]
            theirs.append(run_whole(command))
    lines = [f"{config.calibration.num_samples} x {config.calibration.sequence_length} tokens, medians of {repeat}"]
    for what, unit, of in (
        ("wall", "s", lambda run: run.wall),
        ("CPU", "s", lambda run: run.cpu),
        ("peak memory", "MiB", lambda run: run.memory / 2**20),
    ):
        mine, other = (statistics.median(map(of, runs)) for runs in (ours, theirs))
        lines.append(f"{what}: {mine:.1f} {unit}, the peer {other:.1f} {unit}; ratio {mine / other:.2f}")
    return lines
