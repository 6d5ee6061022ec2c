"""A stage of a replica: gets the statistics of its layers, solves and publishes those it owns, or judges them.

A plain class: Ray wraps it in an actor, and tests drive it in their own process. It knows nothing of
other workers; what they send arrives as arguments.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gs_dist.calibration.device import open_device
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.layer_costs import remove_costs, write_costs
from gs_dist.checkpoint.lineage import Lineage, checksums
from gs_dist.checkpoint.manifest import LayerManifest, publish_layer
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.solved_layer import write_solved
from gs_dist.data.dataset import open_dataset
from gs_dist.errors import CheckpointError, DatasetError, OutputError
from gs_dist.model.statistics import LayerStatistics
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.results.costs import LayerCosts
from gs_dist.runtime.job import Job
from gs_dist.runtime.layer_statistics import KeptStatistics, MergedStatistics, Payload, StatisticsSource
from gs_dist.runtime.partial_sums import PartialSums
from gs_dist.runtime.schedule import StageWave
from gs_dist.runtime.software import Software
from gs_dist.runtime.stage_pass import StagePass
from gs_dist.solvers.blas import one_thread
from gs_dist.solvers.layer import LayerProblem, solve_layer
from gs_dist.solvers.sensitivity import layer_costs

__all__ = ["ACCOUNT", "Job", "Sight", "StageReport", "StageWorker"]


ACCOUNT = ("load", "pass", "partial sums", "solve", "write")
"""What a worker spends time on: weights, passes with what is observed, sums sent and merged, layers, their files."""


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """How a worker spent its time and memory: seconds of each kind of work (`ACCOUNT`), bytes at the peak."""

    stage: int
    replica: int
    seconds: Mapping[str, float]
    peak_memory: int

    @property
    def busy_seconds(self) -> float:
        """Of all kinds."""
        return sum(self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a worker sees from its node: the token in the job's output, None where there is none, and the digest of the
    first sample, None where it feeds none.
    """

    node: str
    token: str | None
    sample: bytes | None


class StageWorker:
    """One stage of one replica.

    Args:
        job: the recipe, the plan and the fingerprints of what it works on.
        stage, replica: which worker this is.
    """

    def __init__(self, job: Job, stage: int, replica: int) -> None:
        plan = job.plan
        self._job = job
        self._stage = plan.stages[stage]
        self._replica = replica
        self._device = open_device(
            plan.device,
            threads=plan.threads_per_worker,
            # Quantised weights are no bfloat16, and their own rounding would be shown beside a second one.
            bfloat16_products=plan.architecture.dtype == "bfloat16" and job.config.propagation == "original",
        )
        try:
            self._reader = CheckpointReader(Path(job.config.model), serving_dtype=job.config.serving_dtype)
        except CheckpointError as error:
            raise CheckpointError(f"node {platform.node()}: {error}") from error
        self._output = Path(job.config.output)
        self._statistics: StatisticsSource
        if job.statistics_from is None:
            self._statistics = StagePass(job, replica, self._reader, self._device)
        else:
            self._statistics = KeptStatistics(job, self._reader)
        self._seconds = dict.fromkeys(ACCOUNT, 0.0)

    @contextmanager
    def _at_work(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[kind] += time.perf_counter() - began

    def software(self) -> Software:
        """Versions and CPU of the worker's process."""
        return Software.here()

    def source(self) -> str:
        """Fingerprint of the float checkpoint as this worker reads it."""
        return self._reader.fingerprint()

    def sight(self, name: str) -> Sight:
        """What this worker finds in the job's output under `name`, and of the samples that it is to feed.

        Raises:
            DatasetError: the samples cannot be read here; the message names the node.
        """
        try:
            token = (self._output / name).read_text()
        except (OSError, UnicodeDecodeError):
            token = None
        return Sight(node=platform.node(), token=token, sample=self._first_sample())

    def _first_sample(self) -> bytes | None:
        if self._stage.stage or self._job.statistics_from is not None:
            return None
        architecture = self._reader.architecture
        try:
            dataset = open_dataset(
                self._job.config.calibration,
                architecture.vocab_size,
                self._reader.tokenizer_file,
                eos_token_id=architecture.end_of_text_id,
            )
            return next(dataset.batches(0, 1)).digests()[0]
        except DatasetError as error:
            raise DatasetError(f"node {platform.node()}: {error}") from error

    def begin(self, wave: StageWave, start: int, stop: int) -> None:
        """Gets ready for a pass over micro-batches [start, stop)."""
        with self._at_work("load"):
            self._statistics.begin(wave, start, stop)

    def step(self, micro_batch: int, payload: Payload | None) -> Payload | None:
        """Runs one micro-batch through the wave; micro-batches come in ascending order.

        Args:
            micro_batch: its index among all of the job.
            payload: what the stage before sent; None at the first stage and for a wave from the store.

        Returns:
            What the next stage takes, None where the wave sends nothing.
        """
        with self._at_work("pass"):
            return self._statistics.step(micro_batch, payload)

    def partial_sums(self, layer: int) -> PartialSums | None:
        """This replica's partial sums of an observed layer, for the layer's owner; they are freed here.

        None where layers are solved from kept statistics.
        """
        with self._at_work("partial sums"):
            return self._statistics.partial_sums(layer)

    def solve(self, layer: int, *others: PartialSums | None) -> LayerManifest:
        """Merges a layer's partial sums, quantises the layer and publishes its shard and manifest.

        Args:
            layer: one that this worker observed and owns.
            others: partial sums of the other replicas.

        Raises:
            LayerError: the layer cannot be quantised as its policies say, or the partial sums are not whole.
            CheckpointError: another replica observed other weights.
        """
        with self._at_work("partial sums"):
            merged = self._merged(layer, others)
        with self._at_work("solve"):
            config, problem = self._job.config, self._problem(layer, merged)
            with one_thread():
                quantized = solve_layer(
                    problem,
                    max_relative_error=config.max_relative_error,
                    max_token_error=config.max_token_error,
                    on_bad_layer=config.on_bad_layer,
                    num_threads=self._job.plan.solver_threads,
                )
            if config.bits == "fixed" and config.sensitivity:
                self._publish_costs(problem, merged.lineage)
        with self._at_work("write"):
            if config.keep_statistics:
                self._statistics.keep(layer, merged)
            solved = None
            if config.propagation == "quantized":
                solved = write_solved(self._output, quantized, merged.lineage)
            return publish_layer(
                self._output,
                quantized,
                self._reader.architecture,
                config.dialects,
                self._job.fingerprints,
                self.software().made_with,
                merged.lineage,
                solved,
            )

    def judge(self, layer: int, *others: PartialSums | None) -> LayerCosts:
        """Merges a layer's partial sums, and publishes what schemes cost beside the statistics to solve it from.

        Args:
            layer: as of `solve`.
            others: likewise.
        """
        with self._at_work("partial sums"):
            merged = self._merged(layer, others)
        with self._at_work("solve"):
            remove_costs(self._output, layer)  # they vouch for the statistics beside them
            self._statistics.leave_for_solve(layer, merged)
            return self._publish_costs(self._problem(layer, merged), merged.lineage)

    def _merged(self, layer: int, others: tuple[PartialSums | None, ...]) -> MergedStatistics:
        return self._statistics.merged(layer, [sums for sums in others if sums is not None])

    def _problem(self, layer: int, merged: MergedStatistics) -> LayerProblem:
        """Raises:
        CheckpointError: the layer's tensors are not those that were observed.
        """
        architecture, tensors = self._reader.architecture, self._reader.read_layer(layer)
        changed = merged.lineage.changed(checksums(tensors))
        if changed:
            raise CheckpointError(
                f"{architecture.layer_prefix(layer)}{changed[0]} changed since it was observed: leave the model alone "
                "during a run"
            )
        return LayerProblem(
            layer=layer,
            prefix=architecture.layer_prefix(layer),
            inputs=architecture.inputs(layer),
            linears=architecture.linears(layer),
            tensors=tensors,
            statistics=self._looked_at(layer, merged.statistics),
            policies=self._job.plan.layer_policies(layer),
            scale_dtype=architecture.dtype,
            dialects=tuple(DIALECTS[name] for name in self._job.config.dialects),
            divides_inputs=False,
            makes_biases=all(codec_of(name).makes_biases for name in self._job.config.dialects),
        )

    def _looked_at(self, layer: int, statistics: LayerStatistics) -> LayerStatistics:
        """What this job would have observed itself, of statistics that may hold more.

        Raises:
            OutputError: kept statistics hold less.
        """
        settings = self._job.plan.solver_settings(layer)
        for name, taken in settings.items():
            lacking = statistics[name].lacking(taken) if name in statistics else ("statistics",)
            if lacking and self._job.statistics_from is not None:
                raise OutputError(
                    f"the statistics kept in {self._job.statistics_from!r} lack {', '.join(lacking)} of "
                    f"layer {layer}'s {name}, which this recipe solves from: gram, sketch_rows or "
                    "precision_recovery was another. Run `gs-dist quantize --keep-statistics` with this recipe"
                )
        return {name: seen.only(settings[name]) if name in settings else seen for name, seen in statistics.items()}

    def _publish_costs(self, problem: LayerProblem, lineage: Lineage) -> LayerCosts:
        with one_thread():
            costs = layer_costs(problem, self._job.plan.schemes, num_threads=self._job.plan.solver_threads)
        found = LayerCosts(layer=problem.layer, costs=costs)
        write_costs(self._output, found, self._job.fingerprints, self.software().made_with, lineage)
        return found

    def report(self) -> StageReport:
        """Time and memory spent so far."""
        return StageReport(
            stage=self._stage.stage,
            replica=self._replica,
            seconds=dict(self._seconds),
            peak_memory=self._device.peak_memory(),
        )
