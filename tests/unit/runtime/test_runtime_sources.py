"""Sources as people have them, through a whole job: what is kept, and what is refused before the first layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import random_tensors, save_checkpoint, save_safetensors, tiny_config
from runs import run_inline, save_samples, small_recipe
from safetensors.numpy import load_file

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import CheckpointError, LayerError, OutputError
from gs_dist.recipe.config import CalibrationConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def recipe(directory: Path, tensors: dict[str, Any], config: dict[str, Any], **changes: Any) -> CalibrationConfig:
    save_checkpoint(directory / "model", config, tensors)
    save_samples(directory / "samples.parquet", config["vocab_size"])
    return small_recipe(directory, **changes)


def test_a_head_of_its_own_is_published_and_the_config_says_so(tmp_path: Path) -> None:
    """Engines then load it, and the check holds the directory against that."""
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors({**config, "tie_word_embeddings": False})
    run = recipe(tmp_path, tensors, config)
    run_inline(run)
    published = Path(run.output) / run.format[0]
    np.testing.assert_array_equal(load_file(published / "outer.safetensors")[HEAD], tensors[HEAD])
    assert json.loads((published / "config.json").read_text())["tie_word_embeddings"] is False
    assert not CheckpointReader(published, quantized=True).architecture.tie_word_embeddings
    assert check(published).clean


def test_a_head_stored_alone_is_published_as_the_embedding(tmp_path: Path) -> None:
    """The config still ties the two, and loaders look for the embedding."""
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    embedding = tensors.pop(EMBEDDING)
    run = recipe(tmp_path, {**tensors, HEAD: embedding}, config)
    run_inline(run)
    published = Path(run.output) / run.format[0]
    outer = load_file(published / "outer.safetensors")
    np.testing.assert_array_equal(outer[EMBEDDING], embedding)
    assert HEAD not in outer
    assert check(published).clean


def test_a_damaged_embedding_row_is_refused_before_the_first_layer(tmp_path: Path) -> None:
    """No sample uses the row, so that nothing else would have met it before the last check."""
    tensors = random_tensors(tiny_config(num_hidden_layers=2))
    tensors[EMBEDDING][127] = np.nan
    run = recipe(tmp_path, tensors, tiny_config())
    save_samples(tmp_path / "samples.parquet", 100)
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' holds nan at \(127, 0\)"):
        run_inline(run)
    assert not list(Path(run.output).glob("*/layer-*"))


def test_foreign_weights_in_the_output_are_refused_before_the_first_layer(tmp_path: Path) -> None:
    """They would make the merge fail after everything else is done."""
    run = recipe(tmp_path, random_tensors(tiny_config()), tiny_config())
    (Path(run.output) / run.format[0]).mkdir(parents=True)
    save_safetensors(Path(run.output) / run.format[0] / "model.safetensors", {"x": np.ones(2, np.float32)})
    with pytest.raises(OutputError, match=r"model\.safetensors: is not of this run"):
        run_inline(run)
    assert not list(Path(run.output).glob("*/layer-*"))


@pytest.mark.parametrize(("dtype", "refused"), [("float16", True), ("bfloat16", False)])
def test_hidden_states_beyond_float16_stop_a_float16_model_alone(dtype: str, refused: bool, tmp_path: Path) -> None:
    """A server would make them infinite, and no linear reads them: the norm before it makes them small again."""
    config = tiny_config(torch_dtype=dtype)
    tensors = random_tensors(config, dtype)
    tensors["model.layers.1.mlp.down_proj.weight"][7] *= 3e4
    run = recipe(tmp_path, tensors, config, ptq={"weight_quant_dtype": "int8"}, max_relative_error=None)
    if not refused:
        run_inline(run)
        return
    with pytest.raises(LayerError, match=r"^model\.layers\.1: .*beyond float16's 65504.*convert it to bfloat16"):
        run_inline(run)
    assert not (Path(run.output) / "done").exists()
