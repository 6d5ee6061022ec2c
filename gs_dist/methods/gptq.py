"""GPTQ (Frantar et al. 2023): weights rounded one input channel at a time, later channels make up for the error.

The kernel is `gs_dist.solvers.gptq`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, TypeVar

from pydantic import Field

from gs_dist.methods.contradiction import Contradiction
from gs_dist.methods.method import (
    CORRECTED,
    ROUNDED,
    Arguments,
    ColumnOrder,
    Policy,
    Ratio,
    RoundingMethod,
    Work,
    Workspace,
)
from gs_dist.model.statistics import StatisticsSettings

__all__ = ["FACTOR_COLUMNS", "GPTQ", "RANGE_RATIOS", "TILE_ROWS", "GPTQArguments"]

# Shares of a group's largest weight at which its range is tried. A little beyond it pays at times: the largest code is
# then used by more than one weight.
RANGE_RATIOS = tuple(1.05 - i / 40 for i in range(14))
# Rows worked on at a time: vectors of 8 KiB stay in the first cache, and a 28672-wide weight's take 235 MB.
TILE_ROWS = 2048
# Columns of the Gram matrix factorized at a time: what is left of a block of them is one thread's work, a twentieth.
FACTOR_COLUMNS = 512

# Bytes of an entry of the Gram matrix: the factor in float32; for all linears of an input, the matrix rescaled.
_FACTOR_BYTES, _RESCALED_BYTES = 4, 4
# Of a tile's entry: float32 transposed, codes twice, scales and zero points; of a panel some float32 vectors a channel.
_TILE_BYTES, _PANEL_VECTORS = 7, 16


class GPTQArguments(Arguments):
    """Those of Golden Stick's GPTQQuantConfig."""

    block_size: Annotated[int, Field(gt=0)] = 128
    """Columns that GPTQ rounds before it corrects the ones behind them."""
    desc_act: bool = False
    """GPTQ rounds the channels of largest activations first."""
    damp_percent: Ratio = 0.01
    """What GPTQ adds to the Gram matrix's diagonal, as a share of its mean; raised where it does not suffice."""
    static_groups: bool = False
    """GPTQ finds the scales of all groups before it rounds; with desc_act groups then stay contiguous."""


Asked = TypeVar("Asked", bound=GPTQArguments, contravariant=True)


class GPTQ(RoundingMethod[Asked]):
    """Searches the ranges of groups on its way; those of whole channels are searched before."""

    name = "gptq"
    label = "GPTQ"
    arguments = tuple(GPTQArguments.model_fields)

    def statistics(self, policy: Policy[Asked]) -> StatisticsSettings:
        """The matrix itself, which is factorized."""
        return CORRECTED

    def contradictions(self, policy: Policy[Asked]) -> Iterable[Contradiction]:
        """As Golden Stick: W8A8 gains nothing by it, and W4A8 is stored with groups in place."""
        if policy.weight_quant_dtype == policy.act_quant_dtype == "int8":
            write = [{"precision_recovery": "none"}]
            yield Contradiction(field="precision_recovery", found=f"{self.label} does not serve W8A8", write=write)
        args, w4a8 = policy.algo_args, (policy.weight_quant_dtype, policy.act_quant_dtype) == ("qint4x2", "int8")
        if w4a8 and not (args.desc_act and args.static_groups):
            order = {"algo_args.desc_act": True, "algo_args.static_groups": True}
            yield Contradiction(field="algo_args", found="W4A8 takes columns in their own order", write=[order])

    def searches_ranges(self, policy: Policy[Asked]) -> bool:
        """Those of groups: a range found by plain rounding does not suit what makes up for rounding."""
        return policy.group_size > 0

    def clip_ratios(self, policy: Policy[Asked]) -> tuple[float, ...]:
        """Its own list."""
        return RANGE_RATIOS

    def column_order(self, policy: Policy[Asked]) -> ColumnOrder | None:
        """With `desc_act`, of groups."""
        args = policy.algo_args
        if not args.desc_act or not policy.group_size:
            return None
        return "weight" if args.static_groups else "group"

    def workspace(self, policy: Policy[Asked], work: Work) -> Workspace:
        """The matrix rescaled for all linears, a factor for each, a tile for each thread."""
        width = max(policy.algo_args.block_size, policy.group_size)
        panel = 4 * _PANEL_VECTORS * min(width, work.channels)
        return Workspace(
            shared=work.channels**2 * _RESCALED_BYTES if work.rescaled else 0,
            own=work.channels**2 * _FACTOR_BYTES,
            thread=min(work.rows, TILE_ROWS) * (work.channels * _TILE_BYTES + panel),
        )

    def operations(self, policy: Policy[Asked], work: Work) -> int:
        """Factorisation and updates, once more where ranges are found before a second pass."""
        rows, channels = work.rows, work.channels
        one_pass = channels**3 // 3 + rows * channels * (channels + ROUNDED)
        if not (policy.searches_ranges_on_the_way and policy.clips_weights):
            return one_pass
        # Each ratio rounds a group anew.
        tries = (len(policy.clip_ratios) - 1) * rows * channels * (policy.group_size + ROUNDED)
        return one_pass * (2 if self.column_order(policy) == "weight" else 1) + tries
