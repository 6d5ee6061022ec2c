"""Which linear gets which scheme: a scheme for all, presets of what stays, and patterns that overrule both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gs_dist.checkpoint.sources.catalogue import Catalogue, Weight
from gs_dist.conversion.dialects import WRITERS
from gs_dist.conversion.dialects.base import Encoding, LinearShape
from gs_dist.conversion.schemes import Scheme, find_scheme
from gs_dist.errors import UserError
from gs_dist.model.kept_in_float import fused_with
from gs_dist.recipe.matching import match_patterns
from gs_dist.solvers.integer_rounding import RangeRule

__all__ = ["Assignment", "assign"]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Scheme by full name of linear, None for one that stays; and why it stays, for people."""

    schemes: Mapping[str, Scheme | None]
    kept: Mapping[str, str]


def assign(
    catalogue: Catalogue,
    scheme: Scheme,
    layer_policies: Mapping[str, str | None],
    *,
    group_size: int | None,
    formats: Sequence[str],
    ranges: RangeRule = "min-max",
) -> Assignment:
    """Decides for every linear, and that the formats can hold what was decided.

    A pattern of `layer_policies` is matched by `re.match` on the full name and overrules the presets.

    Raises:
        UserError: a pattern that matches nothing or conflicts with another, a linear that cannot be rounded or
            written so, linears that engines fuse under several schemes, or nothing that is quantised.
    """
    names = catalogue.linear_names
    dense = find_scheme(scheme.dense, group_size, "scheme", ranges) if scheme.dense else scheme
    overruled = match_patterns(names, layer_policies)
    schemes: dict[str, Scheme | None] = {}
    kept: dict[str, str] = {}
    for weight in catalogue.weights:
        for linear in weight.linears:
            name = linear.name
            if name in overruled:
                named = layer_policies[overruled[name]]
                schemes[name] = (
                    None
                    if named is None
                    else find_scheme(named, group_size, f"layer_policies {overruled[name]!r}", ranges)
                )
                if named is None:
                    kept[name] = "layer_policies"
            elif weight.kept is not None:
                schemes[name] = None
                kept[name] = weight.kept
            else:
                schemes[name] = scheme if weight.expert else dense
    if not any(schemes.values()):
        raise UserError(
            "no linear would be quantised: everything is kept in floats by the presets or by layer_policies; name "
            "linears in layer_policies, such as {'.*_proj': W8A8_DYNAMIC}"
        )
    _refuse_mixed(schemes)
    _refuse_conflicts([scheme for scheme in schemes.values() if scheme is not None], formats)
    _refuse_misfits(catalogue.weights, schemes, catalogue.dtype, formats)
    return Assignment(schemes=schemes, kept=kept)


def _refuse_mixed(schemes: Mapping[str, Scheme | None]) -> None:
    """Engines have one scheme for linears that they fuse: q, k and v, gate and up, all experts of a layer."""
    groups: dict[str, str] = {}
    for name, scheme in schemes.items():
        fused = fused_with(name)
        first = groups.setdefault(fused, name)
        if schemes[first] != scheme:
            one, other = (s.name if s is not None else "FLOAT" for s in (schemes[first], scheme))
            raise UserError(
                f"{first} is {one} and {name} is {other}, and engines fuse the two into one: let one entry of "
                "layer_policies cover both"
            )


def _refuse_conflicts(schemes: Sequence[Scheme], formats: Sequence[str]) -> None:
    for name in formats:
        reason = WRITERS[name].conflict(schemes)
        if reason is not None:
            raise UserError(f"the schemes do not go together: {reason}")


def _refuse_misfits(
    weights: Sequence[Weight], schemes: Mapping[str, Scheme | None], dtype: str, formats: Sequence[str]
) -> None:
    found: dict[str, list[str]] = {}
    for weight in weights:
        for linear in weight.linears:
            scheme = schemes[linear.name]
            if scheme is None:
                continue
            shape = LinearShape(name=linear.name, rows=linear.rows, columns=weight.columns, dtype=dtype)
            for reason in _misfits(shape, scheme, formats, expert=weight.expert):
                found.setdefault(reason, []).append(linear.name)
    if found:
        lines = []
        for reason, names in found.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{names[0]}{more}: {reason}")
        raise UserError("the scheme does not fit: " + "; ".join(lines))


def _misfits(shape: LinearShape, scheme: Scheme, formats: Sequence[str], *, expert: bool) -> list[str]:
    reasons = [scheme.weights.misfit(shape.rows, shape.columns)]
    for name in formats:
        encoding = WRITERS[name].encoding(scheme, expert=expert)
        reasons.append(encoding if isinstance(encoding, str) else encoding.misfit(shape))
    return [reason for reason in reasons if reason]


def encoding_of(dialect: str, scheme: Scheme, *, expert: bool) -> Encoding:
    """How a dialect writes a scheme that `assign` let through."""
    found = WRITERS[dialect].encoding(scheme, expert=expert)
    assert not isinstance(found, str), found
    return found


__all__ += ["encoding_of"]
