"""Serving engines, one a file: the rules of its loader, each with the upstream file it comes from, and how to serve."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gs_dist.checkpoint.engines import mindformers, transformers, vllm, vllm_ascend, vllm_mindspore
from gs_dist.checkpoint.engines.base import Engine
from gs_dist.checkpoint.engines.kinds import split_version
from gs_dist.errors import UserError

__all__ = ["ENGINES", "Engine", "engine_named", "require_known"]

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {module.ENGINE.name: module.ENGINE for module in (transformers, vllm, vllm_ascend, vllm_mindspore, mindformers)}
)
"""Name in `gs-dist check --for` to the engine, in the order in which a model card tells of them."""


def engine_named(name: str) -> Engine:
    """An engine by its name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in ENGINES:
        raise UserError(f"{name!r} is no engine that is known here: name one of {', '.join(ENGINES)}")
    return ENGINES[name]


def require_known(text: str) -> None:
    """Refuses `vllm==0.9`: a version of an engine whose rules are not those that are known here.

    Raises:
        UserError: the engine or the version is not known.
    """
    name, version = split_version(text)
    versions = engine_named(name).versions
    if version and not any(known == version or known.startswith(f"{version}.") for known in versions):
        raise UserError(
            f"--for {text}: known versions of {name} are {', '.join(versions)}; name the one nearest to yours"
        )
