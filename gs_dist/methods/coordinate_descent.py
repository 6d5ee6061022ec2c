"""Coordinate descent (COMQ, Zhang et al. 2024; CDQuant, Nair & Suggala 2024): GPTQ's codes, each revisited in turn.

GPTQ never returns to a channel that it has rounded. Each sweep here takes the channels one after another and gives each
the code that leaves the least output error beside all the others as they are. The kernel is
`gs_dist.solvers.coordinate_descent`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from gs_dist.methods.gptq import GPTQ, GPTQArguments
from gs_dist.methods.method import ROUNDED, Policy, Work, Workspace

__all__ = ["BLOCK", "TILE_ROWS", "CoordinateDescent", "DescentArguments"]

BLOCK = 64  # channels between two matrix products
TILE_ROWS = 1024  # worked on at a time

_TILE_BYTES = 4 + 4  # of an entry: the change of the weight, and codes while they are turned back


class DescentArguments(GPTQArguments):
    """GPTQ's, from whose result the descent starts, and its own."""

    sweeps: Annotated[int, Field(ge=1, le=100)] = 4
    """How often coordinate descent goes over all channels; it ends sooner where a sweep changes no code."""


class CoordinateDescent(GPTQ[DescentArguments]):
    """Scales, groups and their order are GPTQ's; only codes change, and the loss only falls."""

    name = "coordinate-descent"
    label = "CD"
    arguments = tuple(DescentArguments.model_fields)

    def workspace(self, policy: Policy[DescentArguments], work: Work) -> Workspace:
        """GPTQ's; what the descent holds for a tile comes after it."""
        first = super().workspace(policy, work)
        tile = min(work.rows, TILE_ROWS) * work.channels * _TILE_BYTES
        return replace(first, thread=max(first.thread, tile))

    def operations(self, policy: Policy[DescentArguments], work: Work) -> int:
        """GPTQ's, and for each sweep one product with the Gram matrix."""
        sweep = work.rows * work.channels * (2 * work.channels + 2 * BLOCK + ROUNDED)
        return super().operations(policy, work) + policy.algo_args.sweeps * sweep
