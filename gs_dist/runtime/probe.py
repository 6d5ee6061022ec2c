"""Before a job counts as done: what it published against the float model, in perplexity and in generated tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.finished_model import unjudged
from gs_dist.checkpoint.provenance import read_provenance
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.dataset import CalibrationDataset, open_dataset
from gs_dist.errors import JobFailure, RefusedError
from gs_dist.planning.probe import PROMPT_TOKENS
from gs_dist.progress import Progress
from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import CalibrationSummary, ProbeSummary
from gs_dist.runtime.evaluated_model import EvaluatedModel
from gs_dist.runtime.evaluation_worker import FLOAT, Evaluation, EvaluationWorker
from gs_dist.runtime.job import Job
from gs_dist.runtime.perplexity import perplexity_of
from gs_dist.runtime.retry import retry
from gs_dist.runtime.workers import WorkerGroup

__all__ = ["MakeEvaluationGroup", "Probe"]

MakeEvaluationGroup = Callable[[Evaluation, float], WorkerGroup[EvaluationWorker]]
"""Makes one replica of the workers of an evaluation; the number is the timeout in seconds."""

Ids = npt.NDArray[np.int32]

_WORST = 3  # linears named where the probe fails


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Findings:
    """Of one model: perplexity over `num_tokens` predicted tokens, and its most likely token at each place behind the
    prompt, up to the first place whose logits are not `finite`.
    """

    perplexity: float
    num_tokens: int
    tokens: tuple[int, ...]
    finite: bool


class Probe:
    """What a recipe's `max_perplexity_increase` and `probe` ask for; `open` looks at the data before any work.

    Args:
        job: plan and recipe; the probe's stages are the plan's.
        dataset: the samples.
    """

    def __init__(self, job: Job, dataset: CalibrationDataset) -> None:
        config, plan = job.config, job.plan
        assert config.max_perplexity_increase is not None
        self._limit = config.max_perplexity_increase
        self._config = config
        self._dataset = dataset
        self._evaluation = Evaluation(
            model=config.model,
            published={name: str(unjudged(Path(config.output), name)) for name in config.dialects},
            data=config.probe_data,
            stages=plan.probe_stages,
            max_in_flight=plan.max_in_flight,
            device=plan.device,
            threads_per_worker=plan.threads_per_worker,
        )

    @classmethod
    def open(cls, job: Job, reader: CheckpointReader) -> Probe | None:
        """The probe of a job, None where its recipe asks for none.

        Raises:
            DatasetError: the probe's data cannot be used.
        """
        if job.config.max_perplexity_increase is None:
            return None
        architecture = reader.architecture
        dataset = open_dataset(
            job.config.probe_data,
            architecture.vocab_size,
            reader.tokenizer_file,
            eos_token_id=architecture.end_of_text_id,
            fewer_samples=True,
        )
        return cls(job, dataset)

    def run(
        self, summary: CalibrationSummary, make_group: MakeEvaluationGroup, progress: Progress
    ) -> CalibrationSummary:
        """Compares every published format with the float model.

        Args:
            summary: of the job; its worst linears are named where the probe fails.
            make_group: makes the workers.
            progress: told what is going on.

        Returns:
            The summary with what was found.

        Raises:
            RefusedError: perplexity rises by more than the recipe allows, or logits are not finite.
            JobFailure: those of the float model are not finite.
            WorkerLostError: workers died more often in a row than `parallel.max_restarts`.
        """
        at_a_time = self._evaluation.layers_at_a_time
        progress.phase(
            f"probing float and published model on {self._dataset.num_samples} samples"
            + (f", up to {at_a_time} of a stage's layers in memory at a time" if at_a_time else "")
        )
        for directory in self._evaluation.published.values():
            made_of = read_provenance(Path(directory))
            assert made_of is not None, "the merge wrote it"
            self._evaluation = dataclasses.replace(self._evaluation, sources=made_of.sources)
        findings = self._all_findings(make_group, progress)
        reference = findings.pop(FLOAT)
        if not _sound(reference):
            raise JobFailure(
                f"the float model itself {_unsound(reference)} on the samples of the probe: check that "
                f"{summary.model} is a trained model and that the data are of its tokenizer"
            )
        probes = []
        for name, found in findings.items():
            if not _sound(found):
                raise RefusedError(f"{name}: the published model {_unsound(found)}{self._advice(summary)}")
            probes.append(self._compared(name, found, reference))
        for probe in probes:
            if probe.increase > self._limit:
                raise RefusedError(
                    f"{probe.format}: {probe.sentence()}; that is above max_perplexity_increase "
                    f"{self._limit:g} ({self._limit:.4%}){self._advice(summary)}"
                )
        return dataclasses.replace(summary, probes=tuple(probes))

    def _all_findings(self, make_group: MakeEvaluationGroup, progress: Progress) -> dict[str, _Findings]:
        """By model, the float one first; workers that were lost are started again, for models not yet through."""
        parallel, findings = self._config.parallel, dict[str, _Findings]()
        wanted = (FLOAT, *self._evaluation.published)

        def attempt() -> None:
            group = make_group(self._evaluation, parallel.timeout)
            try:
                for which in [name for name in wanted if name not in findings]:
                    model = EvaluatedModel(
                        which=which, evaluation=self._evaluation, group=group, timeout=parallel.timeout
                    )
                    findings[which] = self._findings(model, findings.get(FLOAT), progress)
            finally:
                group.close()

        retry(
            attempt,
            findings,
            len(wanted),
            max_restarts=parallel.max_restarts,
            giving_up=lambda failures: "all layers are published: submit the same recipe again to probe them",
            going_on=lambda: "starting the workers of the probe again",
            tell=progress.message,
        )
        return findings

    def _findings(self, model: EvaluatedModel, reference: _Findings | None, progress: Progress) -> _Findings:
        """What one model gives; all but the float model are asked about the continuation of `reference`."""
        perplexity, num_tokens = perplexity_of(model, self._dataset.num_micro_batches, progress)
        prompt, following = self._prompt()
        if reference is None:
            tokens, finite = self._continuation(model, prompt, following, progress)
        else:
            tokens, finite = self._answers(model, prompt, reference.tokens, progress)
        return _Findings(perplexity=perplexity, num_tokens=num_tokens, tokens=tokens, finite=finite)

    def _continuation(
        self, model: EvaluatedModel, prompt: Ids, following: Ids, progress: Progress
    ) -> tuple[tuple[int, ...], bool]:
        """Tokens after the prompt, each the most likely one; ends early where logits are not finite.

        A pass answers at every place at once, and an answer holds where all tokens before it do. So each pass settles
        one token at least, and more where what was guessed is right: at first that the text goes on as it does, then
        the answers of the pass before (Jacobi decoding, Santilli et al., 2023, arXiv 2305.10427). The tokens are those
        of a pass a token.
        """
        count = self._config.probe.max_new_tokens
        guessed: Ids = np.zeros(count, np.int32)
        guessed[: min(count, following.size)] = following[:count]
        settled = 0

        def report(stage: int, done: int, total: int) -> None:
            progress.stage_progress(stage, settled * total + done, count * total, f"{model.which}, generates")

        while settled < count:
            answers, finite = model.next_tokens(np.concatenate([prompt, guessed])[None], prompt.size, report)
            wrong = np.flatnonzero(answers[settled:] != guessed[settled:])
            right = settled + int(wrong[0]) + 1 if wrong.size else count
            guessed[settled:] = answers[settled:]
            overflowed = np.flatnonzero(~finite[:right])
            if overflowed.size:
                return tuple(guessed[: overflowed[0]].tolist()), False
            settled = right
        return tuple(guessed.tolist()), True

    def _answers(
        self, model: EvaluatedModel, prompt: Ids, tokens: Sequence[int], progress: Progress
    ) -> tuple[tuple[int, ...], bool]:
        """The most likely token at each place of the float model's continuation `tokens`, in one pass.

        Up to the first that differs these are the tokens that the model would have generated itself.
        """
        if not tokens:
            return (), True

        def report(stage: int, done: int, total: int) -> None:
            progress.stage_progress(stage, done, total, f"{model.which}, tokens after the float model's")

        ids = np.concatenate([prompt, np.asarray(tokens, np.int32)])[None]
        answers, finite = model.next_tokens(ids, prompt.size, report)
        overflowed = np.flatnonzero(~finite)
        if overflowed.size:
            return tuple(answers[: overflowed[0]].tolist()), False
        return tuple(answers.tolist()), True

    def _prompt(self) -> tuple[Ids, Ids]:
        """The beginning of the first sample, and the rest of it."""
        first = next(iter(self._dataset.batches(0, 1)))
        sample: Ids = first.input_ids[0][first.mask[0]]
        return sample[:PROMPT_TOKENS], sample[PROMPT_TOKENS:]

    def _compared(self, name: str, found: _Findings, reference: _Findings) -> ProbeSummary:
        pairs = list(zip(found.tokens, reference.tokens, strict=True))
        return ProbeSummary(
            format=name,
            perplexity=found.perplexity,
            float_perplexity=reference.perplexity,
            num_samples=self._dataset.num_samples,
            num_tokens=found.num_tokens,
            calibration_data=self._config.probe.data is None,
            num_new_tokens=len(pairs),
            num_equal_tokens=next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs)),
        )

    def _advice(self, summary: CalibrationSummary) -> str:
        """Which linears to look at, and what to change."""
        worst = _worst_rows(summary.sorted_rows("error"))
        named = ", ".join(f"{row.name} {row.largest_error:.3g}" for row in worst)
        largest = f"; the largest relative errors are {named}" if named else ""
        return (
            f"{largest}. Raise max_perplexity_increase and run the same recipe again, which only probes again; or "
            "quantise anew into another output, with more calibration.num_samples or another policy in layer_policies "
            "for these linears"
        )


def _worst_rows(rows: Sequence[LinearSummary]) -> list[LinearSummary]:
    return [row for row in rows if row.largest_error is not None][:_WORST]


def _sound(found: _Findings) -> bool:
    return found.finite and math.isfinite(found.perplexity)


def _unsound(found: _Findings) -> str:
    if not math.isfinite(found.perplexity):
        return f"has a perplexity of {found.perplexity}"
    return f"gives logits that are not finite after {len(found.tokens)} generated tokens"
