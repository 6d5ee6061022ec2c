"""A stage of a model under evaluation: the float model's layers, or the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gs_dist.calibration.dataset import TokenBatch, open_dataset
from gs_dist.calibration.device import open_device
from gs_dist.calibration.network import DecoderNetwork, LayerWeights
from gs_dist.checkpoint.formats import FORMATS
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.config import CalibrationData

__all__ = ["FLOAT", "Evaluation", "EvaluationWorker"]

FLOAT = "float"
"""Names the float model where a format's name would name a published one."""

Payload = tuple[npt.NDArray[Any], TokenBatch]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What every worker of an evaluation is told.

    Attributes:
        model: directory of the float model, None to leave it out.
        published: format's name to directory of what was published in it.
        data: what perplexity is taken on.
        stages: bounds of each stage's layers.
        max_in_flight: micro-batches between the first and the last stage.
        device, threads_per_worker: as in the recipe.
    """

    model: str | None
    published: Mapping[str, str]
    data: CalibrationData
    stages: tuple[tuple[int, int], ...]
    max_in_flight: int
    device: Literal["auto", "cpu", "ascend"] = "auto"
    threads_per_worker: int = 1


class EvaluationWorker:
    """One stage; the last one gives losses instead of hidden states."""

    def __init__(self, evaluation: Evaluation, stage: int, replica: int) -> None:
        self._evaluation = evaluation
        self._first, self._end = evaluation.stages[stage]
        self._is_first, self._is_last = stage == 0, stage == len(evaluation.stages) - 1
        self._device = open_device(evaluation.device, threads=evaluation.threads_per_worker)
        self._layers: list[LayerWeights] = []
        self._batches: Any = None

    def begin(self, which: str, start: int, stop: int) -> None:
        """Loads the float layers (`FLOAT`) or those of a format, and gets ready for micro-batches [start, stop)."""
        evaluation = self._evaluation
        self._layers.clear()
        if which == FLOAT:
            assert evaluation.model is not None
            reader = CheckpointReader(Path(evaluation.model))
        else:
            reader = CheckpointReader(Path(evaluation.published[which]), quantized=True)
        self._network = DecoderNetwork(reader.architecture, self._device)
        for index in range(self._first, self._end):
            if which == FLOAT:
                self._layers.append(self._network.layer_weights(reader.read_layer(index)))
            else:
                layer = FORMATS[which].decode_layer(reader, index)
                self._layers.append(self._network.layer_weights({}, quantized=layer))
        self._outer = self._network.outer_weights(self._outer_tensors(reader))
        if self._is_first:
            dataset = open_dataset(
                evaluation.data,
                reader.architecture.vocab_size,
                reader.tokenizer_file,
                eos_token_id=reader.architecture.end_of_text_id,
                fewer_samples=True,
            )
            self._batches = dataset.batches(start, stop)

    def _outer_tensors(self, reader: CheckpointReader) -> Mapping[str, npt.NDArray[Any]]:
        tied = reader.architecture.tie_word_embeddings
        names = ["model.embed_tokens.weight"] if self._is_first or (self._is_last and tied) else []
        if self._is_last:
            names += ["model.norm.weight"] + ([] if tied else ["lm_head.weight"])
        return reader.read(names)

    def step(self, micro_batch: int, payload: Payload | None) -> Any:
        """Hidden states with their batch, or at the last stage (negative log likelihood, tokens)."""
        if payload is None:
            batch = next(self._batches)
            assert batch.index == micro_batch, (batch.index, micro_batch)
            hidden = self._network.embed(self._outer, batch.input_ids)
        else:
            hidden, batch = self._device.to_tensor(payload[0]), payload[1]
        hidden = self._forward(hidden)
        if not self._is_last:
            return self._device.to_numpy(hidden), batch
        losses, tokens = self._network.token_losses(self._outer, hidden, batch.input_ids, batch.mask)
        return float(np.sum(losses)), int(np.sum(tokens))

    def next_token(self, input_ids: npt.NDArray[np.int32], num_tokens: int, payload: npt.NDArray[Any] | None) -> Any:
        """The token of largest logit after the first `num_tokens` of `input_ids` (1, t), by a full forward pass.

        What stands behind them is not seen, so that one shape serves a whole continuation.

        Returns:
            Hidden states (1, t, h), or at the last stage (token, whether all its logits are finite).
        """
        hidden = self._network.embed(self._outer, input_ids) if payload is None else self._device.to_tensor(payload)
        states = self._device.to_numpy(self._forward(hidden))
        if not self._is_last:
            return states
        row = self._device.to_tensor(states[:, num_tokens - 1 : num_tokens])
        logits = self._device.to_numpy(self._network.logits(self._outer, row)).astype(np.float32).ravel()
        return int(np.argmax(logits)), bool(np.isfinite(logits).all())

    def _forward(self, hidden: Any) -> Any:
        for weights in self._layers:
            hidden, _ = self._network.forward_layer(weights, hidden, capture=False)
        return hidden
