"""How long a job still takes, from what its passes and solves took so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from gs_dist.planning.plan import CalibrationPlan
from gs_dist.progress import StageLeft, WorkLeft

__all__ = ["Pace", "solves_per_pass"]

# Measured on SmolLM2-135M, static int8, two cores: passes ran at 25 GFLOP/s and solves at 7.5.
_SLOWER = 3.4


def solves_per_pass(plan: CalibrationPlan) -> float | None:
    """Roughly how many layers' passes of one micro-batch the solve of one layer takes, before any was measured.

    None where passes run on cards and solves on their hosts: of their speeds nothing is known.
    """
    if not plan.device.on_host:
        return None
    operations = plan.operations
    one_pass = (operations.forward + operations.statistics) / plan.config.calibration.num_micro_batches
    return _SLOWER * operations.solve / one_pass if one_pass else None


@dataclass
class _Rate:
    """Seconds a unit; the first stretch, which compiles kernels, counts only while there is no other."""

    first: tuple[float, float] | None = None
    seconds: float = 0.0
    units: float = 0.0

    def add(self, seconds: float, units: float) -> None:
        if self.first is None:
            self.first = (seconds, units)
        else:
            self.seconds += seconds
            self.units += units

    @property
    def per_unit(self) -> float | None:
        if self.units > 0:
            return self.seconds / self.units
        return None if self.first is None else self.first[0] / self.first[1]


@dataclass
class _Stage:
    left: StageLeft
    at: float  # when it was last heard of
    passes: _Rate = field(default_factory=_Rate)
    solves: _Rate = field(default_factory=_Rate)


class Pace:
    """Rates of each stage by what its work shrank by between two reports.

    Args:
        prior: `solves_per_pass`, taken while no solve was measured.
        probe: passes that follow the last solve, in the unit of `StageLeft.passes`; its workers take as long to start
            as those of the job.
        began: when the job began.
    """

    def __init__(self, prior: float | None = None, probe: float = 0.0, began: float | None = None) -> None:
        self._prior = prior
        self._probe = probe
        self._began = began
        self._start = 0.0
        self._stages: dict[int, _Stage] = {}
        self._tokens = _Rate()
        self._tokens_left: tuple[int, float] | None = None
        self.tokens_done = 0

    def update(self, left: WorkLeft, now: float) -> None:
        """Takes in what is left at a time; more than before means that workers were started anew."""
        if not self._stages and self._began is not None:
            self._start = now - self._began
        for stage in left.stages:
            known = self._stages.get(stage.stage)
            if known is None:
                self._stages[stage.stage] = _Stage(left=stage, at=now)
                continue
            passed, solved = known.left.passes - stage.passes, known.left.solves - stage.solves
            anew = passed < 0 or solved < 0
            if not anew and passed > 0:
                known.passes.add(now - known.at, passed)
            elif not anew and solved > 0:
                known.solves.add(now - known.at, solved)
            if anew or passed > 0 or solved > 0:
                known.left, known.at = stage, now
        self._count_tokens(left.tokens, now)

    def _count_tokens(self, left: int, now: float) -> None:
        if self._tokens_left is not None:
            before, at = self._tokens_left
            if left < before:
                self._tokens.add(now - at, before - left)
                self.tokens_done += before - left
            elif left == before:
                return
        self._tokens_left = (left, now)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the passes so far; None before the first micro-batch is through, and once all are."""
        per_token = self._tokens.per_unit
        over = self._tokens_left is not None and self._tokens_left[0] == 0
        return None if over or not per_token else 1.0 / per_token

    def seconds_left(self, now: float) -> float | None:
        """Until the last stage is done and the probe after it; None while nothing is measured that tells."""
        if not self._stages:
            return None
        times = [self._of_stage(stage, now) for stage in self._stages.values()]
        known = [time for time in times if time is not None]
        if len(known) < len(times):
            return None
        ahead = max(known)
        if not self._probe:
            return ahead
        probe = self._start + self._probe * (self._mean([stage.passes for stage in self._stages.values()]) or 0.0)
        under_way = 0.0 if ahead else now - max(stage.at for stage in self._stages.values())
        return ahead + max(0.0, probe - under_way)

    def _of_stage(self, stage: _Stage, now: float) -> float | None:
        """Of one stage; what the step under way has taken already is taken off, up to its whole."""
        passes, solves = self._pass_seconds(stage), self._solve_seconds(stage)
        if (stage.left.passes and passes is None) or (stage.left.solves and solves is None):
            return None
        seconds = stage.left.passes * (passes or 0.0) + stage.left.solves * (solves or 0.0)
        under_way = solves if not stage.left.passes else 0.0
        return max(0.0, seconds - min(now - stage.at, under_way or 0.0)) if seconds else 0.0

    def _pass_seconds(self, stage: _Stage) -> float | None:
        return stage.passes.per_unit or self._mean([other.passes for other in self._stages.values()])

    def _solve_seconds(self, stage: _Stage) -> float | None:
        measured = stage.solves.per_unit or self._mean([other.solves for other in self._stages.values()])
        passes = self._pass_seconds(stage)
        if measured is None and passes is not None and self._prior is not None:
            return passes * self._prior
        return measured

    @staticmethod
    def _mean(rates: list[_Rate]) -> float | None:
        known = [rate.per_unit for rate in rates if rate.per_unit is not None]
        return sum(known) / len(known) if known else None
