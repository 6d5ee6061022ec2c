"""A stage of a model under evaluation: the float model's layers, or the published ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.calibration.activation_store import ActivationStore
from gs_dist.calibration.device import open_device
from gs_dist.calibration.network import DecoderNetwork, LayerWeights, OuterWeights
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.lineage import Lineage, checksums
from gs_dist.checkpoint.manifest import part_stem
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.dataset import CalibrationDataset, TokenBatch, open_dataset
from gs_dist.errors import CheckpointError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.numbers.token_step import TokenStep
from gs_dist.recipe.sections import CalibrationData
from gs_dist.runtime.batch_losses import BatchLosses, Divergences

__all__ = ["FLOAT", "Evaluation", "EvaluationWorker"]

FLOAT = "float"
"""Names the float model where a format's name would name a published one."""

Payload = tuple[npt.NDArray[Any], TokenBatch]

_CONTINUATION = -1  # beside the indices of micro-batches
_LOGITS_ROWS = 16  # positions whose logits exist at a time while tokens are looked for


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What every worker of an evaluation is told.

    Attributes:
        model: directory of the float model, None to leave it out.
        published: format's name to directory of what was published in it.
        data: what perplexity is taken on.
        stages: of each stage the bounds of the layers that it holds at a time: one pair where all of them fit.
        sources: `Provenance.sources` of what was published: what the float model must be made of; empty where nobody
            noted them.
        max_in_flight: micro-batches between the first and the last stage.
        device, threads_per_worker: as planned.
        compares: whether published models' distributions are compared with the float model's, which then runs first.
        token_step: of what published models round token by token.
        requests: batches that are run in the place of `data`; None for those.
    """

    model: str | None
    published: Mapping[str, str]
    data: CalibrationData
    stages: tuple[tuple[tuple[int, int], ...], ...]
    max_in_flight: int
    device: DeviceKind = DeviceKind.CPU
    threads_per_worker: int = 1
    sources: Mapping[str, str] = field(default_factory=dict)
    compares: bool = False
    token_step: TokenStep = TokenStep.OVER_127_5
    requests: tuple[TokenBatch, ...] | None = None

    @property
    def layers_at_a_time(self) -> int | None:
        """The most layers held at a time by a stage that does not hold all of its own; None where each one does."""
        return max((end - first for groups in self.stages if len(groups) > 1 for first, end in groups), default=None)


class _FloatModel:
    """What the last stage keeps of the float model: its head, and on disk the hidden states that the head reads."""

    def __init__(self) -> None:
        self._sums: Mapping[str, str] = {}
        self._outer: OuterWeights | None = None
        self._states = ActivationStore()

    @property
    def outer(self) -> OuterWeights | None:
        """Norm and head; None before the float model ran."""
        return self._outer

    def keep(self, outer: OuterWeights, sums: Mapping[str, str]) -> None:
        """Remembers norm and head, and checksums of what they are made of."""
        self._outer, self._sums = outer, sums

    def shared(self, sums: Mapping[str, str]) -> OuterWeights | None:
        """Norm and head, if those of a published model have the same checksums."""
        return self._outer if self._sums == sums else None

    def put(self, micro_batch: int, states: npt.NDArray[Any]) -> None:
        """Keeps the hidden states (b, t, h) behind the last layer."""
        self._states.put(micro_batch, states)

    def states(self, micro_batch: int) -> npt.NDArray[Any]:
        """What was kept."""
        return self._states.get(micro_batch)


class EvaluationWorker:
    """One stage; the last one gives losses instead of hidden states.

    A stage of several groups of layers takes all micro-batches through one of them before the next is loaded, and
    keeps their hidden states meanwhile. What it computes is the same to the last bit.
    """

    def __init__(self, evaluation: Evaluation, stage: int, replica: int) -> None:
        self._evaluation = evaluation
        self._groups = evaluation.stages[stage]
        self._is_first, self._is_last = stage == 0, stage == len(evaluation.stages) - 1
        self._device = open_device(evaluation.device, threads=evaluation.threads_per_worker)
        self._which = ""
        self._group: int | None = None
        self._layers: list[LayerWeights] = []
        self._outer: OuterWeights | None = None
        self._dataset: CalibrationDataset | None = None
        self._batches: Iterator[TokenBatch] = iter(())
        self._store = ActivationStore()
        self._float_model = _FloatModel() if evaluation.compares and self._is_last else None
        self._kept: dict[int, TokenBatch] = {}

    def begin(self, which: str, group: int) -> None:
        """Loads a group of the stage's layers, of the float model (`FLOAT`) or of a format, unless they are there."""
        if which != self._which:
            self._open(which)
        if group == self._group:
            return
        self._group = None
        self._layers.clear()  # before others take their place
        for index in range(*self._groups[group]):
            if which == FLOAT:
                tensors = self._reader.read_layer(index)
                own = Lineage(behind="", tensors=checksums(tensors)).own
                self._refuse_other_source(part_stem(index), own, f"layer {index}")
                self._layers.append(self._network.layer_weights(index, tensors))
            else:
                layer = codec_of(which).decode_layer(self._reader, index)
                self._layers.append(self._network.layer_weights(index, {}, quantized=layer))
        self._group = group

    def _open(self, which: str) -> None:
        """Turns to another model; of it what lies outside the layers is loaded."""
        evaluation = self._evaluation
        self._which, self._group, self._outer = "", None, None
        self._layers.clear()
        if which == FLOAT:
            assert evaluation.model is not None
            self._reader = CheckpointReader(Path(evaluation.model))
        else:
            self._reader = CheckpointReader(Path(evaluation.published[which]), quantized=True)
        self._network = DecoderNetwork(self._reader.architecture, self._device, evaluation.token_step)
        self._outer = self._outer_weights(which)
        self._which = which

    def _outer_weights(self, which: str) -> OuterWeights:
        tied = self._reader.architecture.tie_word_embeddings
        names = ["model.embed_tokens.weight"] if self._is_first or (self._is_last and tied) else []
        if self._is_last:
            names += ["model.norm.weight"] + ([] if tied else ["lm_head.weight"])
        tensors = self._reader.read(names)
        if which != FLOAT and self._float_model is None:
            return self._network.outer_weights(tensors)
        sums = {**checksums(tensors), "dtype": str(self._network.dtype)}
        if which == FLOAT:
            for name in tensors:
                self._refuse_other_source(name, sums[name], name)
        shared = None if self._float_model is None else self._float_model.shared(sums)
        outer = shared or self._network.outer_weights(tensors)
        if which == FLOAT and self._float_model is not None:
            self._float_model.keep(outer, sums)
        return outer

    def _refuse_other_source(self, part: str, checksum: str, what: str) -> None:
        if self._evaluation.sources.get(part, checksum) != checksum:
            raise CheckpointError(
                f"{what} of the float model {self._evaluation.model!r} is not what the published model was made from: "
                "give the model it was made of"
            )

    def step(self, micro_batch: int, payload: Payload | None) -> Any:
        """Runs a micro-batch through the loaded layers; the first of a pass is 0, others follow in order.

        Args:
            micro_batch: its index.
            payload: what the stage before gave; None at the first stage, and behind a stage's first group of layers.

        Returns:
            Hidden states with their batch, or at the last stage a `BatchLosses`; None before the stage's last group of
            layers.
        """
        states, batch = (None, self._batch(micro_batch)) if payload is None else payload
        if len(self._groups) > 1:
            self._kept[micro_batch] = batch
        hidden = self._run(micro_batch, batch.input_ids, states)
        if hidden is None:
            return None
        if not self._is_last:
            return self._device.to_numpy(hidden), batch
        assert self._outer is not None
        losses, tokens = self._network.token_losses(self._outer, hidden, batch.input_ids, batch.mask)
        return BatchLosses(
            losses=tuple(losses.tolist()),
            tokens=tuple(tokens.tolist()),
            divergences=self._divergences(micro_batch, hidden, batch),
        )

    def _divergences(self, micro_batch: int, hidden: Any, batch: TokenBatch) -> Divergences | None:
        """From the float model, whose own hidden states are kept for the models that follow."""
        if self._float_model is None:
            return None
        if self._which == FLOAT:
            self._float_model.put(micro_batch, self._device.to_numpy(hidden))
            return None
        assert self._outer is not None
        assert self._float_model.outer is not None, "the float model runs first"
        reference = self._device.to_tensor(self._float_model.states(micro_batch))
        kl, equal = self._network.token_divergences(self._outer, hidden, self._float_model.outer, reference, batch.mask)
        return Divergences(kl=kl, equal=equal)

    def next_tokens(self, input_ids: npt.NDArray[np.int32], num_prompt: int, payload: npt.NDArray[Any] | None) -> Any:
        """The token of largest logit at each place behind the first `num_prompt` of `input_ids` (1, t).

        Each is the one that follows the true tokens of all places before it: what stands at its own place and
        behind is not seen, so that one pass judges a whole continuation.

        Returns:
            Hidden states (1, t, h), or at the last stage (tokens, whether all logits of each are finite), both
            (t - num_prompt,); None before the stage's last group of layers.
        """
        hidden = self._run(_CONTINUATION, input_ids, payload)
        if hidden is None:
            return None
        states = self._device.to_numpy(hidden)
        return self._likeliest(states[:, num_prompt - 1 : -1]) if self._is_last else states

    def _likeliest(self, states: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        assert self._outer is not None
        count = states.shape[1]
        tokens, finite = np.zeros(count, np.int64), np.zeros(count, bool)
        rows = min(count, _LOGITS_ROWS)
        for start in range(0, count, rows):
            # The last rows reach back over some already done, so that all are of one shape.
            part = slice(min(start, count - rows), min(start, count - rows) + rows)
            tensor = self._device.to_tensor(states[:, part])
            logits = self._device.to_numpy(self._network.logits(self._outer, tensor))[0].astype(np.float32)
            tokens[part], finite[part] = logits.argmax(axis=-1), np.isfinite(logits).all(axis=-1)
        return tokens, finite

    def _batch(self, micro_batch: int) -> TokenBatch:
        if self._group != 0:
            return self._kept[micro_batch]
        if micro_batch == 0:
            requests = self._evaluation.requests
            self._batches = self._open_dataset().batches() if requests is None else iter(requests)
        batch = next(self._batches)
        assert batch.index == micro_batch, (batch.index, micro_batch)
        return batch

    def _open_dataset(self) -> CalibrationDataset:
        if self._dataset is None:  # the same for every model of the evaluation
            architecture = self._reader.architecture
            self._dataset = open_dataset(
                self._evaluation.data,
                architecture.vocab_size,
                self._reader.tokenizer_file,
                eos_token_id=architecture.end_of_text_id,
                fewer_samples=True,
            )
        return self._dataset

    def _run(self, index: int, input_ids: npt.NDArray[np.int32], states: npt.NDArray[Any] | None) -> Any:
        """Hidden states behind the loaded layers; None where more layers follow in this stage, and they are kept."""
        assert self._group is not None, "nothing is loaded"
        assert self._outer is not None, "nothing is loaded"
        if self._group > 0:
            hidden = self._device.to_tensor(self._store.get(index))
        elif states is None:
            hidden = self._network.embed(self._outer, input_ids)
        else:
            hidden = self._device.to_tensor(states)
        for weights in self._layers:
            hidden, _ = self._network.forward_layer(weights, hidden, capture=False)
        if self._group < len(self._groups) - 1:
            self._store.put(index, self._device.to_numpy(hidden))
            return None
        return hidden
