"""The comparison of float and published model before a job counts as done."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from runs import SEQUENCE_LENGTH, inline_evaluation_group, published_hashes, run_inline, save_samples, small_recipe
from workers import InlineWorkerGroup

from gs_dist.calibration.device import open_device
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.checkpoint.check import check, check_all
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.finished_model import find_models
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import CheckpointError, DatasetError, JobFailure, UserError, WorkerLostError
from gs_dist.progress import SilentProgress
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.results.summary import read_summary
from gs_dist.runtime.evaluation_worker import FLOAT, Evaluation, EvaluationWorker
from gs_dist.runtime.perplexity import measure
from gs_dist.runtime.stage_worker import Job
from gs_dist.runtime.workers import WorkerKey

NUM_LAYERS = 3
W4 = {"weight_quant_dtype": "qint4x2"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


def recipe(directory: Path, output: str = "out", limit: float | None = 0.5, **changes: Any) -> CalibrationConfig:
    """Four bits on a tiny model: perplexity rises by about 0.2 %."""
    given = {"num_layers": NUM_LAYERS, "ptq": W4, "max_relative_error": None, **changes}
    return small_recipe(directory, output, max_perplexity_increase=limit, **given)


def no_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
    raise AssertionError("no layer is left to be solved")


def inputs(config: CalibrationConfig, count: int) -> np.ndarray[Any, Any]:
    return np.stack(pq.read_table(config.calibration.data[0])["input_ids"].to_pylist()[:count]).astype(np.int32)


def network_of(config: CalibrationConfig, which: str) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Ids (b, t) to logits (b, t, vocabulary) of the float or a published model, without stages or workers."""
    device = open_device("cpu", threads=1)
    if which == FLOAT:
        reader = CheckpointReader(Path(config.model))
    else:
        reader = CheckpointReader(Path(config.output) / which, quantized=True)
    network = DecoderNetwork(reader.architecture, device)
    layers = [
        network.layer_weights(index, reader.read_layer(index))
        if which == FLOAT
        else network.layer_weights(index, {}, quantized=codec_of(which).decode_layer(reader, index))
        for index in range(reader.architecture.num_layers)
    ]
    tied = reader.architecture.tie_word_embeddings
    names = ["model.embed_tokens.weight", "model.norm.weight"] + ([] if tied else ["lm_head.weight"])
    outer = network.outer_weights(reader.read(names))

    def logits(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        hidden = network.embed(outer, ids)
        for weights in layers:
            hidden, _ = network.forward_layer(weights, hidden, capture=False)
        return device.to_numpy(network.logits(outer, hidden)).astype(np.float64)

    return logits


def perplexity(logits: np.ndarray[Any, Any], ids: np.ndarray[Any, Any]) -> float:
    shifted = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
    likelihood = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return math.exp(-np.take_along_axis(likelihood, ids[:, 1:, None].astype(np.int64), -1).mean())


def continuation(logits: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], prompt: list[int], count: int) -> Any:
    """Greedy tokens, each from a sequence that ends where it is read."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(np.asarray([ids], np.int32))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_probe_that_passes_is_in_summary_table_and_card(directory: Path) -> None:
    """Perplexities and equal tokens are those of a plain forward pass, and land wherever the job speaks of itself."""
    config = recipe(directory, "passes", probe={"num_samples": 5, "max_new_tokens": 4})
    summary = run_inline(config)
    (probe,) = summary.probes
    ids = inputs(config, 5)
    float_logits, published_logits = network_of(config, FLOAT), network_of(config, "compressed-tensors")
    assert probe.float_perplexity == pytest.approx(perplexity(float_logits(ids), ids), rel=1e-5)
    assert probe.perplexity == pytest.approx(perplexity(published_logits(ids), ids), rel=1e-5)
    assert (probe.num_samples, probe.num_tokens) == (5, 5 * (SEQUENCE_LENGTH - 1))
    ours, theirs = (continuation(logits, ids[0].tolist(), 4) for logits in (published_logits, float_logits))
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), 4)
    assert (probe.num_new_tokens, probe.num_equal_tokens) == (4, equal)
    output = Path(config.output)
    assert read_summary(output) == summary
    assert (output / "done").exists()
    card = (output / "compressed-tensors" / "README.md").read_text()
    assert f"Before it was published: {probe.sentence()}." in card
    assert f"over 5 samples of the calibration data (155 predicted tokens); {equal} of 4 generated tokens" in card
    metadata = pq.read_schema(output / "summary.parquet").metadata
    assert json.loads(metadata[b"probes"]) == [dataclasses.asdict(probe)]
    assert "max_perplexity_increase: 0.5\n" in (output / "recipe.yaml").read_text()


def test_the_figures_are_those_that_evaluation_measures(directory: Path) -> None:
    """Two stages, two formats: each figure equals to the last bit what `measure` gives for that directory."""
    formats = ["compressed-tensors", "golden-stick"]
    two_stages = {"pipeline_parallel_size": 2}
    config = recipe(directory, "two", format=formats, ptq={"weight_quant_dtype": "int8"}, parallel=two_stages)
    summary = run_inline(config)
    assert [probe.format for probe in summary.probes] == formats
    for probe in summary.probes:
        evaluation = Evaluation(
            model=config.model,
            published={probe.format: str(Path(config.output) / probe.format)},
            data=config.probe_data,
            stages=(((0, 1),), ((1, NUM_LAYERS),)),
            max_in_flight=4,
        )
        group = inline_evaluation_group(evaluation, 60.0)
        found = measure(group, evaluation, 8, 4, 60.0, SilentProgress())
        assert (probe.perplexity, probe.float_perplexity) == (found.published[probe.format], found.float_model)
        assert probe.num_tokens == found.num_tokens


def test_a_probe_above_the_limit_fails_and_a_higher_limit_only_probes(directory: Path) -> None:
    """The message has figures, worst linears and ways out, nothing counts as done, and the layers stay."""
    config = recipe(directory, "fails", limit=1e-4)
    with pytest.raises(JobFailure) as failure:
        run_inline(config)
    text = str(failure.value)
    assert "\n" not in text
    assert text.startswith("compressed-tensors: perplexity ")
    assert "above max_perplexity_increase 0.0001 (0.0100%)" in text
    output = Path(config.output)
    summary = read_summary(output)
    worst = [f"{row.name} {row.largest_error:.3g}" for row in summary.sorted_rows("error")[:3]]
    assert f"; the largest relative errors are {', '.join(worst)}. Raise max_perplexity_increase" in text
    assert "calibration.num_samples" in text
    assert "layer_policies" in text
    assert not (output / "done").exists()
    assert summary.probes == ()
    assert not [path for path in output.rglob("*") if path.name in ("config.json", "model.safetensors.index.json")]
    for engine in (None, "vllm"):
        with pytest.raises(
            UserError, match=r"was refused: compressed-tensors: perplexity .*3 of 3 layers are published$"
        ):
            check_all(output, engine)
        report = check(output / "compressed-tensors", engine)
        assert report.problems[0].rule == "job-finished"
        assert "the job was refused: compressed-tensors: perplexity" in report.render()
    with pytest.raises(CheckpointError, match="was refused: compressed-tensors: perplexity"):
        find_models(output)
    card = output / "compressed-tensors" / "README.md"
    assert card.read_text().startswith("# Not a model: the job was refused\n\ncompressed-tensors: perplexity ")
    hashes = published_hashes(config)
    again = run_inline(recipe(directory, "fails", limit=0.5), make_group=no_group)
    assert (output / "done").exists()
    assert not (output / "refused").exists()
    assert check(output).clean
    assert "Not a model" not in card.read_text()
    assert again.probes[0].increase > 1e-4
    assert again.stages == summary.stages
    assert published_hashes(config) == hashes


def test_a_finished_job_that_fails_a_lower_limit_is_no_longer_done(directory: Path) -> None:
    """A limit may be set afterwards; the output is judged by the recipe that was submitted last."""
    config = recipe(directory, "later", limit=None)
    assert run_inline(config).probes == ()
    assert (Path(config.output) / "done").exists()
    with pytest.raises(JobFailure, match="max_perplexity_increase"):
        run_inline(recipe(directory, "later", limit=0.0), make_group=no_group)
    assert not (Path(config.output) / "done").exists()
    run_inline(config, make_group=no_group)
    assert (Path(config.output) / "done").exists()


class _Overflows(EvaluationWorker):
    """A worker whose model overflows at the second generated token."""

    def __init__(self, which: str, evaluation: Evaluation, stage: int, replica: int) -> None:
        super().__init__(evaluation, stage, replica)
        self._bad, self._loaded = which, ""

    def begin(self, which: str, group: int) -> None:
        super().begin(which, group)
        self._loaded = which

    def next_tokens(self, input_ids: Any, num_prompt: int, payload: Any) -> Any:
        tokens, finite = super().next_tokens(input_ids, num_prompt, payload)
        return tokens, finite & ((self._loaded != self._bad) | (np.arange(len(finite)) != 1))


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("compressed-tensors", "compressed-tensors: the published model gives logits that are not finite after 1 gen"),
        (FLOAT, "the float model itself gives logits that are not finite"),
    ],
)
def test_logits_that_are_not_finite_fail_whatever_the_limit(directory: Path, which: str, message: str) -> None:
    """The model at fault is named."""

    def make(evaluation: Evaluation, timeout: float) -> InlineWorkerGroup:
        return InlineWorkerGroup(partial(_Overflows, which, evaluation), num_stages=1, num_replicas=1)

    config = recipe(directory, "overflows", limit=100.0)
    with pytest.raises(JobFailure, match=message):
        run_inline(config, make_evaluation_group=make)
    assert not (Path(config.output) / "done").exists()


def test_a_worker_lost_while_probing_is_started_again(directory: Path) -> None:
    """One loss is mended; losses without end are told, with what to do."""
    losses = iter([True])

    def make(evaluation: Evaluation, timeout: float, *, forever: bool = False) -> InlineWorkerGroup:
        def loses(key: WorkerKey, method: str) -> bool:
            return method == "next_tokens" and (forever or next(losses, False))

        worker = partial(EvaluationWorker, evaluation)
        return InlineWorkerGroup(worker, num_stages=1, num_replicas=1, loses_worker_at=loses)

    config = recipe(directory, "lost", parallel={"max_restarts": 1})
    with pytest.raises(WorkerLostError, match="all layers are published: submit the same recipe again to probe"):
        run_inline(config, make_evaluation_group=partial(make, forever=True))
    assert len(run_inline(config, make_group=no_group, make_evaluation_group=make).probes) == 1


def test_the_probe_may_have_data_of_its_own(directory: Path) -> None:
    """Fewer samples than asked for are taken as they are; what cannot be read is refused before any work."""
    other = save_samples(directory / "other.parquet", vocab_size=128, num_samples=3, seed=7)
    config = recipe(directory, "other", probe={"data": str(other)})
    (probe,) = run_inline(config).probes
    assert (probe.num_samples, probe.calibration_data) == (3, False)
    ids = np.stack(pq.read_table(other)["input_ids"].to_pylist()).astype(np.int32)
    assert probe.float_perplexity == pytest.approx(perplexity(network_of(config, FLOAT)(ids), ids), rel=1e-5)
    assert "  - other.parquet\n" in (Path(config.output) / "recipe.yaml").read_text()
    missing = recipe(directory, "missing", probe={"data": str(directory / "nowhere.parquet")})
    with pytest.raises(DatasetError, match=r"nowhere\.parquet"):
        run_inline(missing, make_group=no_group)
