"""The schemes that weights are converted to: a number format, what engines do with activations, and the field's names.

Names are those that serving engines write: ModelSlim's labels where there is one (vllm-ascend
`quantization/methods/*.py`), else compressed-tensors' presets (`quantization/quant_scheme.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gs_dist.errors import UserError
from gs_dist.numbers.small_float import MXFP4, MXFP8
from gs_dist.solvers.float_rounding import Fp8BlockRounding, Fp8ChannelRounding, MicroscalingRounding
from gs_dist.solvers.integer_rounding import IntegerRounding, RangeRule
from gs_dist.solvers.weight_rounding import WeightRounding

__all__ = ["FLOAT", "SCHEMES", "Scheme", "find_scheme"]

FLOAT = "FLOAT"  # the label of what stays as it is


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a linear is quantised.

    Attributes:
        name: as users write it and description files spell it.
        weights: what its weights are rounded to.
        activations: what engines round its input to while serving: "int8", "fp8", "fp8-group", "mxfp8", "mxfp4", or ""
            where they do not.
        dense: scheme that linears outside of experts get in its place, "" for the same.
        about: for people.
    """

    name: str
    weights: WeightRounding
    activations: str = ""
    dense: str = ""
    about: str = ""

    @property
    def strategy(self) -> str:
        """As a summary spells it: `W8-perchannel-A8-pertoken`."""
        return "-".join(filter(None, (self.weights.label, _ACTIVATIONS[self.activations])))


_ACTIVATIONS: Mapping[str, str] = {
    "": "",
    "int8": "A8-pertoken",
    "fp8": "AFP8-pertoken",
    "fp8-group": "AFP8-pergroup",
    "mxfp8": "AMXFP8-pergroup",
    "mxfp4": "AMXFP4-pergroup",
}


def _schemes(*schemes: Scheme) -> Mapping[str, Scheme]:
    return MappingProxyType({scheme.name: scheme for scheme in schemes})


SCHEMES: Mapping[str, Scheme] = _schemes(
    Scheme(
        name="W8A8_DYNAMIC",
        weights=IntegerRounding(bits=8),
        activations="int8",
        about="int8 a channel, activations int8 a token",
    ),
    Scheme(name="W8A16", weights=IntegerRounding(bits=8), about="int8 a channel, weights alone"),
    Scheme(name="W4A16", weights=IntegerRounding(bits=4, group_size=128), about="int4 in groups, weights alone"),
    Scheme(
        name="W4A8_DYNAMIC",
        weights=IntegerRounding(bits=4),
        activations="int8",
        dense="W8A8_DYNAMIC",
        about="experts int4 a channel, other linears int8, activations int8 a token",
    ),
    Scheme(
        name="W8A8FP8_DYNAMIC",
        weights=Fp8ChannelRounding(),
        activations="fp8",
        about="FP8 a channel, activations FP8 a token",
    ),
    Scheme(
        name="FP8_BLOCK",
        weights=Fp8BlockRounding(),
        activations="fp8-group",
        about="FP8 in blocks of 128 x 128, activations FP8 in groups of 128",
    ),
    Scheme(
        name="W8A8_MXFP8",
        weights=MicroscalingRounding(element=MXFP8),
        activations="mxfp8",
        about="MXFP8, activations too",
    ),
    Scheme(
        name="W4A8_MXFP",
        weights=MicroscalingRounding(element=MXFP4),
        activations="mxfp8",
        about="MXFP4, activations MXFP8",
    ),
    Scheme(
        name="W4A4_MXFP4",
        weights=MicroscalingRounding(element=MXFP4),
        activations="mxfp4",
        about="MXFP4, activations too",
    ),
    Scheme(name="W4A16_MXFP4", weights=MicroscalingRounding(element=MXFP4), about="MXFP4, weights alone"),
)
"""Name to scheme."""


def find_scheme(name: str, group_size: int | None, where: str, ranges: RangeRule = "min-max") -> Scheme:
    """The scheme of that name, with groups of another size where `group_size` is given.

    Args:
        name: as users write it: `W8A8_DYNAMIC`, or `w8a8-dynamic`.
        group_size: of schemes with groups; None for the scheme's own.
        where: what named it, for messages.
        ranges: how ranges of integers are found.

    Raises:
        UserError: no such scheme, or one whose ranges cannot be searched.
    """
    wanted = name.upper().replace("-", "_")
    scheme = SCHEMES.get(wanted)
    if scheme is None:
        near = difflib.get_close_matches(wanted, SCHEMES, n=1, cutoff=0.5)
        meant = f"do you mean {near[0]}? " if near else ""
        raise UserError(f"{where}: {name!r:.60} is not a scheme; {meant}Schemes are {', '.join(SCHEMES)}")
    weights = scheme.weights
    if not isinstance(weights, IntegerRounding):
        if ranges != "min-max":
            raise UserError(
                f"ranges: {ranges} is for integers, and {where} {wanted} rounds to floats: set ranges: min-max"
            )
        return scheme
    size = group_size if group_size is not None and weights.group_size else weights.group_size
    return dataclasses.replace(scheme, weights=dataclasses.replace(weights, group_size=size, ranges=ranges))
