"""Keeps the status of a running job: heard from the coordinator, published every few seconds, and told to people."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gs_dist.checkpoint.job_log import JobLog, utc_now
from gs_dist.errors import RefusedError
from gs_dist.planning.probe import PROMPT_TOKENS
from gs_dist.progress import JobState, JobStatus, Progress, StageStatus, WorkLeft
from gs_dist.runtime.job import Job
from gs_dist.runtime.pace import Pace, solves_per_pass

__all__ = ["JobWatch", "watch_of", "watched"]

_INTERVAL = 5.0  # seconds between two publications
_LOG_INTERVAL = 60.0  # between two lines of the log that tell where the job stands


class JobWatch:
    """A `Progress` that hands on what it hears, and knows where the whole job stands.

    Args:
        progress: told all that this one is told, and the status.
        log: where the status goes.
        pace: what is known of the time left.
        layers_done, num_layers: published layers at the start, and of all.
        clock: seconds, of any origin.
    """

    def __init__(
        self,
        progress: Progress,
        log: JobLog,
        pace: Pace,
        *,
        layers_done: int,
        num_layers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = progress
        self._log = log
        self._pace = pace
        self._layers_done = layers_done
        self._num_layers = num_layers
        self._clock = clock
        self._began, self._started = clock(), utc_now()
        self._phase = ""
        self._stages: dict[int, StageStatus] = {}
        self._logged = self._began
        self._guard = threading.RLock()  # the coordinator tells, and a thread publishes

    def stage_progress(self, stage: int, done: int, total: int, what: str) -> None:
        """Handed on."""
        with self._guard:
            self._stages[stage] = StageStatus(stage=stage, doing=what, done=done, total=total)
            self._progress.stage_progress(stage, done, total, what)

    def layer_finished(self, layer: int, done: int, total: int) -> None:
        """Handed on, and logged."""
        with self._guard:
            self._layers_done = done
            self._log.say(f"layer {layer} is published, {done} of {total}")
            self._progress.layer_finished(layer, done, total)

    def part_finished(self, part: int, done: int, total: int) -> None:
        """Handed on."""
        self._progress.part_finished(part, done, total)

    def message(self, text: str) -> None:
        """Handed on, and logged."""
        with self._guard:
            self._log.say(text)
            self._progress.message(text)

    def phase(self, what: str) -> None:
        """Handed on, and logged; stages that worked before are done."""
        with self._guard:
            self._phase = what
            self._stages.clear()
            self._log.say(what)
            self._progress.phase(what)
            self.publish()

    def work_left(self, left: WorkLeft) -> None:
        """Kept."""
        with self._guard:
            self._pace.update(left, self._clock())
            ahead = {stage.stage for stage in left.stages if stage.passes or stage.solves}
            for stage in set(self._stages) - ahead:
                del self._stages[stage]

    def job_status(self, status: JobStatus) -> None:
        """Handed on."""
        self._progress.job_status(status)

    def status(self, state: JobState = "running", reason: str = "") -> JobStatus:
        """Where the job stands now."""
        with self._guard:
            now = self._clock()
            running = state == "running"
            return JobStatus(
                state=state,
                phase=self._phase if running else reason,
                layers_done=self._layers_done,
                num_layers=self._num_layers,
                tokens_done=self._pace.tokens_done,
                tokens_per_second=self._pace.tokens_per_second if running else None,
                seconds=now - self._began,
                seconds_left=self._pace.seconds_left(now) if running else 0.0 if state == "done" else None,
                started=self._started,
                updated=utc_now(),
                stages=tuple(self._stages[stage] for stage in sorted(self._stages)) if running else (),
            )

    def publish(self) -> None:
        """Tells where the job stands, on storage and to people."""
        with self._guard:
            status = self.status()
            self._log.publish(status)
            self._progress.job_status(status)
            if self._clock() - self._logged >= _LOG_INTERVAL:
                self._logged = self._clock()
                self._log.say(status.line())

    def finish(self, state: JobState, reason: str = "") -> None:
        """Tells how the job ended."""
        status = self.status(state, reason)
        self._log.publish(status)
        self._log.say(status.line())


@contextmanager
def watched(watch: JobWatch) -> Iterator[JobWatch]:
    """Publishes every few seconds while the block runs, and at its end how it ended."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_INTERVAL):
            watch.publish()

    thread = threading.Thread(target=beat, name="gs-dist-job-watch", daemon=True)
    thread.start()
    state: JobState = "done"
    reason = ""
    try:
        yield watch
    except (KeyboardInterrupt, SystemExit):
        state, reason = "stopped", "run the same command again to go on from the layers that are published"
        raise
    except BaseException as error:
        state = "refused" if isinstance(error, RefusedError) else "failed"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise
    finally:
        over.set()
        thread.join()
        watch.finish(state, reason)


def watch_of(job: Job, progress: Progress, layers_done: int) -> JobWatch:
    """Tells of the job from here on, in its output too."""
    config, plan = job.config, job.plan
    probed = 0.0
    if config.max_perplexity_increase is not None:
        models, batch = 1 + len(config.dialects), config.probe_data.samples_per_micro_batch
        longest_stage = max(len(stage.layers) for stage in plan.stages)
        new_tokens, data = config.probe.max_new_tokens, config.calibration
        generated = new_tokens * (PROMPT_TOKENS + new_tokens) / (data.samples_per_micro_batch * data.sequence_length)
        probed = (models * -(-config.probe_data.num_samples // batch) + generated) * longest_stage
    return JobWatch(
        progress,
        JobLog(Path(config.output)),
        Pace(prior=solves_per_pass(plan), probe=probed, began=time.monotonic()),
        layers_done=layers_done,
        num_layers=plan.architecture.num_layers,
    )
