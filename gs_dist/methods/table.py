"""The methods there are, and how recipes and Golden Stick name them. To add one, see `docs/extending.md`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from gs_dist.methods.awq import AWQ, AWQArguments
from gs_dist.methods.clip import Clip, ClipArguments
from gs_dist.methods.coordinate_descent import CoordinateDescent, DescentArguments
from gs_dist.methods.gptq import GPTQ
from gs_dist.methods.method import Method, RoundingMethod, SuppressionMethod
from gs_dist.methods.outlier_suppression import OutlierSuppressionLite, OutlierSuppressionPlus
from gs_dist.methods.round_to_nearest import RoundToNearest
from gs_dist.methods.smoothquant import SmoothQuant, SmoothQuantArguments
from gs_dist.methods.unsuppressed import Unsuppressed

__all__ = [
    "CLIP",
    "METHODS",
    "ROUNDINGS",
    "SUPPRESSIONS",
    "AlgoArgs",
    "OutliersSuppressionType",
    "PrecisionRecovery",
]


class OutliersSuppressionType(str, Enum):
    """Ways to move outliers between activations and weights before rounding."""

    SMOOTH = "smooth"
    AWQ = "awq"
    OUTLIER_SUPPRESSION_PLUS = "outlier-suppression+"
    OUTLIER_SUPPRESSION_LITE = "outlier-suppression-lite"
    NONE = "none"

    @classmethod
    def from_str(cls, name: str) -> OutliersSuppressionType:
        """Member of that value, upper or lower case; `NONE` for any other text, as upstream."""
        return next((m for m in cls if m.value == name.lower()), cls.NONE)


class PrecisionRecovery(str, Enum):
    """Ways to round weights that look at more than one weight at a time."""

    GPTQ = "gptq"
    COORDINATE_DESCENT = "coordinate-descent"
    NONE = "none"

    @classmethod
    def from_str(cls, name: str) -> PrecisionRecovery:
        """Member of that value, upper or lower case; `NONE` for any other text, as upstream."""
        return next((m for m in cls if m.value == name.lower()), cls.NONE)


class AlgoArgs(DescentArguments, ClipArguments, AWQArguments, SmoothQuantArguments):
    """Arguments of the algorithms, in one flat table (Golden Stick's AWQConfig, GPTQQuantConfig, SmoothQuantConfig)."""


CLIP = Clip()

_SUPPRESSIONS: tuple[SuppressionMethod[AlgoArgs], ...] = (
    SmoothQuant(),
    AWQ(),
    OutlierSuppressionPlus(),
    OutlierSuppressionLite(),
    Unsuppressed(),
)
_ROUNDINGS: tuple[RoundingMethod[AlgoArgs], ...] = (GPTQ(), CoordinateDescent(), RoundToNearest())

SUPPRESSIONS: Mapping[OutliersSuppressionType, SuppressionMethod[AlgoArgs]] = MappingProxyType(
    {OutliersSuppressionType(method.name): method for method in _SUPPRESSIONS}
)
ROUNDINGS: Mapping[PrecisionRecovery, RoundingMethod[AlgoArgs]] = MappingProxyType(
    {PrecisionRecovery(method.name): method for method in _ROUNDINGS}
)
METHODS: tuple[Method[AlgoArgs], ...] = (*_SUPPRESSIONS, CLIP, *_ROUNDINGS)
