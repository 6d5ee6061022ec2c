"""What can go wrong, sorted by who can mend it.

A `UserError` is mended by changing a setting or a file and ends a command with exit code 2; a
`JobFailure` is a fault of the run itself and ends it with exit code 1. Messages name the layer, sample
or file, what was found there, and the setting to change. Every class takes its message as the only
argument, so that it survives the way from a worker to the coordinator.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ClusterError",
    "DamagedError",
    "DatasetError",
    "DestroyedError",
    "JobFailure",
    "LayerError",
    "OutputError",
    "PlanError",
    "PolicyConflictError",
    "RecipeError",
    "RefusedError",
    "UserError",
    "WorkerLostError",
]


class UserError(ValueError):
    """The user's input cannot be used as it is; exit code 2."""


class RecipeError(UserError):
    """The recipe holds unknown keys, wrong types or contradictions; the message lists all of them."""


class PolicyConflictError(UserError, RuntimeError):
    """Two entries of `layer_policies` match one linear (a RuntimeError, as in Golden Stick)."""


class PlanError(UserError):
    """The job as asked for cannot fit; the message names the setting to change."""


class CheckpointError(UserError):
    """A checkpoint's config.json, index or safetensors file is missing, damaged or contradictory."""


class DatasetError(UserError):
    """Calibration or evaluation data cannot be read, or does not hold what the recipe says."""


class OutputError(UserError):
    """The output directory holds another run, is in use, or cannot be written."""


class DamagedError(OutputError):
    """A file that a job wrote for itself is not what was written; what it held is to be found out again."""


class ClusterError(UserError):
    """The Ray cluster cannot be reached or does not hold the resources the plan needs."""


class JobFailure(RuntimeError):
    """The run failed for a reason the user did not cause; exit code 1."""


class RefusedError(JobFailure):
    """What was made is not good enough to be published."""


class LayerError(JobFailure):
    """A layer could not be calibrated or solved; the message names layer, linear and reason."""


class DestroyedError(LayerError, RefusedError):
    """Rounding destroyed linears of a layer."""


class WorkerLostError(JobFailure):
    """A stage worker died or stopped answering more often than the recipe allows."""
