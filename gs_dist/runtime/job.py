"""What every worker of a job is told."""

from __future__ import annotations

from dataclasses import dataclass

from gs_dist.checkpoint.manifest import Fingerprints
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.recipe.config import CalibrationConfig

__all__ = ["Job"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Recipe, plan, and what they are of.

    Attributes:
        config: the recipe.
        plan: made of it.
        fingerprints: of recipe, model and samples.
        samples: digests of the samples that were fingerprinted, in order; empty where nobody read them.
        statistics_from: an output whose kept statistics layers are solved from; None where they are observed.
    """

    config: CalibrationConfig
    plan: CalibrationPlan
    fingerprints: Fingerprints
    samples: tuple[bytes, ...] = ()
    statistics_from: str | None = None
