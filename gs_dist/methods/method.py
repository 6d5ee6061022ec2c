"""What a method tells of itself, so that nobody who plans, refuses, dispatches or labels has to ask for its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from gs_dist.methods.contradiction import Contradiction
from gs_dist.model.statistics import StatisticsSettings

__all__ = [
    "CORRECTED",
    "NOTHING",
    "ROUNDED",
    "SEARCHED",
    "Arguments",
    "ColumnOrder",
    "Method",
    "Policy",
    "Ratio",
    "Ratios",
    "RoundingMethod",
    "SuppressionMethod",
    "Work",
    "Workspace",
    "error_operations",
    "is_large",
    "objective_bytes",
]

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
# One value, several to search, or None for what suits the method that reads it. Each group of linears takes the best.
Ratios = Ratio | Annotated[tuple[Ratio, ...], Field(min_length=1, strict=False)] | None

ColumnOrder = Literal["weight", "group"]
"""Columns rounded in an order of their own, groups as stored ("weight") or with an index of each column's ("group")."""

# A search with few degrees of freedom: ratios, strengths, scales; sketches do. And what looks at each weight by itself,
# for which a sketch has too few rows: it inverts a matrix.
SEARCHED = StatisticsSettings(gram=True, weighted_gram=True)
CORRECTED = StatisticsSettings(gram=True, blended_gram=True)
NOTHING = StatisticsSettings(gram=False)

_LARGE_WEIGHT = 1 << 23

# Numbers made for a weight that is rounded under some range: divided, rounded, clipped, multiplied, subtracted.
ROUNDED = 8


class Arguments(BaseModel):
    """Arguments of one method, fields of the recipe's `algo_args`; each field's docstring says what it does."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


Given = TypeVar("Given", covariant=True)
Asked = TypeVar("Asked", contravariant=True)


class Policy(Protocol[Given]):
    """What methods look at of `gs_dist.recipe.policy.QuantPolicy`, which lies above them."""

    @property
    def weight_quant_dtype(self) -> str | None:
        """Number format of the weights, None in float."""

    @property
    def act_quant_dtype(self) -> str | None:
        """Number format of the activations, None in float."""

    @property
    def kvcache_quant_dtype(self) -> str | None:
        """Number format of the KV cache, None in float."""

    @property
    def act_range(self) -> str:
        """How a static activation's range is found: minmax or mse."""

    @property
    def group_size(self) -> int:
        """Input channels of a group, 0 per channel."""

    @property
    def is_static(self) -> bool:
        """Whether activations are quantised with one scale found by calibration."""

    @property
    def clips_weights(self) -> bool:
        """Whether weight ranges are searched."""

    @property
    def searches_ranges_on_the_way(self) -> bool:
        """Whether it is the rounding method that searches them."""

    @property
    def clip_ratios(self) -> tuple[float, ...]:
        """Shares of a range to choose among."""

    @property
    def algo_args(self) -> Given:
        """Arguments of all methods."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A linear's weight (rows, channels), what is taken of its input, and whether that is rescaled first."""

    rows: int
    channels: int
    taken: StatisticsSettings
    rescaled: bool


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Bytes that a method adds while a linear is solved, beside weight and Gram matrices.

    Attributes:
        shared: once for all linears that read one input.
        own: of each linear at work.
        thread: temporaries of each thread.
        threads: how many threads at most hold these at a time; None for all.
    """

    shared: int = 0
    own: int = 0
    thread: int = 0
    threads: int | None = None

    def further(self, num_threads: int) -> int:
        """Temporaries of all threads but the first."""
        holding = num_threads if self.threads is None else min(num_threads, self.threads)
        return self.thread * (holding - 1)


class Method(Generic[Asked]):
    """One method. Stateless: a subclass has one instance, in `gs_dist.methods.table`.

    Attributes:
        field: the recipe's key that turns it on.
        name: the value of that key.
        label: its part of a linear's label, empty for none.
        arguments: fields of `algo_args` that it reads.
    """

    field: ClassVar[str]
    name: ClassVar[str]
    label: ClassVar[str] = ""
    arguments: ClassVar[tuple[str, ...]] = ()

    @property
    def switch(self) -> str:
        """The setting that turns it on."""
        return f"{self.field}: {self.name}"

    def statistics(self, policy: Policy[Asked]) -> StatisticsSettings:
        """What it needs of a linear's input beside the vectors that are always taken."""
        return NOTHING

    def contradictions(self, policy: Policy[Asked]) -> Iterable[Contradiction]:
        """What it does not go together with."""
        return ()

    def settled(self, policy: Policy[Asked]) -> dict[str, object]:
        """Its arguments with their values, and for those left open what it takes."""
        return {name: getattr(policy.algo_args, name) for name in self.arguments}

    def workspace(self, policy: Policy[Asked], work: Work) -> Workspace:
        """Bytes of a solve."""
        return Workspace()

    def operations(self, policy: Policy[Asked], work: Work) -> int:
        """Floating-point operations of a solve."""
        return 0


class SuppressionMethod(Method[Asked]):
    """Rescales an input of linears, and their weights against it, before anything is rounded.

    Attributes:
        rescales: whether inputs change at all.
        shifts: whether a constant is subtracted from each channel, which takes a bias.
        forces_clipping: whether weight ranges are searched whatever the recipe says.
    """

    field = "outliers_suppression"
    rescales: ClassVar[bool] = True
    shifts: ClassVar[bool] = False
    forces_clipping: ClassVar[bool] = False

    def exponents(self, policy: Policy[Asked]) -> float | tuple[float, ...]:
        """Strength of the rescaling, or those it is searched among."""
        return ()

    def settled(self, policy: Policy[Asked]) -> dict[str, object]:
        """What is left open is the strength."""
        found = super().settled(policy)
        return {name: self.exponents(policy) if value is None else value for name, value in found.items()}

    def clips_by_default(self, policy: Policy[Asked]) -> bool:
        """Whether weight ranges are searched where the recipe leaves that open and static ranges are of least error."""
        return False

    def range_searches(self, policy: Policy[Asked]) -> int:
        """How many static ranges it has searched on the way to its own result."""
        return 0


class RoundingMethod(Method[Asked]):
    """Chooses the codes of a weight."""

    field = "precision_recovery"

    def searches_ranges(self, policy: Policy[Asked]) -> bool:
        """Whether it searches weight ranges itself, so that nothing has to do it before."""
        return False

    def clip_ratios(self, policy: Policy[Asked]) -> tuple[float, ...]:
        """Shares of a range that it tries where it `searches_ranges` and the recipe names none."""
        return ()

    def column_order(self, policy: Policy[Asked]) -> ColumnOrder | None:
        """Whether it takes the columns in an order of its own, and whose groups follow."""
        return None


def is_large(rows: int, channels: int) -> bool:
    """Whether a weight is solved by itself, by all threads, rather than beside others that read the same input."""
    return rows * channels > _LARGE_WEIGHT


def error_operations(rows: int, channels: int, taken: StatisticsSettings) -> int:
    """Operations of tr(D G DT): two for an entry of a sketch's factor, or of half of the symmetric matrix."""
    return rows * channels * (2 * (taken.sketch_rows + 1) if taken.sketches(channels) else channels)


def objective_bytes(channels: int, taken: StatisticsSettings) -> int:
    """Bytes of what errors are multiplied with: a sketch's factor, or a matrix."""
    return 4 * channels * (taken.sketch_rows + 1 if taken.sketches(channels) else channels)
