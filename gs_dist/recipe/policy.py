"""How one linear is quantised.

Field names and values are those of `mindspore_gs.ptq.PTQConfig`; data types are spelt as strings so
that this module needs no framework. Enum members compare equal to their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gs_dist.model.decoder import LayerInput
from gs_dist.model.statistics import StatisticsSettings

__all__ = [
    "AlgoArgs",
    "OutliersSuppressionType",
    "PrecisionRecovery",
    "QuantPolicy",
    "required_statistics",
]

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]

STATIC_ALPHAS = (0.5, 0.65, 0.8, 0.9)
EXPONENTS = tuple(i / 20 for i in range(20))  # of Golden Stick's AWQConfig
PLUS_EXPONENTS = tuple(i / 20 for i in range(21))  # Golden Stick's outlier suppression with shifts goes up to 1
CLIP_RATIOS = tuple(1 - i / 20 for i in range(10))  # of Golden Stick's AWQConfig
# Shares of a group's largest weight at which GPTQ tries its range. A little beyond it pays at times: the largest
# code is then used by more than one weight.
GPTQ_RANGE_RATIOS = tuple(1.05 - i / 40 for i in range(14))


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
    NONE = "none"

    @classmethod
    def from_str(cls, name: str) -> PrecisionRecovery:
        """Member of that value, upper or lower case; `NONE` for any other text, as upstream."""
        return next((m for m in cls if m.value == name.lower()), cls.NONE)


class AlgoArgs(BaseModel):
    """Arguments of the algorithms, in one flat table (Golden Stick's AWQConfig, GPTQQuantConfig, SmoothQuantConfig)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    # Of each three: one value, several to search, or None for what suits the algorithm that reads it
    # (`QuantPolicy.migration_strength`, `.exponents`, `.clip_ratios`). Each group of linears takes the best.
    alpha: Ratio | Annotated[tuple[Ratio, ...], Field(min_length=1, strict=False)] | None = None
    """SmoothQuant's strength: how much of the outliers moves into the weights; null is 0.5, or a search."""
    duo_scaling: bool = True
    """AWQ looks at the weights' magnitudes as well as at the activations'."""
    smooth_alpha: Ratio | Annotated[tuple[Ratio, ...], Field(min_length=1, strict=False)] | None = None
    """Exponent of AWQ and Outlier Suppression, or several to search among; null searches all of theirs."""
    weight_clip_ratio: Ratio | Annotated[tuple[Ratio, ...], Field(min_length=1, strict=False)] | None = None
    """Shares of a weight's range that clipping, or GPTQ on groups, chooses among; null is a list of theirs."""
    block_size: Annotated[int, Field(gt=0)] = 128
    """Columns that GPTQ rounds before it corrects the ones behind them."""
    desc_act: bool = False
    """GPTQ rounds the channels of largest activations first."""
    damp_percent: Ratio = 0.01
    """What GPTQ adds to the Gram matrix's diagonal, as a share of its mean; raised where it does not suffice."""
    static_groups: bool = False
    """GPTQ finds the scales of all groups before it rounds; with desc_act groups then stay contiguous."""


class QuantPolicy(BaseModel):
    """How one linear is quantised. Frozen, keyword-only; contradictions are refused when it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    weight_quant_dtype: Literal["int8", "qint4x2"] | None = "int8"
    """Weights: int8, qint4x2 (4 bits), or null for linears that stay in float."""
    act_quant_dtype: Literal["int8"] | None = None
    """Activations: int8, or null for weights alone (A16)."""
    kvcache_quant_dtype: Literal["int8"] | None = None
    """KV cache: int8, or null."""
    weight_quant_granularity: Literal["per_channel", "per_group"] = "per_channel"
    """A scale for each output channel, or for each group of input channels."""
    act_quant_granularity: Literal["per_tensor", "per_token"] = "per_tensor"
    """One static scale from calibration, or one for each token, taken while serving."""
    kvcache_quant_granularity: Literal["per_channel", "per_token"] = "per_channel"
    """Static scales for each channel; per_token leaves nothing to publish and exists in gs_dist.ptq alone."""
    group_size: int = 0
    """Input channels of a group: 64, 128 or 256; 0 with per_channel."""
    weight_symmetric: bool = True
    """Weights without zero points."""
    act_symmetric: bool = True
    """Activations without zero points; Ascend loads no others from compressed-tensors."""
    outliers_suppression: Annotated[OutliersSuppressionType, Field(strict=False)] = OutliersSuppressionType.NONE
    """How outliers are moved from activations into weights before rounding."""
    precision_recovery: Annotated[PrecisionRecovery, Field(strict=False)] = PrecisionRecovery.NONE
    """gptq corrects each rounding error in the weights not yet rounded."""
    weight_clip: bool | None = None
    """Search each weight's range for the least output error; null: for static activations whose smoothing is searched.
    awq and outlier-suppression-lite do it anyway."""
    act_range: Literal["minmax", "mse"] = "mse"
    """Static ranges of activations: all that was seen, or the range of least squared error."""
    algo_args: AlgoArgs = AlgoArgs()
    """Arguments of the algorithms; one that nothing reads is refused."""

    @property
    def weight_bits(self) -> int:
        """8, 4, or 16 for a weight that stays as it is."""
        return {"int8": 8, "qint4x2": 4, None: 16}[self.weight_quant_dtype]

    @property
    def quantises_linear(self) -> bool:
        """Whether weights or activations of the linear change at all."""
        return self.weight_quant_dtype is not None

    @property
    def migration_strength(self) -> float | tuple[float, ...]:
        """SmoothQuant's alpha, or those it is searched among.

        Unless the recipe says, static activations with a range of least error search: one token of enormous
        energy then decides neither the range nor how much of it moves into the weights.
        """
        if self.algo_args.alpha is not None:
            return self.algo_args.alpha
        return STATIC_ALPHAS if self.is_static and self.act_range == "mse" else 0.5

    @property
    def exponents(self) -> float | tuple[float, ...]:
        """AWQ's and Outlier Suppression's exponent, or those it is searched among (`smooth_alpha`)."""
        if self.algo_args.smooth_alpha is not None:
            return self.algo_args.smooth_alpha
        plus = self.outliers_suppression is OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS
        return PLUS_EXPONENTS if plus else EXPONENTS

    @property
    def makes_bias(self) -> bool:
        """Whether the linear may end up with a bias that the source model lacks, where a checkpoint has room for one.

        A static linear's integer product has a correction added anyway, which holds it at no cost.
        """
        return self.is_static and self.outliers_suppression is OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS

    @property
    def clips_weights(self) -> bool:
        """Whether the weight's ranges are searched.

        Golden Stick forces clipping on with AWQ and OSL. Where GPTQ rounds groups, it searches their ranges itself.
        Unless the recipe says, it is on too where a search moves a static activation's outliers into weights: the
        columns that take them up would set the range of each row otherwise.
        """
        kind = self.outliers_suppression
        if kind in (OutliersSuppressionType.AWQ, OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE):
            return True
        if self.weight_clip is not None or not (self.is_static and self.act_range == "mse"):
            return bool(self.weight_clip)
        searched = kind is OutliersSuppressionType.SMOOTH and isinstance(self.migration_strength, tuple)
        return searched or kind is OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS

    @property
    def clip_ratios(self) -> tuple[float, ...]:
        """Shares of a range that clipping, or GPTQ where it searches ranges, chooses among (`weight_clip_ratio`)."""
        given = self.algo_args.weight_clip_ratio
        if given is None:
            grouped = self.precision_recovery is PrecisionRecovery.GPTQ and self.group_size > 0
            return GPTQ_RANGE_RATIOS if grouped else CLIP_RATIOS
        return (given,) if isinstance(given, float) else given

    def unread_arguments(self, arguments: AlgoArgs) -> dict[str, str]:
        """Fields of `arguments` that are not left at their defaults and that no algorithm of this policy reads.

        Returns:
            Each with the setting that would turn on what reads it.
        """
        fresh = AlgoArgs()
        changed = [name for name in AlgoArgs.model_fields if getattr(arguments, name) != getattr(fresh, name)]
        return {name: _READERS[name][1] for name in changed if not _READERS[name][0](self)}

    @property
    def is_static(self) -> bool:
        """Whether activations are quantised with one scale found by calibration."""
        return self.act_quant_dtype is not None and self.act_quant_granularity == "per_tensor"

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> QuantPolicy:
        weight, act, kv = self.weight_quant_dtype, self.act_quant_dtype, self.kvcache_quant_dtype
        suppression, recovery = self.outliers_suppression, self.precision_recovery
        w8a8 = weight == "int8" and act == "int8"
        w4a8 = weight == "qint4x2" and act == "int8"
        problems = []
        if act is not None and weight is None:
            problems.append("act_quant_dtype is int8 while weight_quant_dtype is null: set weight_quant_dtype: int8")
        if act is None and self.act_quant_granularity == "per_token":
            problems.append(
                "act_quant_granularity is per_token while act_quant_dtype is null: set act_quant_dtype: int8"
            )
        if w8a8 and self.weight_quant_granularity != "per_channel":
            problems.append(
                "W8A8 takes weights per channel: set weight_quant_granularity: per_channel, or act_quant_dtype: null"
            )
        if kv is None and self.kvcache_quant_granularity == "per_token":
            problems.append(
                "kvcache_quant_granularity is per_token while kvcache_quant_dtype is null: "
                "set kvcache_quant_dtype: int8"
            )
        if self.weight_quant_granularity == "per_group":
            if self.group_size not in (64, 128, 256):
                problems.append(f"group_size is {self.group_size}: per_group takes 64, 128 or 256")
        elif self.group_size != 0:
            problems.append(
                f"group_size is {self.group_size} while weight_quant_granularity is {self.weight_quant_granularity}: "
                "set group_size: 0, or weight_quant_granularity: per_group"
            )
        if w8a8 and suppression is OutliersSuppressionType.AWQ:
            problems.append("AWQ does not serve W8A8: set outliers_suppression: smooth")
        if w8a8 and recovery is PrecisionRecovery.GPTQ:
            problems.append("GPTQ does not serve W8A8: set precision_recovery: none")
        if suppression is OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE and not (w8a8 and kv is None):
            problems.append(
                "outlier-suppression-lite serves exactly W8A8 without KV-cache quantisation: "
                "set weight_quant_dtype and act_quant_dtype to int8 and kvcache_quant_dtype to null"
            )
        if weight == "qint4x2" and kv == "int8":
            problems.append("qint4x2 weights exclude an int8 KV cache: set one of them to null")
        if w4a8:
            if recovery is not PrecisionRecovery.GPTQ:
                problems.append("W4A8 needs precision_recovery: gptq")
            if not (self.algo_args.desc_act and self.algo_args.static_groups):
                problems.append("W4A8 needs algo_args desc_act: true and static_groups: true")
            if self.act_quant_granularity != "per_token":
                problems.append("W4A8 needs act_quant_granularity: per_token")
        if weight is None and (
            suppression is not OutliersSuppressionType.NONE
            or recovery is not PrecisionRecovery.NONE
            or self.weight_clip
        ):
            problems.append(
                "outliers_suppression, precision_recovery and weight_clip work on quantised weights, "
                "and weight_quant_dtype is null: set it, or leave them out"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


_SEARCHED = (
    OutliersSuppressionType.AWQ,
    OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
    OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS,
)
_BY_GPTQ: tuple[Callable[[QuantPolicy], bool], str] = (
    lambda policy: policy.precision_recovery is PrecisionRecovery.GPTQ,
    "precision_recovery: gptq",
)
# What reads each argument, and the setting that turns it on.
_READERS: Mapping[str, tuple[Callable[[QuantPolicy], bool], str]] = {
    "alpha": (lambda p: p.outliers_suppression is OutliersSuppressionType.SMOOTH, "outliers_suppression: smooth"),
    "duo_scaling": (lambda p: p.outliers_suppression is OutliersSuppressionType.AWQ, "outliers_suppression: awq"),
    "smooth_alpha": (lambda p: p.outliers_suppression in _SEARCHED, "outliers_suppression: awq"),
    "weight_clip_ratio": (lambda p: p.clips_weights, "weight_clip: true"),
    **dict.fromkeys(("block_size", "desc_act", "damp_percent", "static_groups"), _BY_GPTQ),
}


def required_statistics(
    inputs: Sequence[LayerInput], policies: Mapping[str, QuantPolicy | None], *, gram: bool
) -> dict[str, StatisticsSettings]:
    """What must be observed of each input of a layer so that its linears can be solved.

    Args:
        inputs: the layer's inputs.
        policies: policy by linear name within the layer.
        gram: whether errors are to be reported from Gram matrices even where no solver needs them.
    """
    settings = {}
    for layer_input in inputs:
        readers = [p for p in (policies.get(name) for name in layer_input.linears) if p and p.quantises_linear]
        searches = any(
            p.precision_recovery is PrecisionRecovery.GPTQ
            or p.clips_weights
            or p.outliers_suppression not in (OutliersSuppressionType.NONE, OutliersSuppressionType.SMOOTH)
            or (p.outliers_suppression is OutliersSuppressionType.SMOOTH and isinstance(p.migration_strength, tuple))
            for p in readers
        )
        settings[layer_input.name] = StatisticsSettings(
            gram=bool(readers) and (gram or searches),
            weighted_gram=searches,
            histogram=any(p.is_static and p.act_range == "mse" for p in readers),
        )
    return settings
