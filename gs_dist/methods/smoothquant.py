"""SmoothQuant (Xiao et al. 2022): outliers of an activation's channels move into the weights that read it.

The kernel is `gs_dist.solvers.smoothquant`.
"""

from __future__ import annotations

from gs_dist.methods.exponent_search import ExponentSearch
from gs_dist.methods.method import Arguments, Policy, Ratios

__all__ = ["SmoothQuant", "SmoothQuantArguments"]

_STATIC_ALPHAS = (0.5, 0.65, 0.8, 0.9)


class SmoothQuantArguments(Arguments):
    """That of Golden Stick's SmoothQuantConfig."""

    alpha: Ratios = None
    """SmoothQuant's strength: how much of the outliers moves into the weights; null is 0.5, or a search."""


class SmoothQuant(ExponentSearch[SmoothQuantArguments]):
    """A single strength needs the vectors alone; several are searched."""

    name = "smooth"
    label = "SmoothQuant"
    arguments = tuple(SmoothQuantArguments.model_fields)

    def exponents(self, policy: Policy[SmoothQuantArguments]) -> float | tuple[float, ...]:
        """`alpha`.

        Unless the recipe says, static activations with a range of least error search: one token of enormous
        energy then decides neither the range nor how much of it moves into the weights.
        """
        if policy.algo_args.alpha is not None:
            return policy.algo_args.alpha
        return _STATIC_ALPHAS if policy.is_static and policy.act_range == "mse" else 0.5

    def searches(self, policy: Policy[SmoothQuantArguments]) -> bool:
        """Where there are several."""
        return isinstance(self.exponents(policy), tuple)

    def clips_by_default(self, policy: Policy[SmoothQuantArguments]) -> bool:
        """Where a search moves outliers into columns, which would set the range of each row."""
        return self.searches(policy)
