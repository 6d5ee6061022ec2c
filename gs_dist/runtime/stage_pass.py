"""A stage's passes over the samples: its layers run micro-batch by micro-batch, and those of a wave are observed."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gs_dist.calibration.activation_store import ActivationStore
from gs_dist.calibration.decoder_layer import DecoderLayer
from gs_dist.calibration.device import Device
from gs_dist.calibration.float16_watch import Float16Watch
from gs_dist.calibration.layer_loop import LayerLoop
from gs_dist.calibration.network import DecoderNetwork, RoutedActivation
from gs_dist.calibration.observers import CardObserver, HostObserver
from gs_dist.checkpoint.lineage import EMBEDDING, Lineage, checksums
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.solved_layer import read_solved
from gs_dist.checkpoint.source_tensors import HEAD
from gs_dist.data.dataset import TokenBatch, open_dataset, samples_fingerprint
from gs_dist.errors import CheckpointError, DatasetError, LayerError
from gs_dist.recipe.config import base_name
from gs_dist.runtime.job import Job
from gs_dist.runtime.layer_statistics import Mask, MergedStatistics, Origin, Payload, write_kept
from gs_dist.runtime.partial_sums import PartialSums, check_partial_sums
from gs_dist.runtime.schedule import StageWave
from gs_dist.solvers.threads import Threads

__all__ = ["StagePass"]

_SAME_FILES = "give every node the same files, on storage that all share, and leave them alone while the job runs"


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
        self._threads = Threads(job.plan.threads_per_worker)
        self._layers: dict[tuple[int, bool], DecoderLayer] = {}
        self._outer: Any = None
        self._store = ActivationStore()
        self._kept: dict[int, tuple[Mask, Origin]] = {}  # of what is in the store
        self._wave: StageWave | None = None
        self._ran = range(0)  # micro-batches of the wave
        self._checksums: dict[int, dict[str, str]] = {}  # of the source tensors of layers that were loaded
        self._embedding = ""  # checksum
        self._origins: list[Origin] = []  # of the micro-batches that entered the wave
        self._solved: dict[int, Lineage] = {}  # of the quantised layers that were loaded
        self._loops: list[LayerLoop] = []
        self._float16_watches: dict[int, Float16Watch] = {}
        self._batches: Iterator[TokenBatch] = iter(())

    def begin(self, wave: StageWave, start: int, stop: int) -> None:
        """Gets ready for a pass over micro-batches [start, stop): loads weights, makes observers."""
        self._wave = wave
        self._ran = range(start, start)
        self._origins = []
        self._float16_watches.clear()
        if wave.frees_layers:
            self._layers.clear()
        boundaries = [wave.first_layer, *([] if wave.keep_at is None else [wave.keep_at]), wave.end_layer]
        self._loops = [self._make_loop(wave, range(*bounds)) for bounds in itertools.pairwise(boundaries)]
        for index in range(wave.first_layer, wave.end_layer):
            self._layer(index, quantized=wave.quantized).load()
            if not wave.quantized:
                self._checksums[index] = checksums(self._reader.read_layer(index))  # now, while it is read
        if wave.stage == 0 and not wave.from_store:
            self._batches = self._open_batches(start, stop)
            if self._outer is None:
                embedding = self._reader.read([EMBEDDING])
                self._embedding = checksums(embedding)[EMBEDDING]
                self._outer = self._network.outer_weights(embedding)

    def _layer(self, index: int, *, quantized: bool) -> DecoderLayer:
        layer = self._layers.get((index, quantized))
        if layer is None:
            published = None
            if quantized:
                published, self._solved[index] = read_solved(Path(self._job.config.output), index)
            layer = self._layers[(index, quantized)] = DecoderLayer(self._network, self._reader, index, published)
        return layer

    def _lineage(self, layer: int, behind: str) -> Lineage:
        """Of a layer of the wave, of which the first one is behind of `behind`.

        Raises:
            CheckpointError: a quantised layer that was run was solved behind other weights.
        """
        wave = self._wave
        assert wave is not None
        for index in range(wave.first_layer, layer + 1):
            if wave.quantized:
                lineage = self._solved[index]
                if lineage.behind != behind:
                    raise CheckpointError(
                        f"{self._reader.architecture.layer_prefix(index).rstrip('.')}: was solved behind other weights "
                        "than the layers before it have now: the model changed during the run. Restore what it was, or "
                        "set output to another directory"
                    )
            else:
                lineage = Lineage(behind=behind, tensors=self._checksums[index])
            behind = lineage.after
        return lineage

    def _origin_at(self, end: int, origin: Origin) -> Origin:
        """Of hidden states that entered the wave from `origin` and ran through its layers before `end`."""
        assert self._wave is not None
        if end == self._wave.first_layer:
            return origin
        return Origin(origin.samples, self._lineage(end - 1, origin.behind).after)

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
            [self._layer(index, quantized=wave.quantized) for index in layers],
            settings={index: plan.layer_settings(index) for index in wave.observed if index in layers},
            channels={index: self._reader.architecture.layers[index].channels for index in wave.observed},
            blocks=plan.blocks,
            observer=partial(HostObserver, threads=self._threads) if self._device.kind.on_host else CardObserver,
            threads=self._threads,
            watch=self._watch_float16 if self._reader.architecture.dtype == "float16" else None,
        )

    def _watch_float16(
        self, index: int, micro_batch: int, before: Any, after: Any, captured: Mapping[str, Any], mask: Mask
    ) -> None:
        """Refuses what a server of a float16 checkpoint would turn into infinity."""
        # A card computes in float16 itself, so that its hidden states tell all.
        found = captured if self._device.kind.on_host else {}
        routed = {name: part for name, part in found.items() if isinstance(part, RoutedActivation)}
        self._float16_watch(index).look(
            micro_batch,
            self._device.to_numpy(before),
            self._device.to_numpy(after),
            {name: self._device.to_numpy(activation) for name, activation in found.items() if name not in routed},
            mask,
            {
                name: (self._device.to_numpy(part.values)[: part.num_routed], part.tokens[: part.num_routed])
                for name, part in routed.items()
            },
        )

    def _float16_watch(self, index: int) -> Float16Watch:
        if index not in self._float16_watches:
            architecture = self._reader.architecture
            last = index == architecture.num_layers - 1
            norm, head = "model.norm.weight", EMBEDDING if architecture.tie_word_embeddings else HEAD
            behind = self._reader.read([norm, head]) if last else {}
            self._float16_watches[index] = Float16Watch(
                architecture.layer_prefix(index),
                architecture.layers[index],
                self._reader.read_layer(index),
                epsilon=architecture.rms_norm_eps,
                final_norm=behind.get(norm),
                head=behind.get(head),
            )
        return self._float16_watches[index]

    def step(self, micro_batch: int, payload: Payload | None) -> Payload | None:
        """Runs one micro-batch through the wave; micro-batches come in ascending order."""
        wave = self._wave
        assert wave is not None
        assert micro_batch == self._ran.stop, (micro_batch, self._ran)
        self._ran = range(self._ran.start, micro_batch + 1)
        hidden, mask, origin = self._input(micro_batch, payload)
        self._origins.append(origin)
        for number, loop in enumerate(self._loops):
            if number:  # the boundary between the two loops is where hidden states are kept
                self._store.put(micro_batch, self._device.to_numpy(hidden))
                assert wave.keep_at is not None
                self._kept[micro_batch] = mask, self._origin_at(wave.keep_at, origin)
            hidden = loop.run(micro_batch, hidden, mask)
        if not wave.emits:
            return None
        return Payload(self._device.to_numpy(hidden), mask, self._origin_at(wave.end_layer, origin))

    def _input(self, micro_batch: int, payload: Payload | None) -> tuple[Any, Mask, Origin]:
        assert self._wave is not None
        if self._wave.from_store:
            return self._device.to_tensor(self._store.get(micro_batch)), *self._kept[micro_batch]
        if self._wave.stage > 0:
            assert payload is not None
            return self._device.to_tensor(payload.hidden), payload.mask, payload.origin
        batch = next(self._batches)
        assert batch.index == micro_batch, (batch.index, micro_batch)
        mask = None if batch.mask.all() else batch.mask
        samples = batch.digests()
        self._refuse_other_samples(micro_batch * self._job.plan.config.calibration.samples_per_micro_batch, samples)
        return self._network.embed(self._outer, batch.input_ids), mask, Origin(samples, self._embedding)

    def _refuse_other_samples(self, first: int, samples: tuple[bytes, ...]) -> None:
        expected = self._job.samples[first : first + len(samples)]
        differing = [first + row for row, pair in enumerate(zip(samples, expected, strict=False)) if pair[0] != pair[1]]
        if differing:
            files = ", ".join(map(base_name, self._job.config.calibration.data))
            raise DatasetError(
                f"sample {differing[0]} of {files} is another one for replica {self._replica} (node {platform.node()}) "
                f"than for the coordinator: {_SAME_FILES}"
            )

    def partial_sums(self, layer: int) -> PartialSums:
        """This replica's partial sums of an observed layer, for the layer's owner; they are freed here."""
        sums = self._own_sums(layer).sealed()
        self._loop_of(layer).forget(layer)
        return sums

    def _own_sums(self, layer: int) -> PartialSums:
        assert self._wave is not None
        behind = {origin.behind for origin in self._origins}
        assert len(behind) <= 1, "weights do not change between the micro-batches of a pass"
        ran = range(self._wave.first_layer, layer + 1)
        return PartialSums(
            layer=layer,
            replica=self._replica,
            start=self._ran.start,
            stop=self._ran.stop,
            weights={i: Lineage(behind="", tensors=self._checksums[i]).own for i in ran},
            behind=next(iter(behind), ""),
            samples=tuple(sample for origin in self._origins for sample in origin.samples),
            nodes=self._loop_of(layer).nodes(layer),
        )

    def _loop_of(self, layer: int) -> LayerLoop:
        return next(loop for loop in self._loops if loop.observes(layer))

    def merged(self, layer: int, others: Sequence[PartialSums]) -> MergedStatistics:
        """All statistics of a layer; they are freed here.

        Raises:
            LayerError: the partial sums are not whole.
            CheckpointError: another replica observed other weights.
            DatasetError: other samples were fed than those that were fingerprinted.
        """
        prefix = self._reader.architecture.layer_prefix(layer).rstrip(".")
        own = self._own_sums(layer)
        check_partial_sums(own, others, self._job.plan.blocks, prefix=prefix)
        self._check_samples([own, *others], prefix)
        loop = self._loop_of(layer)
        statistics = loop.merged(layer, itertools.chain.from_iterable(sums.nodes for sums in others))
        loop.forget(layer)
        if not any(seen.num_tokens for seen in statistics.values()):
            raise LayerError(
                f"{prefix}: no token was observed, so there is nothing to solve it from: give other samples"
            )
        behind = next(sums.behind for sums in (own, *others) if sums.samples)
        return MergedStatistics(statistics, self._lineage(layer, behind))

    def _check_samples(self, sums: Sequence[PartialSums], prefix: str) -> None:
        """What all replicas fed together is what was fingerprinted."""
        ordered = sorted(sums, key=lambda part: part.start)
        samples = [sample for part in ordered for sample in part.samples]
        length = self._job.config.calibration.sequence_length
        if samples_fingerprint(length, samples) != self._job.fingerprints.data:
            nodes = ", ".join(f"replica {part.replica} (node {part.node})" for part in ordered)
            raise DatasetError(
                f"{prefix}: the samples that {nodes} fed are not those that were fingerprinted when the job began: "
                f"{_SAME_FILES}"
            )

    def leave_for_solve(self, layer: int, merged: MergedStatistics) -> None:
        """Leaves statistics in the job's output."""
        write_kept(self._job, layer, merged)

    keep = leave_for_solve
