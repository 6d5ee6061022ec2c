"""How one linear is quantised.

Field names and values are those of `mindspore_gs.ptq.PTQConfig`; data types are spelt as strings so
that this module needs no framework. Enum members compare equal to their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gs_dist.methods.clip import RATIOS as CLIP_RATIOS
from gs_dist.methods.contradiction import Contradiction
from gs_dist.methods.method import ColumnOrder, Method, RoundingMethod, SuppressionMethod
from gs_dist.methods.table import (
    CLIP,
    METHODS,
    ROUNDINGS,
    SUPPRESSIONS,
    AlgoArgs,
    OutliersSuppressionType,
    PrecisionRecovery,
)
from gs_dist.model.decoder import LayerInput
from gs_dist.model.statistics import StatisticsSettings
from gs_dist.numbers.integer import INT8
from gs_dist.numbers.number_format import NumberFormat
from gs_dist.numbers.table import WEIGHT_FORMATS, WeightFormatName

__all__ = [
    "AlgoArgs",
    "OutliersSuppressionType",
    "PrecisionRecovery",
    "QuantPolicy",
    "contradictions",
    "required_statistics",
]


def _usual_word(value: object) -> object:
    """Golden Stick's name of a number format that most people call otherwise."""
    return "qint4x2" if value == "int4" else value


class QuantPolicy(BaseModel):
    """How one linear is quantised. Frozen, keyword-only; contradictions are refused when it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    weight_quant_dtype: Annotated[WeightFormatName | None, BeforeValidator(_usual_word)] = "int8"
    """Number format of weights; null leaves them in float. int4 is another word for qint4x2, Golden Stick's."""
    act_quant_dtype: Literal["int8"] | None = None
    """Activations: int8, or null for weights alone (A16)."""
    kvcache_quant_dtype: Literal["int8"] | None = None
    """KV cache: int8, or null."""
    weight_quant_granularity: Literal["per_channel", "per_group"] = "per_channel"
    """A scale for each output channel, or for each group of input channels."""
    act_quant_granularity: Literal["per_tensor", "per_token", "pd_mix"] = "per_tensor"
    """One static scale from calibration, or one for each token, taken while serving. pd_mix has both: vLLM-Ascend's
    W8A8_MIX takes a scale for each token while it prefills, and the static one on nodes that decode only."""
    kvcache_quant_granularity: Literal["per_channel", "per_token"] = "per_channel"
    """Static scales for each channel; per_token leaves nothing to publish and exists in gs_dist.ptq alone."""
    group_size: int = 0
    """Input channels of a group, of a size that the number format has; 0 with per_channel."""
    weight_symmetric: bool = True
    """Weights without zero points."""
    act_symmetric: bool = True
    """Activations without zero points; Ascend loads no others from compressed-tensors."""
    outliers_suppression: Annotated[OutliersSuppressionType, Field(strict=False)] = OutliersSuppressionType.NONE
    """How outliers are moved from activations into weights before rounding."""
    precision_recovery: Annotated[PrecisionRecovery, Field(strict=False)] = PrecisionRecovery.NONE
    """gptq corrects each rounding error in the weights not yet rounded; coordinate-descent then revisits each."""
    weight_clip: bool | None = None
    """Search each weight's range for the least output error; null: for static activations whose smoothing is searched.
    awq and outlier-suppression-lite do it anyway."""
    act_range: Literal["minmax", "mse"] = "mse"
    """Static ranges of activations: all that was seen, or the range of least squared error."""
    algo_args: AlgoArgs = AlgoArgs()
    """Arguments of the algorithms; one that nothing reads is refused."""

    @property
    def weight_format(self) -> NumberFormat:
        """Of the weights of a linear that is quantised.

        Raises:
            ValueError: they stay as they are.
        """
        if self.weight_quant_dtype is None:
            raise ValueError("a linear that stays in float has no number format")
        return WEIGHT_FORMATS[self.weight_quant_dtype]

    @property
    def quantizes_linear(self) -> bool:
        """Whether weights or activations of the linear change at all."""
        return self.weight_quant_dtype is not None

    @property
    def suppression(self) -> SuppressionMethod[AlgoArgs]:
        """What `outliers_suppression` names."""
        return SUPPRESSIONS[self.outliers_suppression]

    @property
    def rounding(self) -> RoundingMethod[AlgoArgs]:
        """What `precision_recovery` names."""
        return ROUNDINGS[self.precision_recovery]

    @property
    def weight_methods(self) -> tuple[Method[AlgoArgs], ...]:
        """What works on the weights once inputs are rescaled, in order."""
        return (CLIP, self.rounding) if self.clips_weights else (self.rounding,)

    @property
    def methods(self) -> tuple[Method[AlgoArgs], ...]:
        """All that the policy turns on, in the order in which they work."""
        return (self.suppression, *self.weight_methods)

    @property
    def exponents(self) -> float | tuple[float, ...]:
        """Strength of the outlier suppression, or those it is searched among."""
        return self.suppression.exponents(self)

    @property
    def makes_bias(self) -> bool:
        """Whether the linear may end up with a bias that the source model lacks, where a checkpoint has room for one.

        A static linear's integer product has a correction added anyway, which holds it at no cost.
        """
        return self.is_static and self.suppression.shifts

    @property
    def clips_weights(self) -> bool:
        """Whether the weight's ranges are searched.

        Some methods force it on. Unless the recipe says, it is on too where a search moves a static activation's
        outliers into weights: the columns that take them up would set the range of each row otherwise.
        """
        if self.suppression.forces_clipping:
            return True
        if self.weight_clip is not None or not (self.is_static and self.act_range == "mse"):
            return bool(self.weight_clip)
        return self.suppression.clips_by_default(self)

    @property
    def searches_ranges_on_the_way(self) -> bool:
        """Whether it is the rounding method that searches the weight's ranges, where they are."""
        return self.rounding.searches_ranges(self)

    @property
    def clip_ratios(self) -> tuple[float, ...]:
        """Shares of a range that clipping, or a rounding method that searches ranges, chooses among."""
        given = self.algo_args.weight_clip_ratio
        if given is None and self.quantizes_linear and self.weight_format.range_ratios:
            return self.weight_format.range_ratios
        if given is None:
            return self.rounding.clip_ratios(self) if self.searches_ranges_on_the_way else CLIP_RATIOS
        return (given,) if isinstance(given, float) else given

    @property
    def column_order(self) -> ColumnOrder | None:
        """Whether columns are rounded in an order of their own, and whose groups follow."""
        return self.rounding.column_order(self)

    @property
    def label(self) -> str:
        """`SmoothQuant-W8-perchannel-A8-pertensor`, `AWQ-wclip-W4-pergroup`, `NA` for a linear that stays.

        As golden-stick's reference page spells it.
        """
        if not self.quantizes_linear:
            return "NA"
        parts = [method.label for method in self.methods if method.label]
        parts.append(f"{self.weight_format.label}-{self.weight_quant_granularity.replace('_', '')}")
        if self.act_quant_dtype is not None:
            parts.append(f"A8-{self.act_quant_granularity.replace('_', '')}")
        return "-".join(parts)

    def effective(self) -> dict[str, Any]:
        """Every setting as it comes out, as a recipe writes it: nulls filled, arguments that nothing reads left out."""
        settled = {name: value for method in self.methods for name, value in method.settled(self).items()}
        written = self.model_dump(mode="json", exclude={"algo_args"}) | {"weight_clip": self.clips_weights}
        args = {name: list(value) if isinstance(value, tuple) else value for name, value in settled.items()}
        return {**written, "algo_args": args}

    def unread_arguments(self, arguments: AlgoArgs) -> dict[str, str]:
        """Fields of `arguments` that are not left at their defaults and that no algorithm of this policy reads.

        Returns:
            Each with the setting that would turn on what reads it.
        """
        fresh = AlgoArgs()
        changed = [name for name in AlgoArgs.model_fields if getattr(arguments, name) != getattr(fresh, name)]
        read = {name for method in self.methods for name in method.arguments}
        readers = {name: next(m.switch for m in METHODS if name in m.arguments) for name in changed}
        return {name: switch for name, switch in readers.items() if name not in read}

    @property
    def is_static(self) -> bool:
        """Whether activations are quantised with one scale found by calibration, be it while decoding alone."""
        return self.act_quant_dtype is not None and self.act_quant_granularity != "per_token"

    @property
    def mixes_phases(self) -> bool:
        """Whether prefilling takes a scale for each token, and decoding the static one."""
        return self.act_quant_dtype is not None and self.act_quant_granularity == "pd_mix"

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> QuantPolicy:
        problems = contradictions(self)
        if problems:
            raise ValueError("; ".join(problem.text() for problem in problems))
        return self


def contradictions(policy: QuantPolicy) -> list[Contradiction]:
    """Everything in a policy, be it made without checks, that does not go together."""
    return [*_contradictions(policy), *(found for m in policy.methods for found in m.contradictions(policy))]


def _contradictions(policy: QuantPolicy) -> Iterator[Contradiction]:
    """What settings exclude each other whatever the method; methods say their own."""
    weight, act, kv = policy.weight_quant_dtype, policy.act_quant_dtype, policy.kvcache_quant_dtype
    w8a8 = weight == "int8" and act == "int8"
    act_per, weight_per = policy.act_quant_granularity, policy.weight_quant_granularity
    if act is not None and weight is None:
        yield _either({"act_quant_dtype": act, "weight_quant_dtype": weight}, {"weight_quant_dtype": "int8"})
    for name, dtype in (("act_quant_dtype", act), ("weight_quant_dtype", weight)):
        if act_per != "per_tensor" and dtype is None:
            yield _either({"act_quant_granularity": act_per, name: dtype}, {name: "int8"})
    if act_per == "pd_mix" and policy.suppression.shifts:
        yield Contradiction(
            field="act_quant_granularity",
            found="pd_mix prefills without the corrections that hold the shifts of outliers_suppression",
            write=[{"act_quant_granularity": "per_tensor"}, {"outliers_suppression": "smooth"}],
        )
    if w8a8 and weight_per != "per_channel":
        yield Contradiction(
            field="weight_quant_granularity",
            found="W8A8 takes weights per channel",
            write=[{"weight_quant_granularity": "per_channel"}, {"act_quant_dtype": None}],
        )
    if kv is None and policy.kvcache_quant_granularity == "per_token":
        found = {"kvcache_quant_granularity": "per_token", "kvcache_quant_dtype": kv}
        yield _either(found, {"kvcache_quant_dtype": "int8"})
    sizes = [allowed for allowed in (WEIGHT_FORMATS[weight] if weight else INT8).group_sizes if allowed]
    size = {"group_size": policy.group_size, "weight_quant_granularity": weight_per}
    if weight_per == "per_group" and policy.group_size not in sizes:
        yield _either(size, *({"group_size": allowed} for allowed in sizes))
    if weight_per != "per_group" and policy.group_size != 0:
        yield _either(size, {"group_size": 0}, {"weight_quant_granularity": "per_group"})
    if weight is not None:
        yield from _of_number_format(policy)
    if weight == "qint4x2" and kv == "int8":
        yield Contradiction(
            field="kvcache_quant_dtype",
            found="qint4x2 weights exclude an int8 KV cache",
            write=[{"kvcache_quant_dtype": None}, {"weight_quant_dtype": "int8"}],
        )
    if weight == "qint4x2" and act == "int8" and act_per != "per_token":
        write = [{"act_quant_granularity": "per_token"}]
        yield Contradiction(field="act_quant_granularity", found="W4A8 takes activations per token", write=write)
    if weight is None and (policy.suppression.rescales or policy.rounding.label or policy.weight_clip):
        yield Contradiction(
            field="weight_quant_dtype",
            found="outliers_suppression, precision_recovery and weight_clip work on quantised weights, and "
            "weight_quant_dtype is null",
            write=[{"weight_quant_dtype": "int8"}],
        )


def _of_number_format(policy: QuantPolicy) -> Iterator[Contradiction]:
    """What a number format has no place for."""
    form, found = policy.weight_format, {"weight_quant_dtype": policy.weight_quant_dtype}
    per, symmetric, act = policy.weight_quant_granularity, policy.weight_symmetric, policy.act_quant_dtype
    if per == "per_channel" and 0 not in form.group_sizes:
        write = [{"weight_quant_granularity": "per_group", "group_size": size} for size in form.group_sizes]
        yield Contradiction(
            field="weight_quant_granularity", found={**found, "weight_quant_granularity": per}, write=write
        )
    if not symmetric and not form.zero_points:
        write = [{"weight_symmetric": True}]
        yield Contradiction(field="weight_symmetric", found={**found, "weight_symmetric": symmetric}, write=write)
    if act is not None and act not in form.activations:
        write = [{"act_quant_dtype": None}]
        yield Contradiction(field="act_quant_dtype", found={**found, "act_quant_dtype": act}, write=write)


def _either(found: Mapping[str, object], *write: Mapping[str, object]) -> Contradiction:
    return Contradiction(field=next(iter(found)), found=found, write=write)


def required_statistics(
    inputs: Sequence[LayerInput], policies: Mapping[str, QuantPolicy | None], *, gram: bool, sketch_rows: int = 0
) -> dict[str, StatisticsSettings]:
    """What must be observed of each input of a layer so that its linears can be solved.

    Args:
        inputs: the layer's inputs.
        policies: policy by linear name within the layer.
        gram: whether errors are to be reported from second moments even where no solver needs them.
        sketch_rows: rows of the sketches that stand for Gram matrices; 0 takes the matrices.
    """
    settings = {}
    for layer_input in inputs:
        readers = [p for p in (policies.get(name) for name in layer_input.linears) if p and p.quantizes_linear]
        needed = [method.statistics(p) for p in readers for method in p.methods]
        settings[layer_input.name] = StatisticsSettings(
            gram=bool(readers) and (gram or any(taken.gram for taken in needed)),
            weighted_gram=any(taken.weighted_gram for taken in needed),
            histogram=any(p.is_static and p.act_range == "mse" for p in readers),
            sample=bool(readers),
            sketch_rows=sketch_rows,
            blended_gram=any(taken.blended_gram for taken in needed),
        )
    return settings
