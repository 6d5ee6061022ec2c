"""Outlier suppression for the linears that share an input, by whichever algorithm their policy names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.errors import UserError
from gs_dist.methods.exponent_search import SEARCH_ROWS
from gs_dist.methods.outlier_suppression import SHIFT_STEP
from gs_dist.model.decoder import LayerInput
from gs_dist.model.statistics import InputStatistics
from gs_dist.recipe.policy import OutliersSuppressionType, QuantPolicy
from gs_dist.results.quantized import Float32
from gs_dist.solvers import activation_range, awq, outlier_suppression, output_error
from gs_dist.solvers.activation_range import ActivationRange
from gs_dist.solvers.bias_correction import ChannelMeans, channel_means
from gs_dist.solvers.folding import FoldedTensors, source_index, tie_max
from gs_dist.solvers.objective import searched_objective
from gs_dist.solvers.rescaling import Rescaling
from gs_dist.solvers.smoothquant import smoothing_scale
from gs_dist.solvers.threads import ONE_THREAD, Threads

__all__ = ["input_ranges", "suppress"]

_RARE = 0.002  # share of a channel's values that the middle of the usual ones leaves out


def suppress(
    layer_input: LayerInput,
    policies: Mapping[str, QuantPolicy | None],
    statistics: InputStatistics | None,
    folded: FoldedTensors,
    scale_dtype: str,
    *,
    new_biases: Collection[str] = (),
    divides_inputs: bool = True,
    threads: Threads = ONE_THREAD,
) -> Rescaling:
    """Finds an input's rescaling and folds it into `folded`.

    Args:
        layer_input: the input and the linears that read it.
        policies: of every reader; None for one that stays as it is.
        statistics: of the input as calibrated.
        folded: the layer's tensors; changed.
        scale_dtype: dtype the weights' scales will be stored in.
        new_biases: norms and linears that can be published with a bias though they have none.
        divides_inputs: whether linears may divide their input themselves where nothing before takes that up.
        threads: share the candidates of a search.

    Raises:
        UserError: the readers' policies differ, or a Gram matrix is lacking.
    """
    policy = _common_policy(layer_input, policies)
    if policy is None or statistics is None:
        return Rescaling()
    if layer_input.source is None and not divides_inputs:
        left = f"{policy.outliers_suppression.value} left out: no norm or linear before it can take up a rescaling"
        return Rescaling(notes=(left,))
    shared = _SharedInput(layer_input, policy, statistics, folded, scale_dtype, new_biases, threads)
    return _KERNELS[policy.outliers_suppression](shared)


def _common_policy(layer_input: LayerInput, policies: Mapping[str, QuantPolicy | None]) -> QuantPolicy | None:
    """The one policy of an input's readers if it suppresses outliers, else None."""
    asked = [p for p in policies.values() if p and p.suppression.rescales]
    if not asked:
        return None
    cache = {"kvcache_quant_dtype": None, "kvcache_quant_granularity": "per_channel"}
    if len({None if p is None else p.model_copy(update=cache) for p in policies.values()}) > 1:
        listed = ", ".join(layer_input.linears)
        raise UserError(
            f"{listed} share the input {layer_input.name}, which {asked[0].outliers_suppression.value} rescales for "
            "all of them, and their policies differ: give them the same policy in layer_policies and "
            "opname_blacklist, or set outliers_suppression: none for all of them"
        )
    return asked[0]


@dataclass(frozen=True)
class _SharedInput:
    """What a method is given of an input and the linears that read it, and SmoothQuant's exponent by search."""

    layer_input: LayerInput
    policy: QuantPolicy
    statistics: InputStatistics
    folded: FoldedTensors
    scale_dtype: str
    new_biases: Collection[str]
    threads: Threads

    def fold(self, scale: Float32, **rest: Any) -> Rescaling:
        """Divides the input by `scale` (channels,)."""
        explicit = self.layer_input.source is None
        return Rescaling(scale=self.folded.fold(self.layer_input, scale), explicit=explicit, **rest)

    @cached_property
    def alphas(self) -> tuple[float, ...]:
        alphas = self.policy.exponents
        return (alphas,) if isinstance(alphas, float) else alphas

    @cached_property
    def weights(self) -> list[Float32]:
        found = []
        for name in self.layer_input.linears:
            rows = self.folded.shape(name)[0]
            found.append(self.folded.weight(name, slice(None, None, max(1, -(-rows // SEARCH_ROWS)))))
        return found

    def tie(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return tie_max(values, self.layer_input)

    def exponent(
        self,
        shift: Float32 | None = None,
        means: ChannelMeans | None = None,
        alphas: tuple[float, ...] | None = None,
    ) -> outlier_suppression.ExponentResult:
        searched_objective(self.statistics)  # there is something to search by
        return outlier_suppression.search_exponent(
            self.weights,
            self.tie(self.folded.column_max(self.layer_input.linears, self.threads)),
            self.statistics,
            self.policy,
            alphas=self.alphas if alphas is None else alphas,
            scale_dtype=self.scale_dtype,
            shift=shift,
            means=means,
            tie=self.tie,
            threads=self.threads,
        )

    def middles(self) -> list[Float32]:
        """Shifts worth trying, (channels,): the middle of all values, and of those that are not rare."""
        ranges = [(self.statistics.minimum, self.statistics.maximum)]
        if self.statistics.histogram is not None:
            ranges.append(activation_range.central_range(self.statistics, _RARE))
        return [np.asarray(0.5 * (self.tie(high) - self.tie(-low)), dtype=np.float32) for low, high in ranges]


def _unchanged(shared: _SharedInput) -> Rescaling:
    return Rescaling()


def _smoothed(shared: _SharedInput) -> Rescaling:
    """SmoothQuant with one strength, which needs no search, or the best of several."""
    alpha = shared.policy.exponents
    if not isinstance(alpha, float):
        return _searched(shared)
    columns = shared.folded.column_max(shared.layer_input.linears, shared.threads)
    return shared.fold(smoothing_scale(shared.tie(shared.statistics.max_abs), shared.tie(columns), alpha))


def _searched(shared: _SharedInput) -> Rescaling:
    """SmoothQuant's scale of the strength that leaves the least error: Outlier Suppression Lite."""
    return shared.fold(shared.exponent().scale)


def _by_awq(shared: _SharedInput) -> Rescaling:
    layer_input = shared.layer_input
    found = awq.search_scale(
        shared.threads.map(shared.folded.weight, layer_input.linears),
        shared.statistics,
        shared.policy,
        objective=searched_objective(shared.statistics),
        scale_dtype=shared.scale_dtype,
        tie=None if layer_input.repeat == 1 else source_index(layer_input),
        threads=shared.threads,
    )
    if found.alpha is None:
        return Rescaling(notes=("AWQ: no scale of the search was better than plain rounding",))
    return shared.fold(found.scale)


def _shifted(search: _SharedInput) -> Rescaling:
    """Outlier Suppression Plus: shifts the input if something absorbs that and the loss falls; corrects biases.

    The paper shifts to the middle of all values. Where one token is enormous, that would push all others to the
    edge of the range, so the middle of the usual values is tried too, and no shift at all.
    """
    if search.policy.act_quant_dtype is None:
        return _searched(search)
    layer_input, folded, new_biases = search.layer_input, search.folded, search.new_biases
    source = layer_input.source
    without = [n for n in layer_input.linears if source is not None and not _takes_bias(n, folded, new_biases)]
    means = None if without else channel_means(search.statistics)
    best, shift = search.exponent(means=means), None
    lacking = _why_unshifted(source, without, layer_input, folded, new_biases)
    some = search.alphas[::SHIFT_STEP]
    for middle in search.middles() if lacking is None else ():
        # A few exponents tell whether a shift is any good, and all of them are tried only then.
        if search.exponent(middle, means, some).loss < min(best.losses[::SHIFT_STEP]):
            found = search.exponent(middle, means)
            best, shift = (found, middle) if found.loss < best.loss else (best, shift)
    notes = () if lacking is None else (f"outlier-suppression+ without shift: {lacking}",)
    if lacking is None and source is not None:  # a zero where it stays, so that the bias is always there
        folded.shift(layer_input, np.zeros(layer_input.channels, np.float32) if shift is None else shift)
    rescaling = search.fold(best.scale, means=means, notes=notes)
    if shift is None or rescaling.scale is None:
        return rescaling
    return replace(rescaling, shift=folded.shift_in_force(layer_input, shift, rescaling.scale))


def _takes_bias(name: str, folded: FoldedTensors, new_biases: Collection[str]) -> bool:
    return folded.has_bias(name) or name in new_biases


def _why_unshifted(
    source: str | None,
    without: Sequence[str],
    layer_input: LayerInput,
    folded: FoldedTensors,
    new_biases: Collection[str],
) -> str | None:
    """What keeps an input from being shifted; None if its source and the readers' biases take the shift up."""
    if source is None:
        return None
    if without or not _takes_bias(source, folded, new_biases):
        return f"{[*without, source][0]} has no bias to absorb it"
    return None if folded.passes_shift(layer_input) else f"{source} is not all that makes {layer_input.name}"


# The kernel of each method of `gs_dist.methods` that rescales.
_KERNELS: Mapping[OutliersSuppressionType, Callable[[_SharedInput], Rescaling]] = {
    OutliersSuppressionType.SMOOTH: _smoothed,
    OutliersSuppressionType.AWQ: _by_awq,
    OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE: _searched,
    OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS: _shifted,
    OutliersSuppressionType.NONE: _unchanged,
}


def input_ranges(
    policies: Mapping[str, QuantPolicy],
    statistics: InputStatistics,
    rescaling: Rescaling,
    folded: FoldedTensors,
    scale_dtype: str,
) -> dict[str, ActivationRange]:
    """Static range of an input for each reader that takes one; readers of like settings share it.

    A shared range lets serving engines fuse the readers into one matrix multiplication.

    Raises:
        UserError: a range of least error is asked for and no histogram was taken.
    """
    ranges: dict[str, ActivationRange] = {}
    settings: dict[tuple[str, bool], list[str]] = {}
    for name, policy in policies.items():
        if policy.is_static:
            settings.setdefault((policy.act_range, policy.act_symmetric), []).append(name)
    for (kind, symmetric), names in settings.items():
        if kind == "minmax":
            seen = rescaling.ranges_of(statistics)
            found = activation_range.minmax_range(seen, symmetric=symmetric, scale_dtype=scale_dtype)
        else:
            columns = sum(output_error.column_energy(folded.weight(name)) for name in names)
            profile = activation_range.range_profile(
                statistics, rescaling.scale, np.asarray(columns), weighting="both", shift=rescaling.shift
            )
            found = activation_range.least_error_range(profile, symmetric=symmetric, scale_dtype=scale_dtype)
        ranges.update(dict.fromkeys(names, found))
    return ranges
