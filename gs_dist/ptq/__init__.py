"""The PTQ interface of MindSpore Golden Stick, in one process and without Ray.

Code written for `mindspore_gs.ptq` moves here by changing the import.
"""

from gs_dist.ptq.algorithm import PTQ
from gs_dist.ptq.algorithm_config import AWQConfig, GPTQQuantConfig, SmoothQuantConfig
from gs_dist.ptq.config import BackendTarget, PTQConfig, PTQMode, QuantGranularity
from gs_dist.ptq.decoder import CausalDecoder, DecoderHelper
from gs_dist.ptq.kv_cache import KVCache
from gs_dist.ptq.network_helper import NetworkHelper
from gs_dist.ptq.saving import save_pretrained
from gs_dist.recipe.policy import OutliersSuppressionType, PrecisionRecovery

__all__ = [
    "PTQ",
    "PTQConfig",
    "PTQMode",
    "OutliersSuppressionType",
    "PrecisionRecovery",
    "QuantGranularity",
    "AWQConfig",
    "GPTQQuantConfig",
    "SmoothQuantConfig",
    "NetworkHelper",
    "BackendTarget",
    "KVCache",
    "CausalDecoder",
    "DecoderHelper",
    "save_pretrained",
]
