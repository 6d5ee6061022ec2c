"""What a solver hands on: a decoder layer in quantised form, before any file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.integers import Float32, Int8, dequantize

__all__ = [
    "OUTLIER_FACTOR",
    "Float32",
    "Int8",
    "LinearSummary",
    "QuantizedKVCache",
    "QuantizedLayer",
    "QuantizedLinear",
]

OUTLIER_FACTOR = 10.0
"""Of a channel's largest magnitude over the median channel's, from which on it counts as an outlier; a ratio, since
models differ in scale."""


@dataclass(frozen=True, kw_only=True)
class LinearSummary:
    """One row of the summary.

    `strategy` is spelt as the Golden Stick reference page does (`W8-perchannel-A8-pertensor`, `NA`).
    `relative_error` is |Q(W)x - Wx|^2 / |Wx|^2 over all calibration tokens, None for a linear that stays
    as it is and for one whose input was zero throughout; `error_source` says whether it came from the Gram
    matrix (exact for the weights) or from its diagonal alone (channels taken as uncorrelated).
    `activation_error` estimates, on the same scale, what rounding x adds (None where activations stay).
    `token_error` is |z - y|^2 / |y|^2 of the median token of a sample, y being the linear's output and z that of
    the rounded weight on the rounded input, computed as an engine does: the sums over all tokens may belong to a
    few. `scheme_errors` says what plainly rounding the weight to W8 and to W4 would cost, the larger of what all
    tokens and what the median token say, where the recipe asked for it. `notes` records fallbacks and gates.
    `num_given` is set where a linear reads an expert's own input: of `num_tokens`, those that the router gave to the
    expert.
    `input_min` and `input_max` are the least and the largest value of its input over all calibration tokens, before
    any rescaling, and `input_typical` the median over channels of their largest magnitudes. `outlier_channels` are
    the channels whose largest magnitude is `OUTLIER_FACTOR` times that or more, the largest first, a few of them.

    Of a converted linear no token was seen (`error_source` "weight"): the errors are those of the input channels' unit
    vectors, and `zeroed` is the share of weights other than zero that became zero. One that lies in no layer has -1.
    """

    layer: int
    name: str  # full dotted name
    strategy: str
    relative_error: float | None
    error_source: str  # "gram", "sketch", "diagonal", "weight" or "none"
    scale_min: float | None
    scale_max: float | None
    num_tokens: int
    notes: tuple[str, ...] = ()
    activation_error: float | None = None
    scheme_errors: Mapping[str, float] | None = None
    token_error: float | None = None
    num_given: int | None = None
    input_min: float | None = None
    input_max: float | None = None
    input_typical: float | None = None
    outlier_channels: tuple[int, ...] = ()
    zeroed: float | None = None

    @property
    def role(self) -> str:
        """The name with `*` for each number: `model.layers.*.mlp.experts.*.up_proj`."""
        return ".".join("*" if part.isdigit() else part for part in self.name.split("."))

    @property
    def outlier_ratio(self) -> float | None:
        """The input's largest magnitude in units of `input_typical`; None where its range is not known."""
        if self.input_min is None or self.input_max is None or not self.input_typical:
            return None
        return max(abs(self.input_min), abs(self.input_max)) / self.input_typical

    @property
    def energy_error(self) -> float | None:
        """Relative output error over all tokens, rounded activations included; None for a linear that stays."""
        return None if self.relative_error is None else self.relative_error + (self.activation_error or 0.0)

    @property
    def largest_error(self) -> float | None:
        """The larger of what all tokens and what the median token say; None for a linear that stays."""
        known = [error for error in (self.energy_error, self.token_error) if error is not None]
        return max(known, default=None)


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """A linear's integers and what turns them back: weight = (codes - zero_point) * scale, group by group.

    `codes` (out, in) int8 within [-128, 127] or [-8, 7]; `scale` (out, groups) float32, already rounded
    to the checkpoint's dtype so that codes and stored scale belong together (groups is 1 per channel);
    `zero_point` (out, groups) int8 or None when symmetric; `group_index` (in,) int32 names each column's
    group where columns were taken in another order (GPTQ desc_act without static groups), else None.
    `input_scale` and `input_zero_point` are set for static activations: q = round(x / scale + zero_point).
    `bias` (out,) float32 or None, after folding. `smooth_scale` and `smooth_shift` (in,) are set where no
    tensor before the linear could absorb a rescaling: the linear then reads (x - shift) / scale.
    """

    policy: QuantPolicy
    codes: Int8
    scale: Float32
    zero_point: Int8 | None = None
    group_index: npt.NDArray[np.int32] | None = None
    bias: Float32 | None = None
    input_scale: float | None = None
    input_zero_point: int | None = None
    smooth_scale: Float32 | None = None
    smooth_shift: Float32 | None = None

    @property
    def stored_scale(self) -> Float32:
        """(out, groups) float32: what a value of the number format is multiplied by, as files say it; see `unit`."""
        return self.scale * np.float32(self.policy.weight_format.unit)

    def dequantized(self) -> Float32:
        """The weight (out, in) float32 that the integers stand for."""
        return dequantize(self.codes, self.scale, self.zero_point, self.group_index)


@dataclass(frozen=True, kw_only=True)
class QuantizedKVCache:
    """Scales of an int8 KV cache: (num_kv_heads * head_dim,) float32 each; None for per-token (dynamic)."""

    key_scale: Float32 | None
    value_scale: Float32 | None


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """A decoder layer after the solvers.

    `linears` maps a name within the layer (`mlp.down_proj`) to its quantised form. `tensors` holds every
    other tensor of the layer by name within the layer (`input_layernorm.weight`, and `.weight`/`.bias`
    of linears that stay), in the checkpoint's dtype, after folding; one that no folding touched is the
    source tensor bit for bit.
    """

    layer: int
    linears: Mapping[str, QuantizedLinear]
    tensors: Mapping[str, npt.NDArray[np.generic]]
    kv_cache: QuantizedKVCache | None = None
    rows: tuple[LinearSummary, ...] = field(default=())
