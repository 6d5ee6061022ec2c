"""`mindspore_gs.ptq.smooth_quant`: SmoothQuant under its older name."""

from __future__ import annotations

from typing import Any

from gs_dist.golden_stick.ptq.ptq import PTQ
from gs_dist.ptq.config import PTQConfig
from gs_dist.recipe.policy import OutliersSuppressionType

__all__ = ["SmoothQuant"]


class SmoothQuant(PTQ):
    """PTQ whose config asks for SmoothQuant where it names no outlier suppression."""

    def __init__(self, config: dict[str, Any] | PTQConfig | None = None, layer_policies: Any = None) -> None:
        super().__init__(config, layer_policies)
        if self._config.outliers_suppression is OutliersSuppressionType.NONE:
            object.__setattr__(self._config, "outliers_suppression", OutliersSuppressionType.SMOOTH)
