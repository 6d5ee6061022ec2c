"""A model under evaluation on its workers: passes over all its layers, a group of them at a time where not all fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.errors import WorkerLostError
from gs_dist.progress import Progress
from gs_dist.runtime.batch_losses import BatchLosses
from gs_dist.runtime.evaluation_worker import FLOAT, Evaluation, EvaluationWorker
from gs_dist.runtime.micro_batches import MicroBatchQueue
from gs_dist.runtime.workers import Reference, WorkerGroup, WorkerKey, as_they_come, value_of

__all__ = ["EvaluatedModel", "chained_groups"]

Report = Callable[[int, int, int], None]
"""Told of a stage that `done` of its `total` steps of a pass are done."""

Send = Callable[[WorkerKey, int, Any], Reference[Any]]
"""Calls a worker with the number of a micro-batch and what the worker before it gives."""

_RAISE = "raise parallel.timeout (--timeout of `gs-dist evaluate`)"


def chained_groups(stages: Sequence[Sequence[object]]) -> list[list[tuple[int, int]]]:
    """What a micro-batch goes through without a halt, as (stage, group), one list after another.

    A stage's last group sends on to the next stage's first one, so that stages which hold all their layers at once
    work at the same time; after any other group hidden states stay with the stage until all micro-batches are through.
    """
    streams: list[list[tuple[int, int]]] = [[]]
    for stage, groups in enumerate(stages):
        for group in range(len(groups)):
            if group:
                streams.append([])
            streams[-1].append((stage, group))
    return streams


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """One model of an evaluation; layers stay loaded from pass to pass where a stage holds all of its at once.

    Attributes:
        which: `FLOAT`, or a format's name.
        evaluation: what the workers were told.
        group: the workers, one replica.
        timeout: seconds within which layers must be loaded and a micro-batch must be through one group of layers.
    """

    which: str
    evaluation: Evaluation
    group: WorkerGroup[EvaluationWorker]
    timeout: float

    @property
    def name(self) -> str:
        """For people."""
        return "the float model" if self.which == FLOAT else f"the {self.which} model"

    def losses(self, num_micro_batches: int, progress: Progress, what: str = "perplexity") -> list[BatchLosses]:
        """Losses of each micro-batch, in order; `what` they are taken for is shown with the progress.

        Raises:
            WorkerLostError: a worker died, or nothing happened for `timeout` seconds.
        """

        def report(stage: int, done: int, total: int) -> None:
            progress.stage_progress(stage, done, total, f"{self.which}, {what}")

        def send(key: WorkerKey, micro_batch: int, payload: Any) -> Reference[Any]:
            return self.group.call(key, EvaluationWorker.step, micro_batch, payload)

        return self._pass(send, num_micro_batches, report)

    def next_tokens(
        self, input_ids: npt.NDArray[np.int32], num_prompt: int, report: Report
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The most likely token at each place behind the first `num_prompt` of `input_ids` (1, t), given those before.

        Returns:
            Tokens and whether all their logits are finite, both (t - num_prompt,).

        Raises:
            WorkerLostError: as above.
        """
        ids = input_ids.copy()  # since workers in this process keep what they are given

        def send(key: WorkerKey, number: int, payload: Any) -> Reference[Any]:
            return self.group.call(key, EvaluationWorker.next_tokens, ids, num_prompt, payload)

        ((tokens, finite),) = self._pass(send, 1, report)
        return tokens, finite

    def _pass(self, send: Send, count: int, report: Report) -> list[Any]:
        """What the last layer's worker gives for each of `count` micro-batches, in order."""
        done: Counter[int] = Counter()
        results: list[Any] = []
        for stream in chained_groups(self.evaluation.stages):
            self._load(stream)
            results = self._stream(stream, send, count, done, report)
        return results

    def _load(self, stream: Sequence[tuple[int, int]]) -> None:
        loading = {
            self.group.call(WorkerKey(stage, 0), EvaluationWorker.begin, self.which, index): (stage, index)
            for stage, index in stream
        }

        def silence(left: Sequence[tuple[int, int]]) -> str:
            return (
                f"no worker loaded its layers within {self.timeout:g} s (waiting for {self.name}, "
                f"{self._where(left)}): {_RAISE} if that really takes longer"
            )

        for _ in as_they_come(self.group, loading, self.timeout, silence):
            pass

    def _stream(
        self, stream: Sequence[tuple[int, int]], send: Send, count: int, done: Counter[int], report: Report
    ) -> list[Any]:
        def through(micro_batch: int) -> Reference[Any]:
            payload: Any = None
            for stage, _ in stream:
                reference = send(WorkerKey(stage, 0), micro_batch, payload)
                payload = value_of(reference)
            return reference

        queue = MicroBatchQueue(range(count), through, self.evaluation.max_in_flight)
        while not queue.finished:
            ready = self.group.wait(queue.fill(), self.timeout)
            if not ready:
                raise WorkerLostError(
                    f"no worker finished a micro-batch for {self.timeout:g} s ({self.name}, {self._where(stream)}: "
                    f"{len(queue.results)} of {count} done): {_RAISE} if one really takes longer"
                )
            for reference in ready:
                queue.take(self.group, reference)
            for stage, _ in stream:
                done[stage] += len(ready)
                report(stage, done[stage], len(self.evaluation.stages[stage]) * count)
        return [queue.results[number] for number in range(count)]

    def _where(self, links: Sequence[tuple[int, int]]) -> str:
        (first, _), (last, _) = links[0], links[-1]
        start, end = self.evaluation.stages[first][links[0][1]][0], self.evaluation.stages[last][links[-1][1]][1]
        stages = f"stage {first}" if first == last else f"stages {first} to {last}"
        return f"layer{f's {start} to {end - 1}' if end - start > 1 else f' {start}'} at {stages}"
