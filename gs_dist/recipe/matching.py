"""Which linear gets which policy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gs_dist.errors import PolicyConflictError, UserError
from gs_dist.recipe.pattern import compiled_of_recipe
from gs_dist.recipe.policy import QuantPolicy

__all__ = ["match_patterns", "resolve_policies"]


def match_patterns(names: Sequence[str], patterns: Collection[str]) -> dict[str, str]:
    """The pattern that matches each name, from its start; names that none matches are left out.

    Raises:
        PolicyConflictError: two patterns match one name.
        UserError: a pattern is none that `gs_dist.recipe.pattern` takes, or matches no name.
    """
    compiled = {}
    for pattern in patterns:
        try:
            compiled[pattern] = compiled_of_recipe(pattern)
        except ValueError as error:
            raise UserError(f"layer_policies: {pattern!r} is no pattern of names: {error}") from None
    found: dict[str, str] = {}
    for name in names:
        matching = [key for key, pattern in compiled.items() if pattern.match(name)]
        if len(matching) > 1:
            raise PolicyConflictError(
                f"layer_policies: {matching[0]!r} and {matching[1]!r} conflict, matching same layer {name}; "
                "narrow one of the two patterns"
            )
        if matching:
            found[name] = matching[0]
    unused = sorted(set(compiled) - set(found.values()))
    if unused:
        examples = ", ".join(list(names)[:1] + list(names)[-1:])
        raise UserError(
            f"layer_policies: {unused[0]!r} matches no linear of the model; patterns are matched from the start of the "
            f"full name, as in {examples}: begin with '.*', or remove the entry"
        )
    return found


def resolve_policies(
    names: Sequence[str],
    network_policy: QuantPolicy | None,
    layer_policies: Mapping[str, QuantPolicy | None],
    opname_blacklist: Sequence[str] = (),
) -> dict[str, QuantPolicy | None]:
    """Policy of every linear, None for one that stays as it is.

    A key of `layer_policies` is matched from the start of the full dotted name, and the order of keys
    does not matter; a blacklist entry is a plain substring of the name and holds for linears that no
    key matches (golden-stick `ptq.py`, `_get_decoder_layer_policy`).

    Args:
        names: full dotted names of all linears of the model, `lm_head` included.
        network_policy: for linears that nothing else matches.
        layer_policies: pattern to policy; None leaves the linears alone.
        opname_blacklist: substrings of names left alone.

    Raises:
        PolicyConflictError: two patterns match one linear.
        UserError: a pattern or blacklist entry matches no linear, or no linear would be quantised.
    """
    matched = match_patterns(names, layer_policies)
    unused_blacklist = set(opname_blacklist)
    resolved: dict[str, QuantPolicy | None] = {}
    for name in names:
        blocked = [entry for entry in opname_blacklist if entry in name]
        unused_blacklist.difference_update(blocked)
        if name in matched:
            resolved[name] = layer_policies[matched[name]]
        else:
            resolved[name] = None if blocked else network_policy
    examples = ", ".join(list(names)[:1] + list(names)[-1:])
    if unused_blacklist:
        raise UserError(
            f"opname_blacklist: {sorted(unused_blacklist)[0]!r} is part of no linear's name (names look like "
            f"{examples}): correct the entry or remove it"
        )
    changes = [p for p in resolved.values() if p and (p.quantizes_linear or p.kvcache_quant_dtype)]
    if not changes:
        raise UserError(
            "the policies leave every linear unquantised: set ptq.weight_quant_dtype, or shorten opname_blacklist "
            "and layer_policies"
        )
    return resolved
