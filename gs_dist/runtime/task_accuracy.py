"""Accuracy on multiple-choice tasks, of the float model and of published ones, through the stages of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gs_dist.data.chat import read_tokenizer_config, token_text
from gs_dist.data.dataset import TokenBatch
from gs_dist.data.multiple_choice import Question, Request, Task, questions_of, read_tasks, requests_of
from gs_dist.data.tokens import TextTokenizer
from gs_dist.errors import UserError
from gs_dist.progress import Progress
from gs_dist.recipe.sections import CalibrationData
from gs_dist.results.accuracy import Accuracy, TaskResult
from gs_dist.runtime.evaluate import Models, evaluation_of, models_of
from gs_dist.runtime.evaluated_model import EvaluatedModel
from gs_dist.runtime.evaluation_worker import FLOAT
from gs_dist.runtime.ray_workers import evaluation_workers

__all__ = ["evaluate_tasks", "request_batches", "scored"]

_ROWS = 8  # requests of a micro-batch
_ROUND = 32  # lengths are multiples of this, so that few shapes are compiled


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A task with its questions, and where its requests stand among those of all tasks."""

    task: Task
    questions: tuple[Question, ...]
    first: int

    @property
    def num_requests(self) -> int:
        return sum(len(question.choices) for question in self.questions)


def evaluate_tasks(
    directory: str,
    tasks: Path,
    *,
    dialects: Sequence[str] = (),
    model: str | None = None,
    pipeline_parallel_size: int | None = None,
    memory_per_worker: int | None = None,
    address: str | None = None,
    timeout: float = 600.0,
    engine: str | None = None,
    progress: Progress,
) -> tuple[TaskResult, ...]:
    """Accuracy on every task of a file; arguments but `tasks` are those of `evaluate`.

    Raises:
        UserError: a directory, the file or its data cannot be used, or not even one layer fits.
    """
    models = models_of(directory, dialects, model, engine, progress)
    asked, requests = _requests(read_tasks(tasks), models)
    order, batches = request_batches(requests)
    data = CalibrationData(
        data=tuple(place for one in asked for place in one.task.data),
        num_samples=len(requests),
        sequence_length=max(batch.input_ids.shape[1] for batch in batches),
        micro_batch_size=_ROWS,
    )
    found: list[TaskResult] = []
    with evaluation_of(
        models,
        data,
        len(batches),
        pipeline_parallel_size=pipeline_parallel_size,
        memory_per_worker=memory_per_worker,
        address=address,
        timeout=timeout,
        compares=False,
        progress=progress,
        requests=batches,
    ) as evaluation:
        group = evaluation_workers(evaluation, timeout)
        try:
            for name in ([FLOAT] if model is not None else []) + list(models.published):
                evaluated = EvaluatedModel(which=name, evaluation=evaluation, group=group, timeout=timeout)
                losses = [loss for batch in evaluated.losses(len(batches), progress, "tasks") for loss in batch.losses]
                likelihoods = np.empty(len(requests))
                likelihoods[order] = -np.array(losses[: len(requests)])
                found += [
                    TaskResult(task=one.task.task, model=name, accuracy=scored(one.questions, likelihoods[part]))
                    for one in asked
                    for part in [slice(one.first, one.first + one.num_requests)]
                ]
        finally:
            group.close()
    return tuple(found)


def _requests(tasks: Sequence[Task], models: Models) -> tuple[list[_Asked], list[Request]]:
    reader = models.reader
    if reader.tokenizer_file is None:
        raise UserError(f"{reader.directory} holds no tokenizer.json: copy that of the float model into it")
    tokenizer = TextTokenizer(reader.tokenizer_file)
    stated = read_tokenizer_config(reader.directory)
    named = [tokenizer.token_id(token_text(stated.get(name))) for name in ("bos_token", "eos_token")]
    first = next((index for index in named if index is not None), reader.architecture.end_of_text_id)
    asked: list[_Asked] = []
    requests: list[Request] = []
    for task in tasks:
        questions = questions_of(task)
        asked.append(_Asked(task=task, questions=questions, first=len(requests)))
        longest = reader.architecture.max_position_embeddings
        requests += requests_of(questions, tokenizer, first=first, longest=longest)
    return asked, requests


def request_batches(requests: Sequence[Request]) -> tuple[npt.NDArray[np.int64], tuple[TokenBatch, ...]]:
    """Micro-batches of requests of like length, padded behind; the mask is True where a token tells of the choice.

    That is from the last token of the text on, whose successor is the choice's first.

    Returns:
        Which request each row of all micro-batches is, and the micro-batches.
    """
    order = np.argsort([-len(request.ids) for request in requests], kind="stable")
    batches: list[TokenBatch] = []
    for start in range(0, len(order), _ROWS):
        part = [requests[number] for number in order[start : start + _ROWS]]
        tokens = -(-len(part[0].ids) // _ROUND) * _ROUND
        ids, mask = np.zeros((_ROWS, tokens), np.int32), np.zeros((_ROWS, tokens), bool)
        for row, request in enumerate(part):
            end = len(request.ids)
            ids[row, :end] = request.ids
            mask[row, max(0, end - request.num_choice - 1) : end] = True
        batches.append(TokenBatch(index=len(batches), input_ids=ids, mask=mask, num_samples=len(part)))
    return order, tuple(batches)


def scored(questions: Sequence[Question], likelihoods: npt.NDArray[np.float64]) -> Accuracy:
    """Accuracy from the log likelihood of each choice of each question, in order; of equal ones the first counts."""
    right = np.zeros(2)
    start = 0
    for question in questions:
        own = likelihoods[start : start + len(question.choices)]
        start += len(question.choices)
        lengths = np.array([float(len(choice)) for choice in question.choices])
        right += [own.argmax() == question.target, (own / lengths).argmax() == question.target]
    acc, acc_norm = right / len(questions)
    return Accuracy(acc=float(acc), acc_norm=float(acc_norm), num_questions=len(questions))
