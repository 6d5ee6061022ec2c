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
from gs_dist.runtime.evaluation_worker import FLOAT, Evaluation
from gs_dist.runtime.worker_group import WorkerGroup, WorkerKey

__all__ = ["EvaluatedModel", "chained_groups"]

Report = Callable[[int, int, int], None]
"""Told of a stage that `done` of its `total` steps of a pass are done."""

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
    group: WorkerGroup
    timeout: float

    @property
    def name(self) -> str:
        """For people."""
        return "the float model" if self.which == FLOAT else f"the {self.which} model"

    def losses(self, num_micro_batches: int, progress: Progress) -> list[tuple[float, int]]:
        """Negative log likelihood in nats and number of predicted tokens of each micro-batch, in order.

        Raises:
            WorkerLostError: a worker died, or nothing happened for `timeout` seconds.
        """

        def report(stage: int, done: int, total: int) -> None:
            progress.stage_progress(stage, done, total, f"{self.which}, perplexity")

        return self._pass("step", [(micro_batch,) for micro_batch in range(num_micro_batches)], report)

    def next_tokens(
        self, input_ids: npt.NDArray[np.int32], num_prompt: int, report: Report
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The most likely token at each place behind the first `num_prompt` of `input_ids` (1, t), given those before.

        Returns:
            Tokens and whether all their logits are finite, both (t - num_prompt,).

        Raises:
            WorkerLostError: as above.
        """
        # A copy, since workers in this process keep what they are given.
        ((tokens, finite),) = self._pass("next_tokens", [(input_ids.copy(), num_prompt)], report)
        return tokens, finite

    def _pass(self, method: str, calls: Sequence[tuple[Any, ...]], report: Report) -> list[Any]:
        """What the last layer's worker gives for each call, in order."""
        done: Counter[int] = Counter()
        results: list[Any] = []
        for stream in chained_groups(self.evaluation.stages):
            self._load(stream)
            results = self._stream(stream, method, calls, done, report)
        return results

    def _load(self, stream: Sequence[tuple[int, int]]) -> None:
        loading = {
            self.group.call(WorkerKey(stage, 0), "begin", self.which, index): (stage, index) for stage, index in stream
        }
        while loading:
            ready = self.group.wait(list(loading), self.timeout)
            if not ready:
                raise WorkerLostError(
                    f"no worker loaded its layers within {self.timeout:g} s (waiting for {self.name}, "
                    f"{self._where(list(loading.values()))}): {_RAISE} if that really takes longer"
                )
            for reference in ready:
                self.group.get(reference)
                del loading[reference]

    def _stream(
        self,
        stream: Sequence[tuple[int, int]],
        method: str,
        calls: Sequence[tuple[Any, ...]],
        done: Counter[int],
        report: Report,
    ) -> list[Any]:
        waiting = list(enumerate(calls))
        in_flight: dict[Any, int] = {}
        results: dict[int, Any] = {}
        while len(results) < len(calls):
            while waiting and len(in_flight) < self.evaluation.max_in_flight:
                number, arguments = waiting.pop(0)
                reference: Any = None
                for stage, _ in stream:
                    reference = self.group.call(WorkerKey(stage, 0), method, *arguments, reference)
                in_flight[reference] = number
            ready = self.group.wait(list(in_flight), self.timeout)
            if not ready:
                raise WorkerLostError(
                    f"no worker finished a micro-batch for {self.timeout:g} s ({self.name}, {self._where(stream)}: "
                    f"{len(results)} of {len(calls)} done): {_RAISE} if one really takes longer"
                )
            for reference in ready:
                results[in_flight.pop(reference)] = self.group.get(reference)
            for stage, _ in stream:
                done[stage] += len(ready)
                report(stage, done[stage], len(self.evaluation.stages[stage]) * len(calls))
        return [results[number] for number in range(len(calls))]

    def _where(self, links: Sequence[tuple[int, int]]) -> str:
        (first, _), (last, _) = links[0], links[-1]
        start, end = self.evaluation.stages[first][links[0][1]][0], self.evaluation.stages[last][links[-1][1]][1]
        stages = f"stage {first}" if first == last else f"stages {first} to {last}"
        return f"layer{f's {start} to {end - 1}' if end - start > 1 else f' {start}'} at {stages}"
