"""What a person sees when the disk is full, the checkpoint is damaged, or the data hold one enormous value."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import random_tensors, save_checkpoint, tiny_config
from runs import W8A8, published_hashes, run_inline, small_recipe

from gs_dist.checkpoint.output_lock import locked
from gs_dist.errors import LayerError, OutputError, UserError

NUM_LAYERS = 18
PLAIN_W8A8 = {"weight_quant_dtype": "int8", "act_quant_dtype": "int8"}


def _mount(*arguments: str) -> bool:
    tool = shutil.which(arguments[0])
    return tool is not None and subprocess.run([tool, *arguments[1:]], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, a few layers' worth."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not _mount("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)):
        pytest.skip("mounting a small file system needs root")
    yield disk
    _mount("umount", str(disk))


def test_a_full_disk_ends_the_job_and_more_room_goes_on(tmp_path: Path, small_disk: Path) -> None:
    """The message says that the disk is full; what fitted is kept, nothing looks finished, and a rerun ends right."""
    reference = small_recipe(tmp_path, num_layers=6)
    run_inline(reference)
    config = small_recipe(tmp_path, "disk/out")
    with pytest.raises(OutputError, match=r"layer-0000\d\.(safetensors|json): the disk is full; free space and"):
        run_inline(config)
    kept = sorted(path.name for path in (small_disk / "out" / "manifests").glob("layer-*.json"))
    assert 0 < len(kept) < 6
    assert not (small_disk / "out" / "done").exists()
    assert not list((small_disk / "out").rglob(".gs-dist-*")), "what did not fit is not left half written"
    assert _mount("mount", "-o", "remount,size=4m", str(small_disk))
    before = {name: (small_disk / "out" / "manifests" / name).stat().st_mtime_ns for name in kept}
    run_inline(config)
    assert published_hashes(config) == published_hashes(reference)
    after = {name: (small_disk / "out" / "manifests" / name).stat().st_mtime_ns for name in kept}
    assert after == before, "finished layers were kept"


def _damaged_model(directory: Path, dtype: str = "float32") -> None:
    config = tiny_config(num_hidden_layers=NUM_LAYERS, torch_dtype=dtype)
    tensors = random_tensors(config, dtype)
    tensors["model.layers.17.mlp.up_proj.weight"][3, 5] = np.nan
    save_checkpoint(directory / "model", config, tensors)
    _save_ids(directory, np.random.default_rng(0).integers(0, 128, (20, 32)))


def _save_ids(directory: Path, ids: np.ndarray[Any, Any]) -> None:
    pq.write_table(pa.table({"input_ids": list(ids.astype(np.int32))}), directory / "samples.parquet")


def test_a_weight_that_is_not_a_number_is_named_and_the_layers_before_it_are_kept(tmp_path: Path) -> None:
    """A NaN in layer 17 ends the job with that layer's name and no `done`."""
    _damaged_model(tmp_path)
    config = small_recipe(tmp_path, parallel={"layers_per_wave": 6})
    with pytest.raises((LayerError, UserError), match=r"model\.layers\.17") as failure:
        run_inline(config)
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "out" / "done").exists()
    assert len(list((tmp_path / "out" / "manifests").glob("layer-*.json"))) >= 12


def _model_with_outlier(directory: Path, dtype: str, size: float) -> None:
    """Token 7 alone uses channel 5, and the first norm makes that channel enormous."""
    config = tiny_config(torch_dtype=dtype)
    tensors = random_tensors(config, dtype)
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 5] = 0
    embedding[7, :] = 0
    embedding[7, 5] = 1
    tensors["model.layers.0.input_layernorm.weight"][5] = size
    save_checkpoint(directory / "model", config, tensors)
    ids = np.random.default_rng(0).integers(8, 128, (20, 32))
    ids[9, 9] = 7
    _save_ids(directory, ids)


def test_one_huge_outlier_in_the_calibration_is_refused_and_named_in_the_summary(tmp_path: Path) -> None:
    """Rounding everything else to zero shows in no error that is relative to the outlier, but in the median token's:
    refused as it comes, kept in float where that is asked for, told by a note where no limit is set.
    """
    _model_with_outlier(tmp_path, "float32", 1e4)
    destroyed = (
        r"model\.layers\.0\.self_attn\.q_proj: .* of the median token's output is lost \(max_token_error is 0\.5"
    )
    with pytest.raises(LayerError, match=destroyed):
        run_inline(small_recipe(tmp_path, "refused", ptq=PLAIN_W8A8))
    assert not (tmp_path / "refused" / "done").exists()
    kept = run_inline(small_recipe(tmp_path, "kept", ptq=PLAIN_W8A8, on_bad_layer="keep_float"))
    strategies = {row.name: row.strategy for row in kept.rows}
    assert [strategies[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"] == ["NA"] * 3
    assert strategies["model.layers.1.self_attn.q_proj"] != "NA"
    config = small_recipe(tmp_path, ptq=PLAIN_W8A8, max_token_error=None)
    rows = {row.name: row for row in run_inline(config).rows}
    (note,) = rows["model.layers.0.self_attn.q_proj"].notes
    assert "channels are mostly rounded to 0" in note
    assert "a value of 8e+04 was seen (channel 5)" in note
    assert rows["model.layers.1.self_attn.q_proj"].notes == ()
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert note in json.dumps(written, ensure_ascii=False)


@pytest.mark.parametrize("on_bad_layer", ["fail", "keep_float"])
def test_hidden_states_that_float16_cannot_hold_stop_the_job(tmp_path: Path, on_bad_layer: str) -> None:
    """A float16 checkpoint whose server would compute infinity is refused whatever becomes of single linears."""
    _model_with_outlier(tmp_path, "float16", 3e4)
    with pytest.raises(LayerError, match=r"layers\.0: the hidden states behind it reach .* beyond float16's 65504"):
        run_inline(small_recipe(tmp_path, ptq=W8A8, on_bad_layer=on_bad_layer))
    assert not (tmp_path / "out" / "done").exists()


HOLDER = """
import sys, time
from pathlib import Path
from gs_dist.checkpoint.output_lock import locked
with locked(Path(sys.argv[1])):
    print('locked', flush=True)
    time.sleep(600)
"""


def test_a_second_job_on_an_output_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    """While a job is at work its output is in use; the lock dies with it, however it dies."""
    output = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"locked\n"
        with pytest.raises(OutputError, match="is in use by another job"), locked(output):
            pass
        os.kill(first.pid, signal.SIGKILL)
        first.wait(30)
        with locked(output):
            pass
    finally:
        first.kill()
        first.wait(30)
