"""`mindspore_gs.ptq.ptq_config`."""

from gs_dist.ptq.algorithm_config import AWQConfig, GPTQQuantConfig, SmoothQuantConfig
from gs_dist.ptq.config import PTQConfig, PTQMode, QuantGranularity
from gs_dist.recipe.policy import OutliersSuppressionType, PrecisionRecovery

__all__ = [
    "PTQConfig",
    "PTQMode",
    "OutliersSuppressionType",
    "PrecisionRecovery",
    "QuantGranularity",
    "AWQConfig",
    "GPTQQuantConfig",
    "SmoothQuantConfig",
]
