"""Which cell of a network gets which settings."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gs_dist.errors import UserError
from gs_dist.ptq.config import PTQConfig, check_schemes
from gs_dist.ptq.structure import display_name
from gs_dist.recipe.matching import resolve_policies
from gs_dist.recipe.policy import QuantPolicy

__all__ = ["checked_layer_policies", "resolve_cells"]

logger = logging.getLogger(__name__)


def checked_layer_policies(layer_policies: Any, config: PTQConfig) -> OrderedDict[str, PTQConfig | None]:
    """A checked copy of the caller's `layer_policies`.

    Mode and backend are the network's throughout; a policy that says otherwise is warned about (Golden
    Stick also overwrites them in the caller's object).

    Raises:
        TypeError: not an OrderedDict; a key that is no str or no regular expression; a value that is
            neither PTQConfig nor None.
        ValueError: a combination that no algorithm serves.
    """
    if layer_policies is None:
        return OrderedDict()
    if not isinstance(layer_policies, OrderedDict):
        raise TypeError(f"layer_policies must be an OrderedDict, but got {type(layer_policies).__name__}")
    checked: OrderedDict[str, PTQConfig | None] = OrderedDict()
    for key, policy in layer_policies.items():
        if not isinstance(key, str):
            raise TypeError(f"layer_policies: keys must be str, but got {key!r} ({type(key).__name__})")
        try:
            re.compile(key)
        except re.error as error:
            raise TypeError(f"layer_policies: {key!r} is not a regular expression: {error}") from error
        if policy is None:
            checked[key] = None
            continue
        if not isinstance(policy, PTQConfig):
            raise TypeError(f"layer_policies: {key!r} must map to a PTQConfig or None, but got {policy!r}")
        check_schemes(policy, f"layer_policies[{key!r}]")
        _ = policy.policy  # refuses what the solvers would refuse
        for name in ("mode", "backend"):
            asked, given = getattr(policy, name), getattr(config, name)
            if asked is not given:
                logger.warning("layer_policies[%r]: %s is the network's, %s, and not %s", key, name, given, asked)
        checked[key] = policy
    return checked


def resolve_cells(
    linears: Sequence[str],
    caches: Sequence[str],
    outer: Collection[str],
    config: PTQConfig,
    layer_policies: Mapping[str, PTQConfig | None],
) -> dict[str, QuantPolicy | None]:
    """Settings of every linear and KV cache by full name, None for one that stays as it is.

    A key of `layer_policies` is matched with `re.match` on the full name; its config counts alone for the
    cells it matches, blacklist included. Cells in `outer` stay as they are unless a key matches them.

    Raises:
        PolicyConflictError: two keys match one cell.
        UserError: a key, blacklist entry or setting that affects no cell, or nothing is quantised at all.
    """
    names = [*linears, *caches]
    if not names:
        raise UserError("the network holds no linear (nn.Dense, mint.nn.Linear): nothing to quantise")
    patterns = {key: policy.policy if policy else None for key, policy in layer_policies.items()}
    matched = {name: key for name in names for key in layer_policies if re.match(key, name)}
    for entry in config.opname_blacklist:
        blocked = [name for name in names if entry in name]
        if blocked and all(name in matched for name in blocked):
            raise UserError(
                f"opname_blacklist: {entry!r} has no effect, because layer_policies matches every cell it is part of, "
                f"{display_name(blocked[0])} among them: map the pattern {matched[blocked[0]]!r} to None, or remove one"
            )
    resolved = resolve_policies(names, config.policy, patterns, config.opname_blacklist)
    for name in names:
        own = layer_policies[matched[name]] if name in matched else None
        if own is not None and any(entry in name for entry in own.opname_blacklist):
            resolved[name] = None
        if name in outer and name not in matched:
            resolved[name] = None
    for key, policy in layer_policies.items():
        reached = [name for name in names if matched.get(name) == key]
        if policy is not None:
            _require_effect(f"layer_policies[{key!r}]", policy, reached, resolved, caches)
    rest = [name for name in names if name not in matched]
    changed = [name for name in names if _changes(resolved[name], name in caches)]
    if not changed or config.kvcache_quant_dtype is not None:
        _require_effect("config", config, rest, resolved, caches)
    return {name: _part_for(resolved[name], name in caches) for name in names}


def _changes(policy: QuantPolicy | None, is_cache: bool) -> bool:
    if policy is None:
        return False
    return policy.kvcache_quant_dtype is not None if is_cache else policy.quantizes_linear


def _require_effect(
    where: str,
    config: PTQConfig,
    reached: Sequence[str],
    resolved: Mapping[str, QuantPolicy | None],
    caches: Sequence[str],
) -> None:
    """Refuses a config whose weights or KV-cache setting changes none of the cells it holds for."""
    has_linear = any(resolved[name] and name not in caches for name in reached)
    has_cache = any(resolved[name] and name in caches for name in reached)
    if config.weight_quant_dtype is not None and not has_linear and not (has_cache and config.kvcache_quant_dtype):
        raise UserError(f"{where}: it leaves every linear unquantised: correct its pattern or its opname_blacklist")
    if config.kvcache_quant_dtype is not None and not has_cache:
        raise UserError(
            f"{where}: kvcache_quant_dtype is int8, but it holds for no KVCache cell: put gs_dist.ptq.KVCache where "
            "the network writes its cache, widen the pattern, or set kvcache_quant_dtype to None"
        )
    if config.weight_quant_dtype is None and config.kvcache_quant_dtype is None:
        raise UserError(
            f"{where}: it quantises nothing: set weight_quant_dtype (None in layer_policies leaves cells alone)"
        )


def _part_for(policy: QuantPolicy | None, is_cache: bool) -> QuantPolicy | None:
    """What of a policy concerns that kind of cell; None if nothing does."""
    if not _changes(policy, is_cache) or policy is None:
        return None
    if is_cache:
        return QuantPolicy(
            weight_quant_dtype=None,
            kvcache_quant_dtype=policy.kvcache_quant_dtype,
            kvcache_quant_granularity=policy.kvcache_quant_granularity,
        )
    return policy.model_copy(update={"kvcache_quant_dtype": None, "kvcache_quant_granularity": "per_channel"})
