"""SmoothQuant's scale for one strength or several: what smoothing and both kinds of outlier suppression share.

Each strength is judged by the output error it leaves, over some rows of each weight. The kernel is
`gs_dist.solvers.outlier_suppression`.
"""

from __future__ import annotations

from gs_dist.methods.method import (
    ROUNDED,
    SEARCHED,
    Asked,
    Policy,
    SuppressionMethod,
    Work,
    Workspace,
    error_operations,
    objective_bytes,
)
from gs_dist.model.statistics import HISTOGRAM_BYTES_PER_CHANNEL, StatisticsSettings

__all__ = ["SEARCH_ROWS", "ExponentSearch"]

# Rows of each weight that a search looks at. Rounding errors of 8-bit rows are alike, and all rows of a 28672-wide
# layer would take hours.
SEARCH_ROWS = 1024

# Histograms are held as float64, with and without shift.
_HISTOGRAMS = 4 * 2


class ExponentSearch(SuppressionMethod[Asked]):
    """A method that tries SmoothQuant's scale for several strengths."""

    def searches(self, policy: Policy[Asked]) -> bool:
        """Whether it judges by output errors, be it a single strength."""
        return True

    def statistics(self, policy: Policy[Asked]) -> StatisticsSettings:
        """Output errors, where it judges by them."""
        return SEARCHED if self.searches(policy) else super().statistics(policy)

    def trials(self, policy: Policy[Asked]) -> int:
        """How many scales are tried; 0 where none is judged."""
        exponents = self.exponents(policy)
        return (1 if isinstance(exponents, float) else len(exponents)) if self.searches(policy) else 0

    def range_searches(self, policy: Policy[Asked]) -> int:
        """One for each scale."""
        return self.trials(policy)

    def workspace(self, policy: Policy[Asked], work: Work) -> Workspace:
        """Factors of both sketches where it searches, and histograms for each scale; rows are tried in blocks."""
        sketched = self.searches(policy) and work.taken.sketches(work.channels)
        shared = 2 * objective_bytes(work.channels, work.taken) if sketched else 0
        histograms = work.channels * HISTOGRAM_BYTES_PER_CHANNEL * _HISTOGRAMS if work.taken.histogram else 0
        return Workspace(shared=shared, thread=histograms, threads=max(self.trials(policy), 1))

    def operations(self, policy: Policy[Asked], work: Work) -> int:
        """Error of the rows looked at, before and for each scale, for each way of weighting tokens."""
        trials = self.trials(policy)
        seen = -(-work.rows // max(1, -(-work.rows // SEARCH_ROWS)))
        sides = 1 + int(work.taken.weighted_gram)
        energies = sides * error_operations(seen, work.channels, work.taken) if trials else 0
        return energies + trials * (
            sides * error_operations(seen, work.channels, work.taken) + ROUNDED * seen * work.channels
        )
