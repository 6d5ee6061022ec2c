"""A stage's passes over the samples: its layers run micro-batch by micro-batch, and those of a wave are observed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gs_dist.calibration.activation_store import ActivationStore
from gs_dist.calibration.decoder_layer import DecoderLayer
from gs_dist.calibration.device import Device
from gs_dist.calibration.layer_loop import LayerLoop
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.calibration.observers import CardObserver, HostObserver
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_directory import write_statistics
from gs_dist.checkpoint.solved_layer import read_solved
from gs_dist.data.dataset import TokenBatch, open_dataset
from gs_dist.model.statistics import LayerStatistics
from gs_dist.runtime.job import Job
from gs_dist.runtime.layer_statistics import Mask, Payload
from gs_dist.runtime.partial_sums import PartialSums, check_partial_sums, tensors_checksum
from gs_dist.runtime.schedule import StageWave

__all__ = ["StagePass"]


class StagePass:
    """Statistics from passes that this worker runs.

    Args:
        job: the recipe, the plan and the fingerprints of what it works on.
        replica: which one this worker is of.
        reader: of the float checkpoint.
        device: what the layers run on.
    """

    def __init__(self, job: Job, replica: int, reader: CheckpointReader, device: Device) -> None:
        self._job = job
        self._replica = replica
        self._device = device
        self._reader = reader
        self._network = DecoderNetwork(reader.architecture, device)
        self._layers: dict[tuple[int, bool], DecoderLayer] = {}
        self._outer: Any = None
        self._store = ActivationStore()
        self._masks: dict[int, Mask] = {}
        self._wave: StageWave | None = None
        self._ran = range(0)  # micro-batches of the wave
        self._checksums: dict[int, int] = {}  # of the source tensors of layers that were loaded
        self._loops: list[LayerLoop] = []
        self._batches: Iterator[TokenBatch] = iter(())

    def begin(self, wave: StageWave, start: int, stop: int) -> None:
        """Gets ready for a pass over micro-batches [start, stop): loads weights, makes observers."""
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

    def _layer(self, index: int, *, quantised: bool) -> DecoderLayer:
        layer = self._layers.get((index, quantised))
        if layer is None:
            published = read_solved(Path(self._job.config.output), index) if quantised else None
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
            observer=HostObserver if self._device.kind.on_host else CardObserver,
            num_threads=plan.threads_per_worker,
        )

    def step(self, micro_batch: int, payload: Payload | None) -> Payload | None:
        """Runs one micro-batch through the wave; micro-batches come in ascending order."""
        wave = self._wave
        assert wave is not None
        assert micro_batch == self._ran.stop, (micro_batch, self._ran)
        self._ran = range(self._ran.start, micro_batch + 1)
        hidden, mask = self._input(micro_batch, payload)
        for number, loop in enumerate(self._loops):
            if number:  # the boundary between the two loops is where hidden states are kept
                self._store.put(micro_batch, self._device.to_numpy(hidden))
                self._masks[micro_batch] = mask
            hidden = loop.run(micro_batch, hidden, mask)
        return Payload(self._device.to_numpy(hidden), mask) if wave.emits else None

    def _input(self, micro_batch: int, payload: Payload | None) -> tuple[Any, Mask]:
        assert self._wave is not None
        if self._wave.from_store:
            return self._device.to_tensor(self._store.get(micro_batch)), self._masks[micro_batch]
        if self._wave.stage > 0:
            assert payload is not None
            return self._device.to_tensor(payload.hidden), payload.mask
        batch = next(self._batches)
        assert batch.index == micro_batch, (batch.index, micro_batch)
        mask = None if batch.mask.all() else batch.mask
        return self._network.embed(self._outer, batch.input_ids), mask

    def partial_sums(self, layer: int) -> PartialSums:
        """This replica's partial sums of an observed layer, for the layer's owner; they are freed here."""
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

    def merged(self, layer: int, others: Sequence[PartialSums]) -> LayerStatistics:
        """All statistics of a layer; they are freed here.

        Raises:
            LayerError: the partial sums are not whole.
            CheckpointError: another replica observed other weights.
        """
        prefix = self._reader.architecture.layer_prefix(layer).rstrip(".")
        own = self._own_sums(layer, compared=bool(others))
        check_partial_sums(own, others, self._job.plan.blocks, prefix=prefix)
        loop = self._loop_of(layer)
        statistics = loop.merged(layer, itertools.chain.from_iterable(sums.nodes for sums in others))
        loop.forget(layer)
        return statistics

    def leave_for_solve(self, output: Path, layer: int, statistics: LayerStatistics) -> None:
        """Leaves statistics in an output."""
        write_statistics(output, layer, statistics)

    keep = leave_for_solve
