"""Passes of a model under evaluation over its workers, a group of layers at a time where not all fit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import inline_evaluation_group, plan_of, run_inline, small_recipe
from workers import InlineWorkerGroup

from gs_dist.checkpoint.finished_model import unjudged
from gs_dist.checkpoint.manifest import Fingerprints
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.dataset import open_dataset
from gs_dist.errors import CheckpointError, ClusterError, PlanError, UserError, WorkerLostError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.memory import probe_memory
from gs_dist.planning.probe import evaluation_shape
from gs_dist.progress import SilentProgress
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.results.summary import CalibrationSummary, PerplexitySummary
from gs_dist.runtime.evaluate import evaluate
from gs_dist.runtime.evaluated_model import EvaluatedModel, chained_groups
from gs_dist.runtime.evaluation_worker import FLOAT, Evaluation, EvaluationWorker
from gs_dist.runtime.perplexity import compared, losses_of
from gs_dist.runtime.probe import Probe
from gs_dist.runtime.stage_worker import Job
from gs_dist.runtime.workers import WorkerKey

FORMAT = "compressed-tensors"
NUM_LAYERS = 5
RESIDENT = (((0, 5),),)
# One stage by layers, two stages of which neither, only the first, or only the second holds all its layers.
GROUPINGS = {
    "one stage": (((0, 1), (1, 2), (2, 3), (3, 4), (4, 5)),),
    "both stages": (((0, 2), (2, 3)), ((3, 4), (4, 5))),
    "the last stage": (((0, 3),), ((3, 4), (4, 5))),
    "the first stage": (((0, 2), (2, 3)), ((3, 5),)),
}
Stages = tuple[tuple[tuple[int, int], ...], ...]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CalibrationConfig:
    directory = tmp_path_factory.mktemp("groups")
    ptq = {"weight_quant_dtype": "int8", "act_quant_dtype": "int8", "act_quant_granularity": "per_token"}
    return small_recipe(directory, num_layers=NUM_LAYERS, ptq=ptq, max_perplexity_increase=0.5)


@pytest.fixture(scope="module")
def published(config: CalibrationConfig) -> CalibrationSummary:
    return run_inline(config)


def evaluation(config: CalibrationConfig, stages: Stages) -> Evaluation:
    return Evaluation(
        model=config.model,
        published={FORMAT: str(Path(config.output) / FORMAT)},
        data=config.probe_data,
        stages=stages,
        max_in_flight=3,
    )


class Heard(SilentProgress):
    """Remembers what it was told of stages."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, int, str]] = []
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def stage_progress(self, stage: int, done: int, total: int, what: str) -> None:
        self.steps.append((stage, done, total, what))


def _ignore(stage: int, done: int, total: int) -> None:
    """Hears no report."""


def losses_and_tokens(config: CalibrationConfig, stages: Stages, which: str, progress: Any) -> Any:
    group = inline_evaluation_group(evaluation(config, stages), 60.0)
    model = EvaluatedModel(which=which, evaluation=evaluation(config, stages), group=group, timeout=60.0)
    losses = model.losses(config.probe_data.num_micro_batches, progress)
    ids = np.arange(20, dtype=np.int32)[None]
    tokens, finite = model.next_tokens(ids, 3, _ignore)
    assert finite.all()
    return losses, tokens.tolist()


def test_a_stage_sends_on_from_its_last_layers_only() -> None:
    """Stages that hold all their layers form one stream; any other halts after each group but its last."""
    assert chained_groups([[1], [1], [1]]) == [[(0, 0), (1, 0), (2, 0)]]
    assert chained_groups([[1, 1], [1], [1, 1, 1]]) == [
        [(0, 0)],
        [(0, 1), (1, 0), (2, 0)],
        [(2, 1)],
        [(2, 2)],
    ]


@pytest.mark.parametrize("which", [FLOAT, FORMAT])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_layers_a_few_at_a_time_give_the_same_bits(
    config: CalibrationConfig, published: CalibrationSummary, grouping: str, which: str
) -> None:
    """Losses of each micro-batch and tokens equal those of all layers at once, and each step is told."""
    heard = Heard()
    stages = GROUPINGS[grouping]
    found = losses_and_tokens(config, stages, which, heard)
    assert found == losses_and_tokens(config, RESIDENT, which, SilentProgress())
    count = config.probe_data.num_micro_batches
    for stage, groups in enumerate(stages):
        told = [(done, total) for number, done, total, _ in heard.steps if number == stage]
        assert told[-1] == (count * len(groups), count * len(groups))
        assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_a_probe_finds_the_same_whatever_fits(
    config: CalibrationConfig, published: CalibrationSummary, grouping: str
) -> None:
    """Summaries are equal, and layers that do not all fit are loaded no more often than a pass a token."""
    counted: Counter[str] = Counter()

    class Counts(EvaluationWorker):
        def begin(self, which: str, group: int) -> None:
            counted[which] += group != self._group or which != self._which
            super().begin(which, group)

    prints = Fingerprints(recipe="r", source="s", data="d")
    plan = dataclasses.replace(plan_of(config), probe_stages=GROUPINGS[grouping])
    probe = Probe.open(Job(config=config, plan=plan, fingerprints=prints), CheckpointReader(Path(config.model)))
    assert probe is not None

    def make(evaluation: Evaluation, timeout: float) -> InlineWorkerGroup:
        num_stages = len(evaluation.stages)
        return InlineWorkerGroup(partial(Counts, evaluation), num_stages=num_stages, num_replicas=1)

    judged, output = unjudged(Path(config.output), FORMAT), Path(config.output) / FORMAT
    judged.parent.mkdir()
    output.rename(judged)  # where a model lies until the verdict
    try:
        assert probe.run(published, make, SilentProgress()).probes == published.probes
    finally:
        judged.rename(output)
        judged.parent.rmdir()
    at_once = sum(len(groups) == 1 for groups in GROUPINGS[grouping])
    others = sum(len(groups) for groups in GROUPINGS[grouping] if len(groups) > 1)
    assert counted[FORMAT] == at_once + 2 * others
    assert at_once + 2 * others <= counted[FLOAT] <= at_once + (1 + config.probe.max_new_tokens) * others


def _run(model: EvaluatedModel, method: str) -> object:
    if method == "next_tokens":
        return model.next_tokens(np.zeros((1, 4), np.int32), 2, _ignore)
    return model.losses(2, SilentProgress())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "begin",
            "no worker loaded its layers within 7 s (waiting for the compressed-tensors model, layer 1 at stage 0)",
        ),
        ("step", "no worker finished a micro-batch for 7 s (the compressed-tensors model, layer 1 at stage 0: 0 of 2 "),
        (
            "next_tokens",
            "no worker finished a micro-batch for 7 s (the compressed-tensors model, layer 1 at stage 0: 0 of",
        ),
    ],
)
def test_a_wait_without_end_says_what_it_waits_for(
    config: CalibrationConfig, published: CalibrationSummary, method: str, message: str
) -> None:
    """Every wait has the limit of one group of layers; the model, its layers and the setting are named."""

    class Hangs(InlineWorkerGroup):
        """Never ready with the second layer of the first stage, in the pass that calls `method`."""

        limits: set[float] = set()  # noqa: RUF012 - one instance

        def wait(self, references: Sequence[Any], timeout: float) -> list[Any]:
            self.limits.add(timeout)
            loaded = self.calls.count((WorkerKey(0, 0), "begin"))
            hangs = self.calls[-1][1] == method and loaded == (5 if method == "next_tokens" else 2)
            return [] if hangs else super().wait(references, timeout)

    two = evaluation(config, (((0, 1), (1, 2), (2, 3)), ((3, 5),)))
    group = Hangs(partial(EvaluationWorker, two), num_stages=2, num_replicas=1)
    model = EvaluatedModel(which=FORMAT, evaluation=two, group=group, timeout=7.0)
    if method == "next_tokens":
        model.losses(2, SilentProgress())
    with pytest.raises(WorkerLostError) as lost:
        _run(model, method)
    assert str(lost.value).startswith(message)
    assert "raise parallel.timeout" in str(lost.value)
    assert group.limits == {7.0}


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[Evaluation]:
    """Evaluations run with workers in this process, on a machine of 64 GiB; those that ran are in the list."""
    ran: list[Evaluation] = []

    @contextmanager
    def machine(address: str | None, num_cpus: int, **told: object) -> Iterator[ClusterFacts]:
        yield ClusterFacts(num_cpus=2, num_npus=0, memory_bytes=64 << 30)

    def workers(evaluation: Evaluation, timeout: float) -> InlineWorkerGroup:
        ran.append(dataclasses.replace(evaluation, threads_per_worker=1))
        return inline_evaluation_group(ran[-1], timeout)

    monkeypatch.setattr("gs_dist.runtime.evaluate.cluster", machine)
    monkeypatch.setattr("gs_dist.runtime.evaluate.evaluation_workers", workers)
    return ran


def test_stages_of_an_evaluation_share_the_cores_of_the_clusters_nodes(
    config: CalibrationConfig, published: CalibrationSummary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three on two nodes of 24 cores get twelve each, whatever the machine that asks has: none is left without room."""

    @contextmanager
    def two_nodes(address: str | None, num_cpus: int, **told: object) -> Iterator[ClusterFacts]:
        assert address == "auto"
        yield ClusterFacts(num_cpus=48, num_npus=0, memory_bytes=64 << 30, num_nodes=2)

    def workers(evaluation: Evaluation, timeout: float) -> InlineWorkerGroup:
        raise ClusterError(f"{evaluation.threads_per_worker} threads")

    monkeypatch.setattr("gs_dist.runtime.evaluate.cluster", two_nodes)
    monkeypatch.setattr("gs_dist.runtime.evaluate.evaluation_workers", workers)
    with pytest.raises(ClusterError, match=r"^12 threads$"):
        evaluate(config.output, config.probe_data, pipeline_parallel_size=3, address="auto", progress=Heard())


def test_evaluation_takes_as_many_layers_as_the_memory_given_to_it_holds(
    config: CalibrationConfig, published: CalibrationSummary, inline: list[Evaluation]
) -> None:
    """Perplexities are the same, the user is told, and where no layer fits the options to change are named."""

    def run(memory_per_worker: int | None, progress: Heard) -> tuple[PerplexitySummary, ...]:
        return evaluate(
            config.output,
            config.probe_data,
            model=config.model,
            pipeline_parallel_size=2,
            memory_per_worker=memory_per_worker,
            progress=progress,
        )

    heard = Heard()
    whole = run(None, heard)
    assert [len(groups) for groups in inline[-1].stages] == [1, 1]
    told = "calibration.column is auto: input_ids is read (lists of integers)"
    assert heard.messages == [told]
    architecture = CheckpointReader(Path(config.model)).architecture
    shape = evaluation_shape(architecture, DeviceKind.CPU, config.probe_data, max_in_flight=4)
    three_layers = probe_memory(shape, range(3), embeds=False, last=True, compares=True).peak
    assert run(three_layers - 1, heard) == whole
    assert inline[-1].stages == (((0, 2),), ((2, 4), (4, 5)))
    assert heard.messages[1:] == [
        told,
        "up to 2 of a stage's layers are in memory at a time, since they do not all fit",
    ]
    with pytest.raises(
        PlanError, match=r"with one layer in memory at a time stage 0 of 2 needs .* --memory-per-worker"
    ):
        run(1, heard)


def test_every_format_of_a_job_is_evaluated(tmp_path: Path, inline: list[Evaluation]) -> None:
    """Each on its own files, the float model once; figures tell the samples they are over; one format can be named."""
    formats = ["compressed-tensors", "golden-stick"]
    job = small_recipe(tmp_path, num_layers=1, ptq={"weight_quant_dtype": "int8"}, format=formats)
    run_inline(job)
    heard = Heard()
    both = evaluate(job.output, job.calibration, model=job.model, progress=heard)
    assert [found.format for found in both] == formats
    assert list(inline[-1].published.values()) == [f"{job.output}/{name}" for name in formats]
    passes = {what for _, done, total, what in heard.steps if done == total}
    assert passes == {"float, perplexity", *(f"{name}, perplexity" for name in formats)}
    dataset = open_dataset(job.calibration, CheckpointReader(Path(job.model)).architecture.vocab_size)
    for found in both:
        assert found.float_perplexity == pytest.approx(found.perplexity, rel=0.01)
        assert (found.num_samples, found.sequence_length, found.num_tokens) == (20, 32, 20 * 31)
        assert (found.data, found.data_fingerprint) == (("samples.parquet",), dataset.fingerprint())
        assert found.comparison is not None
    (one,) = evaluate(job.output, job.calibration, dialects=["golden-stick"], progress=heard)
    assert (one.format, one.perplexity, one.float_perplexity) == ("golden-stick", both[1].perplexity, None)
    assert one.comparison is None
    (inside,) = evaluate(f"{job.output}/golden-stick", job.calibration, progress=heard)
    assert inside == one
    with pytest.raises(CheckpointError, match="no finished model as ascend: choose from compressed-tensors, golden-st"):
        evaluate(job.output, job.calibration, dialects=["ascend"], progress=heard)


class _Whole:
    """Logits of a whole model at once, in NumPy's float64 from the last layer's hidden states on."""

    def __init__(self, config: CalibrationConfig, which: str) -> None:
        worker = EvaluationWorker(evaluation(config, RESIDENT), 0, 0)
        worker.begin(which, 0)
        self._worker = worker

    def log_probabilities(self, input_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(b, t - 1, vocabulary) of the tokens that follow."""
        worker = self._worker
        states = worker._device.to_numpy(worker._run(-1, input_ids, None)).astype(np.float64)
        outer = worker._outer
        assert outer is not None
        norm, head = (worker._device.to_numpy(tensor).astype(np.float64) for tensor in (outer.norm, outer.head))
        states = states / np.sqrt((states**2).mean(axis=-1, keepdims=True) + 1e-5) * norm
        logits = (states @ head.T)[:, :-1]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("stages", [1, 2])
def test_how_far_a_model_is_from_the_float_one_is_what_whole_distributions_say(
    config: CalibrationConfig, published: CalibrationSummary, inline: list[Evaluation], stages: int
) -> None:
    """Loss, its paired standard error over samples, KL and equal tokens, as NumPy has them of all logits at once."""
    (found,) = evaluate(
        config.output, config.probe_data, model=config.model, pipeline_parallel_size=stages, progress=Heard()
    )
    dataset = open_dataset(config.probe_data, CheckpointReader(Path(config.model)).architecture.vocab_size)
    ids = np.concatenate([batch.input_ids for batch in dataset.batches()])
    ours, theirs = (_Whole(config, which).log_probabilities(ids) for which in (FORMAT, FLOAT))
    chosen = ids[:, 1:, None].astype(np.int64)
    losses = [-np.take_along_axis(logs, chosen, 2)[..., 0] for logs in (ours, theirs)]
    of_samples = (losses[0] - losses[1]).mean(axis=1)  # all samples are of one length
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=-1).reshape(-1)
    made = found.comparison
    assert made is not None
    assert made.standard_error is not None
    assert made.loss_increase == pytest.approx(of_samples.mean(), abs=1e-6)
    assert made.standard_error == pytest.approx(of_samples.std(ddof=1) / np.sqrt(len(of_samples)), rel=1e-3)
    assert made.mean_kl == pytest.approx(kl.mean(), rel=1e-3)
    assert made.kl_99th_percentile == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    assert made.equal_top1 == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).mean(), abs=2 / kl.size)
    assert made.mean_kl > 0
    assert found.float_perplexity is not None
    assert np.log(found.perplexity / found.float_perplexity) == pytest.approx(made.loss_increase, abs=1e-6)


def test_a_model_is_no_distance_from_itself(config: CalibrationConfig) -> None:
    """The float model in place of the published one: every difference is 0."""
    two = dataclasses.replace(evaluation(config, GROUPINGS["both stages"]), compares=True)

    class FloatAlone(EvaluationWorker):
        """Reads the float model whatever it is asked for, and takes it for a published one."""

        def begin(self, which: str, group: int) -> None:
            super().begin(FLOAT, group)
            self._published = which != FLOAT

        def _divergences(self, micro_batch: int, hidden: Any, batch: Any) -> Any:
            self._which = FORMAT if self._published else FLOAT
            try:
                return super()._divergences(micro_batch, hidden, batch)
            finally:
                self._which = FLOAT

    group = InlineWorkerGroup(partial(FloatAlone, two), num_stages=2, num_replicas=1)
    count = config.probe_data.num_micro_batches

    def taken(which: str) -> Any:
        return losses_of(EvaluatedModel(which=which, evaluation=two, group=group, timeout=60.0), count, Heard())

    reference = taken(FLOAT)
    assert all(batch.divergences is None for batch in reference.batches)
    found = compared(taken(FORMAT), reference)
    assert (found.loss_increase, found.standard_error, found.equal_top1) == (0, 0, 1)
    assert found.mean_kl < 1e-6


def test_tokens_are_rounded_as_the_engine_does(
    config: CalibrationConfig, published: CalibrationSummary, inline: list[Evaluation]
) -> None:
    """Engines whose kernels divide by 127 give other figures than those that divide by 127.5; the basis says which."""
    found = {
        engine: evaluate(config.output, config.probe_data, engine=engine, progress=Heard())[0]
        for engine in (None, "transformers", "vllm", "vllm-ascend")
    }
    assert found[None].perplexity == found["transformers"].perplexity
    assert found["vllm"].perplexity == found["vllm-ascend"].perplexity != found[None].perplexity
    assert found["vllm"].basis().endswith(", tokens rounded as vllm does")
    assert [entry.token_step.value for entry in inline] == [127.5, 127.5, 127.0, 127.0]


def test_an_engine_is_asked_for_a_format_that_it_reads(
    config: CalibrationConfig, published: CalibrationSummary, inline: list[Evaluation]
) -> None:
    """Others are refused before anything runs."""
    with pytest.raises(UserError, match="--as mindformers: it reads golden-stick, and not compressed-tensors"):
        evaluate(config.output, config.probe_data, engine="mindformers", progress=Heard())
    with pytest.raises(UserError, match="'vlm' is no engine that is known here: name one of transformers, vllm,"):
        evaluate(config.output, config.probe_data, engine="vlm", progress=Heard())
    assert inline == []


def test_a_head_that_is_the_float_models_is_held_once(config: CalibrationConfig, published: CalibrationSummary) -> None:
    """The published model's norm and head are the float model's own tensors where the bytes are the same."""
    worker = EvaluationWorker(dataclasses.replace(evaluation(config, RESIDENT), compares=True), 0, 0)
    worker.begin(FLOAT, 0)
    kept = worker._outer
    assert kept is not None
    worker.begin(FORMAT, 0)
    assert worker._outer is kept
