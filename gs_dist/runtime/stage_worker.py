"""A stage of a replica: runs its layers, observes them, solves and publishes those it owns.

A plain class: Ray wraps it in an actor, and tests drive it in their own process. It knows nothing of
other workers; what they send arrives as arguments.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.calibration.activation_store import ActivationStore
from gs_dist.calibration.decoder_layer import DecoderLayer
from gs_dist.calibration.device import open_device
from gs_dist.calibration.layer_loop import LayerLoop
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.calibration.observers import CardObserver, HostObserver
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.layer_costs import remove_costs, write_costs
from gs_dist.checkpoint.manifest import Fingerprints, LayerManifest, publish_layer
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import read_statistics, write_statistics
from gs_dist.checkpoint.solved_layer import read_solved, write_solved
from gs_dist.data.dataset import TokenBatch, open_dataset
from gs_dist.model.statistics import LayerStatistics
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.results.costs import LayerCosts
from gs_dist.runtime.partial_sums import PartialSums, check_partial_sums, tensors_checksum
from gs_dist.runtime.schedule import StageWave
from gs_dist.runtime.software import Software
from gs_dist.solvers.blas import one_thread
from gs_dist.solvers.layer import LayerProblem, solve_layer
from gs_dist.solvers.sensitivity import layer_costs

__all__ = ["Job", "StageReport", "StageWorker"]

Mask = npt.NDArray[np.bool_] | None
Payload = tuple[npt.NDArray[Any], Mask]
"""Hidden states (batch, sequence, hidden) and the mask of real tokens, None where all are."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of a job is told.

    `statistics_from` is an output whose kept statistics are solved from. With `judges`, layers are not solved:
    what each scheme costs their linears is found out, and their statistics are kept for the solve to come.
    """

    config: CalibrationConfig
    plan: CalibrationPlan
    fingerprints: Fingerprints
    statistics_from: str | None = None
    judges: bool = False


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """How a worker spent its time and memory: seconds working, bytes at the peak."""

    stage: int
    replica: int
    busy_seconds: float
    peak_memory: int


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
        self._device = open_device("ascend" if plan.device == "ascend" else "cpu", threads=plan.threads_per_worker)
        self._reader = CheckpointReader(Path(job.config.model))
        self._output = Path(job.config.output)
        self._network = DecoderNetwork(self._reader.architecture, self._device)
        self._layers: dict[tuple[int, bool], DecoderLayer] = {}
        self._outer: Any = None
        self._store = ActivationStore()
        self._masks: dict[int, Mask] = {}
        self._wave: StageWave | None = None
        self._ran = range(0)  # micro-batches of the wave
        self._checksums: dict[int, int] = {}  # of the source tensors of layers that were loaded
        self._loops: list[LayerLoop] = []
        self._batches: Iterator[TokenBatch] = iter(())
        self._seconds = {"forward": 0.0, "solve": 0.0}

    def software(self) -> Software:
        """Versions and CPU of the worker's process."""
        return Software.here()

    def source(self) -> str:
        """Fingerprint of the float checkpoint as this worker reads it."""
        return self._reader.fingerprint()

    def begin(self, wave: StageWave, start: int, stop: int) -> None:
        """Gets ready for a pass over micro-batches [start, stop): loads weights, makes observers."""
        began = time.perf_counter()
        self._wave = wave
        self._ran = range(start, start)
        if wave.frees_layers:
            self._layers.clear()
        boundaries = [wave.first_layer, *([] if wave.keep_at is None else [wave.keep_at]), wave.end_layer]
        self._loops = [self._make_loop(wave, range(*bounds)) for bounds in itertools.pairwise(boundaries)]
        for index in range(wave.first_layer, wave.end_layer):
            self._layer(index, quantised=wave.quantised).load()
            if not wave.quantised and len(range(start, stop)) < self._job.plan.num_micro_batches:
                self._checksum(index)  # now, while it is read; a replica with all micro-batches is hardly ever asked
        if wave.stage == 0 and not wave.from_store:
            self._batches = self._open_batches(start, stop)
            if self._outer is None:
                self._outer = self._network.outer_weights(self._reader.read(["model.embed_tokens.weight"]))
        self._seconds["forward"] += time.perf_counter() - began

    def _layer(self, index: int, *, quantised: bool) -> DecoderLayer:
        layer = self._layers.get((index, quantised))
        if layer is None:
            published = read_solved(self._output, index) if quantised else None
            layer = self._layers[(index, quantised)] = DecoderLayer(self._network, self._reader, index, published)
        return layer

    def _checksum(self, index: int) -> int:
        if index not in self._checksums:
            self._checksums[index] = tensors_checksum(self._reader.read_layer(index))
        return self._checksums[index]

    def _open_batches(self, start: int, stop: int) -> Iterator[TokenBatch]:
        architecture = self._reader.architecture
        dataset = open_dataset(
            self._job.config.calibration,
            architecture.vocab_size,
            self._reader.tokenizer_file,
            eos_token_id=architecture.end_of_text_id,
        )
        return dataset.batches(start, stop)

    def _make_loop(self, wave: StageWave, layers: range) -> LayerLoop:
        plan = self._job.plan
        return LayerLoop(
            [self._layer(index, quantised=wave.quantised) for index in layers],
            settings={index: plan.layer_settings(index) for index in wave.observed if index in layers},
            channels={index: self._reader.architecture.layers[index].channels for index in wave.observed},
            blocks=plan.blocks,
            observer=HostObserver if self._device.kind == "cpu" else CardObserver,
            num_threads=plan.threads_per_worker,
        )

    def step(self, micro_batch: int, payload: Payload | None) -> Payload | None:
        """Runs one micro-batch through the wave; micro-batches come in ascending order.

        Args:
            micro_batch: its index among all of the job.
            payload: what the stage before sent; None at the first stage and for a wave from the store.

        Returns:
            What the next stage takes, None where the wave sends nothing.
        """
        wave = self._wave
        assert wave is not None
        began = time.perf_counter()
        assert micro_batch == self._ran.stop, (micro_batch, self._ran)
        self._ran = range(self._ran.start, micro_batch + 1)
        hidden, mask = self._input(micro_batch, payload)
        for number, loop in enumerate(self._loops):
            if number:  # the boundary between the two loops is where hidden states are kept
                self._store.put(micro_batch, self._device.to_numpy(hidden))
                self._masks[micro_batch] = mask
            hidden = loop.run(micro_batch, hidden, mask)
        sent = (self._device.to_numpy(hidden), mask) if wave.emits else None
        self._seconds["forward"] += time.perf_counter() - began
        return sent

    def _input(self, micro_batch: int, payload: Payload | None) -> tuple[Any, Mask]:
        assert self._wave is not None
        if self._wave.from_store:
            return self._device.to_tensor(self._store.get(micro_batch)), self._masks[micro_batch]
        if self._wave.stage > 0:
            assert payload is not None
            return self._device.to_tensor(payload[0]), payload[1]
        batch = next(self._batches)
        assert batch.index == micro_batch, (batch.index, micro_batch)
        mask = None if batch.mask.all() else batch.mask
        return self._network.embed(self._outer, batch.input_ids), mask

    def partial_sums(self, layer: int) -> PartialSums | None:
        """This replica's partial sums of an observed layer, for the layer's owner; they are freed here.

        None where layers are solved from kept statistics.
        """
        if self._job.statistics_from is not None:
            return None
        sums = self._own_sums(layer, compared=True).sealed()
        self._loop_of(layer).forget(layer)
        return sums

    def _own_sums(self, layer: int, *, compared: bool) -> PartialSums:
        if compared:
            self._checksum(layer)
        return PartialSums(
            layer=layer,
            replica=self._replica,
            start=self._ran.start,
            stop=self._ran.stop,
            weights={i: checksum for i, checksum in self._checksums.items() if i <= layer},
            nodes=self._loop_of(layer).nodes(layer),
        )

    def _loop_of(self, layer: int) -> LayerLoop:
        return next(loop for loop in self._loops if loop.observes(layer))

    def solve(self, layer: int, *others: PartialSums | None) -> LayerManifest | LayerCosts:
        """Merges a layer's partial sums, quantises the layer and publishes its shard and manifest; or judges it.

        Args:
            layer: one that this worker observed and owns.
            others: partial sums of the other replicas.

        Raises:
            LayerError: the layer cannot be quantised as its policies say, or the partial sums are not whole.
            CheckpointError: another replica observed other weights.
        """
        began = time.perf_counter()
        if self._job.statistics_from is not None:
            statistics = read_statistics(Path(self._job.statistics_from), layer)
        else:
            statistics = self._merged(layer, [sums for sums in others if sums is not None])
        outcome = self._judge(layer, statistics) if self._job.judges else self._solve(layer, statistics)
        self._seconds["solve"] += time.perf_counter() - began
        return outcome

    def _merged(self, layer: int, others: list[PartialSums]) -> LayerStatistics:
        prefix = self._reader.architecture.layer_prefix(layer).rstrip(".")
        own = self._own_sums(layer, compared=bool(others))
        check_partial_sums(own, others, self._job.plan.blocks, prefix=prefix)
        loop = self._loop_of(layer)
        statistics = loop.merged(layer, itertools.chain.from_iterable(sums.nodes for sums in others))
        loop.forget(layer)
        return statistics

    def _problem(self, layer: int, statistics: LayerStatistics) -> LayerProblem:
        architecture = self._reader.architecture
        return LayerProblem(
            layer=layer,
            prefix=architecture.layer_prefix(layer),
            inputs=architecture.inputs(layer),
            linears=architecture.linears(layer),
            tensors=self._reader.read_layer(layer),
            statistics=statistics,
            policies=self._job.plan.layer_policies(layer),
            scale_dtype=architecture.dtype,
            makes_biases=all(codec_of(name).makes_biases for name in self._job.config.dialects),
        )

    def _judge(self, layer: int, statistics: LayerStatistics) -> LayerCosts:
        """Publishes what schemes cost, after the statistics that the layer will be solved from."""
        if self._job.statistics_from is None:
            remove_costs(self._output, layer)  # they vouch for the statistics beside them
            write_statistics(self._output, layer, statistics)
        return self._publish_costs(self._problem(layer, statistics))

    def _publish_costs(self, problem: LayerProblem) -> LayerCosts:
        with one_thread():
            costs = layer_costs(problem, self._job.plan.schemes, num_threads=self._job.plan.solver_threads)
        found = LayerCosts(layer=problem.layer, costs=costs)
        write_costs(self._output, found, self._job.fingerprints)
        return found

    def _solve(self, layer: int, statistics: LayerStatistics) -> LayerManifest:
        architecture, config = self._reader.architecture, self._job.config
        problem = self._problem(layer, statistics)
        with one_thread():
            quantized = solve_layer(
                problem,
                max_relative_error=config.max_relative_error,
                on_bad_layer=config.on_bad_layer,
                num_threads=self._job.plan.solver_threads,
            )
        if config.bits == "fixed" and config.sensitivity:
            self._publish_costs(problem)
        if config.keep_statistics and self._job.statistics_from != config.output:
            write_statistics(self._output, layer, statistics)
        if config.propagation == "quantized":
            write_solved(self._output, quantized)
        made_with = self.software().made_with
        return publish_layer(self._output, quantized, architecture, config.dialects, self._job.fingerprints, made_with)

    def report(self) -> StageReport:
        """Time and memory spent so far."""
        return StageReport(
            stage=self._stage.stage,
            replica=self._replica,
            busy_seconds=sum(self._seconds.values()),
            peak_memory=self._device.peak_memory(),
        )
