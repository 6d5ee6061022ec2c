"""A conversion beside a peer's and beside `cp` of the same files: whole processes, one after the other."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree

from peer import run_whole

from gs_dist.conversion.config import ConversionConfig
from gs_dist.errors import UserError

__all__ = ["compare_conversion"]

_SCHEMES = {"W8A8_DYNAMIC": "W8A8", "W4A16": "W4A16", "W8A16": "W8A16"}  # as llm-compressor's presets are called


def compare_conversion(
    recipe: Path, overrides: Sequence[str], config: ConversionConfig, peer: str, repeat: int
) -> list[str]:
    """Runs `gs-dist convert`, `model_free_ptq` and `cp` in turn; lines with medians of each and their ratios.

    Memory is the sum of all processes of a run, looked at a few times a second.

    Args:
        recipe: a file with `mode: convert`.
        overrides: laid over it.
        config: what they say.
        peer: an interpreter that has llm-compressor.
        repeat: runs of each.

    Raises:
        UserError: a scheme that the peer has no name for.
    """
    scheme = _SCHEMES.get(config.scheme.upper().replace("-", "_"))
    if scheme is None or config.group_size not in (None, 128):
        raise UserError(f"scheme {config.scheme}: the peer's presets are {', '.join(_SCHEMES)}, in groups of 128")
    workers = "2" if config.workers == "auto" else str(config.workers)
    program = str(Path(__file__).with_name("model_free_run.py"))
    ours, theirs, copies = [], [], []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as name:
            settings = [*overrides, f"output={name}/ours", f"workers={workers}"]
            ours.append(run_whole([sys.executable, "-m", "gs_dist", "convert", str(recipe), *settings]))
            rmtree(f"{name}/ours")
            theirs.append(run_whole([peer, program, config.model, f"{name}/peer", scheme, workers]))
            rmtree(f"{name}/peer")
            copies.append(_copy(config.model, f"{name}/copy"))
    lines = [f"{config.scheme}, {workers} workers, medians of {repeat}"]
    for what, unit, of in (
        ("wall", "s", lambda run: run.wall),
        ("CPU", "s", lambda run: run.cpu),
        ("peak memory", "MiB", lambda run: run.memory / 2**20),
    ):
        mine, other = (statistics.median(map(of, runs)) for runs in (ours, theirs))
        lines.append(f"{what}: {mine:.1f} {unit}, the peer {other:.1f} {unit}; ratio {mine / other:.2f}")
    copied, wall = statistics.median(copies), statistics.median(run.wall for run in ours)
    lines.append(f"cp of the source: {copied:.1f} s; bytes a second of the conversion: {copied / wall:.2f} of cp's")
    return lines


def _copy(model: str, target: str) -> float:
    began = time.perf_counter()
    run_whole(["cp", "-rL", model, target])
    return time.perf_counter() - began
