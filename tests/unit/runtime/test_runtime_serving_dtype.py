"""What is published suits the dtype that it is served in, whatever the checkpoint's own is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import random_tensors as random_weights
from checkpoints import save_checkpoint, tiny_checkpoint, tiny_config
from runs import reader_of, run_inline, save_samples, small_recipe
from safetensors import safe_open

from gs_dist.checkpoint.check import check, judge
from gs_dist.errors import CheckpointError, LayerError, RecipeError
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.recipe.config import CalibrationConfig, recipe_fingerprint
from gs_dist.runtime.evaluation_worker import FLOAT, Evaluation, EvaluationWorker
from gs_dist.runtime.planned import plan_job

STATIC = {"weight_quant_dtype": "int8", "act_quant_dtype": "int8"}


def recipe(directory: Path, dtype: str = "bfloat16", **changes: Any) -> CalibrationConfig:
    if not (directory / "model").is_dir():
        tiny_checkpoint(directory / "model", dtype=dtype)
        save_samples(directory / "samples.parquet", 128)
    return small_recipe(directory, **{"ptq": STATIC, "format": ["ascend"], **changes})


def tensors_of(config: CalibrationConfig, layer: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    path = Path(config.output) / "ascend" / f"layer-{layer:05d}.safetensors"
    with safe_open(path, "numpy") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it has keys() alone


def stated_dtype(config: CalibrationConfig) -> str:
    return str(json.loads((Path(config.output) / "ascend" / "config.json").read_text())["torch_dtype"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, CalibrationConfig]:
    """A bfloat16 model for Ascend, static: as it is, and for cards that serve float16."""
    directory = tmp_path_factory.mktemp("served")
    made: dict[str | None, CalibrationConfig] = {}
    for dtype in (None, "float16"):
        made[dtype] = recipe(directory, output=f"out-{dtype}", serving_dtype=dtype)
        run_inline(made[dtype])
    return made


def test_static_scales_are_float32_for_bfloat16_and_words_for_float16(
    served: dict[str | None, CalibrationConfig],
) -> None:
    """vLLM-Ascend's w8a8_static.py allocates float32, or int64 with the float32's bits; config.json says which."""
    own, half = (tensors_of(config) for config in served.values())
    name = "model.layers.0.mlp.up_proj"
    assert [stated_dtype(config) for config in served.values()] == ["bfloat16", "float16"]
    assert (own[f"{name}.deq_scale"].dtype, half[f"{name}.deq_scale"].dtype) == (np.float32, np.int64)
    assert (own[f"{name}.input_scale"].dtype.name, half[f"{name}.input_scale"].dtype) == ("bfloat16", np.float16)
    words = half[f"{name}.deq_scale"]
    unpacked = np.frombuffer(b"".join(int(word).to_bytes(8, "little")[:4] for word in words), np.float32)
    product = half[f"{name}.input_scale"].astype(np.float32) * half[f"{name}.weight_scale"].astype(np.float32)[:, 0]
    assert np.array_equal(unpacked, product)
    # As a float32 an engine in float16 would make these of the others: zeros.
    assert not own[f"{name}.deq_scale"].astype(np.int64).any()


def test_what_stays_in_float_stays_as_it_is(served: dict[str | None, CalibrationConfig]) -> None:
    """Engines cast it; bit for bit it is the source's, so that it can be compared with that."""
    half = tensors_of(served["float16"])
    assert half["model.layers.0.input_layernorm.weight"].dtype.name == "bfloat16"


def test_both_are_sound_and_say_what_they_are_for(served: dict[str | None, CalibrationConfig]) -> None:
    """The checker takes each by its own dtype, compares it with the source, and tells of the other dtype."""
    for dtype, other in ((None, "float16"), ("float16", "bfloat16")):
        config = served[dtype]
        report = check(Path(config.output) / "ascend", "vllm-ascend", config.model)
        assert report.clean, report.render()
        notes = " ".join(note.text for note in judge(Path(config.output) / "ascend", "vllm-ascend").notes)
        assert f"served with --dtype {other}" in notes
        assert f"serving_dtype: {other} in the recipe" in notes


def test_both_predict_alike(served: dict[str | None, CalibrationConfig]) -> None:
    """The words hold the scales that calibration chose."""
    losses = []
    for config in served.values():
        evaluation = Evaluation(
            model=config.model,
            published={"ascend": f"{config.output}/ascend"},
            data=config.calibration,
            stages=(((0, 2),),),
            max_in_flight=1,
        )
        worker = EvaluationWorker(evaluation, 0, 0)
        found = []
        for which in ("ascend", FLOAT):
            worker.begin(which, 0)
            found.append(sum(worker.step(0, None).losses))
        losses.append(found[0] / found[1])
    assert losses == pytest.approx([1, 1], rel=0.02)


def test_the_serving_dtype_decides_what_is_published(tmp_path: Path) -> None:
    """A run of another one is not gone on with; a recipe without one is what it was."""
    config = recipe(tmp_path)
    assert recipe_fingerprint(config) != recipe_fingerprint(recipe(tmp_path, serving_dtype="float16"))
    assert "serving_dtype" not in config.fingerprint_fields()
    assert reader_of(config).architecture.dtype == "bfloat16"


def planned(config: CalibrationConfig) -> tuple[str, ...]:
    return plan_job(config, reader_of(config), ClusterFacts(num_cpus=4, num_npus=0, memory_bytes=64 << 30)).notes


def test_a_format_whose_readers_cast_nothing_is_of_the_checkpoints_dtype(tmp_path: Path) -> None:
    """Refused at the plan, with what to leave out."""
    config = recipe(tmp_path, format=["golden-stick"], serving_dtype="float16")
    with pytest.raises(
        RecipeError, match="serving_dtype is float16 and the checkpoint is bfloat16, which readers of golden-stick take"
    ):
        planned(config)
    planned(recipe(tmp_path, format=["golden-stick"], serving_dtype="bfloat16"))


def test_the_plan_of_a_static_model_says_which_dtype_it_is_for(tmp_path: Path) -> None:
    """With the key to set; nothing is said where float16 is asked for."""
    assert any("set serving_dtype: float16 for those" in note for note in planned(recipe(tmp_path)))
    assert not any("serving_dtype" in note for note in planned(recipe(tmp_path, serving_dtype="float16")))


@pytest.mark.parametrize(
    ("name", "error"),
    [("model.norm.weight", CheckpointError), ("model.layers.1.input_layernorm.weight", LayerError)],
)
def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path, name: str, error: type[Exception]) -> None:
    """Before the engine makes it an infinity; in bfloat16 it is nothing special."""
    config = tiny_config(torch_dtype="bfloat16")
    tensors = random_weights(config, "bfloat16", 0)
    tensors[name] = tensors[name].copy()
    tensors[name][3] = 1e5
    save_checkpoint(tmp_path / "model", config, tensors, 1)
    save_samples(tmp_path / "samples.parquet", 128)
    with pytest.raises(error, match=r"float16 cannot: set serving_dtype: bfloat16|beyond float16"):
        run_inline(recipe(tmp_path, ptq={"weight_quant_dtype": "int8"}, serving_dtype="float16", max_token_error=None))
    run_inline(recipe(tmp_path, ptq={"weight_quant_dtype": "int8"}, max_token_error=None, max_relative_error=None))
