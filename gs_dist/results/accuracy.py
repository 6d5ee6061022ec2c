"""How many questions of a multiple-choice task a model answers rightly."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Accuracy", "TaskResult"]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of `num_questions`: by log likelihood (`acc`), and by that per character of the choice (`acc_norm`)."""

    acc: float
    acc_norm: float
    num_questions: int

    def standard_error(self, share: float) -> float:
        """Of a share, as lm-evaluation-harness takes it (`mean_stderr`); 0 of one question."""
        return math.sqrt(share * (1 - share) / (self.num_questions - 1)) if self.num_questions > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Of one task and one model (`float`, or a format's name)."""

    task: str
    model: str
    accuracy: Accuracy
