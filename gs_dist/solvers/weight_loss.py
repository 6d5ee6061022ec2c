"""What rounding costs a weight, told without data from the weight and from what was stored of it, block by block.

Where no token was seen, the tokens are taken to be the input channels' unit vectors, one each. The output error over
all of them is the lost share of the weight's energy, |Q(W) - W|^2 / |W|^2. One loud column makes up nearly all of that
energy and hides that everything else was rounded away; so the error of the median token, of the median column, is told
beside it, and so is the share of weights that became zero, which sees loud values wherever they lie.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gs_dist.numbers.scales import Float32
from gs_dist.solvers.weight_rounding import RoundedRows

__all__ = ["WeightLoss"]


class WeightLoss:
    """Sums over the blocks of one weight (out, in); for each block `keep`, then round it, then `add`."""

    def __init__(self, block_rows: int, columns: int) -> None:
        self._original = np.empty((block_rows, columns), dtype=np.float32)
        self._lost = np.zeros(columns)
        self._energy = np.zeros(columns)
        self._present = self._left = 0
        self.scale_min, self.scale_max = np.inf, 0.0

    def keep(self, block: Float32) -> None:
        """Remembers a block (rows, columns), which rounding overwrites."""
        np.copyto(self._original[: len(block)], block)

    def add(self, restored: Float32, rounded: RoundedRows) -> None:
        """Adds the block that was kept, given what its codes and scales stand for; `restored` is overwritten."""
        original = self._original[: len(restored)]
        self._present += int(np.count_nonzero(original != 0))
        self._left += int(np.count_nonzero(restored != 0))
        np.subtract(restored, original, out=restored)
        with np.errstate(over="ignore"):  # an energy beyond float32 is no number that a gate lets pass
            self._energy += np.einsum("ij,ij->j", original, original)
            self._lost += np.einsum("ij,ij->j", restored, restored)
        low, high = rounded.scale_range()
        self.scale_min, self.scale_max = min(self.scale_min, low), max(self.scale_max, high)

    @property
    def relative_error(self) -> float | None:
        """Lost share of the weight's energy; None for a weight of zeros, NaN where squares leave float32's range."""
        return _share(self._lost.sum(), self._energy.sum())

    @property
    def median_column_error(self) -> float | None:
        """The same of the median column among those that are not zero."""
        live = self._energy != 0
        if not live.any():
            return None
        with np.errstate(invalid="ignore"):
            return float(np.median(self._lost[live] / self._energy[live]))

    @property
    def zeroed(self) -> float:
        """Share of the weights other than zero that became zero."""
        return 1.0 - self._left / self._present if self._present else 0.0


def _share(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> float | None:
    if whole == 0:
        return None
    with np.errstate(invalid="ignore"):
        return float(part / whole)
