"""`mindspore_gs.ptq`, working in place."""

from gs_dist.golden_stick.ptq.ptq import PTQ, RoundToNearest
from gs_dist.golden_stick.ptq.ptq_config import (
    AWQConfig,
    GPTQQuantConfig,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
    QuantGranularity,
)
from gs_dist.ptq.network_helper import NetworkHelper

__all__ = [
    "PTQ",
    "PTQConfig",
    "PTQMode",
    "OutliersSuppressionType",
    "PrecisionRecovery",
    "QuantGranularity",
    "AWQConfig",
    "GPTQQuantConfig",
    "NetworkHelper",
    "RoundToNearest",
]
