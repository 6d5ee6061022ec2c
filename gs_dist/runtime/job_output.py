"""The output of a recipe's job, with what decides whether another job's layers may lie in it."""

from __future__ import annotations

from pathlib import Path

from gs_dist.checkpoint.manifest import Fingerprints
from gs_dist.checkpoint.run_directory import RunDirectory
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.runtime.software import Software

__all__ = ["run_of"]


def run_of(config: CalibrationConfig, fingerprints: Fingerprints) -> RunDirectory:
    """The output of a recipe's job."""
    return RunDirectory(
        Path(config.output),
        dialects=config.dialects,
        fingerprints=fingerprints,
        recipe=config.fingerprint_fields(),
        made_with=Software.here().made_with,
    )
