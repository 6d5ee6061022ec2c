"""A first recipe for a model: what a scheme stands for, spread as it fits, each key with what it does."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from gs_dist.planning.plan import CalibrationPlan
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.keys import recipe_keys
from gs_dist.recipe.sizes import format_bytes
from gs_dist.wording import counted

__all__ = ["initial_recipe"]

_WIDTH = 100

# Left out at first, and what most people ask for next: as comments, with a value to start from.
_NEXT: Mapping[str, str] = {
    "max_perplexity_increase": "0.05",
    "layer_policies": "{'.*mlp\\.down_proj': null}",
    "sensitivity": "true",
    "keep_statistics": "true",
}


def initial_recipe(document: Mapping[str, Any], plan: CalibrationPlan, *, scheme: str, shipped: bool) -> str:
    """The recipe as YAML with comments.

    Args:
        document: the keys of the recipe, without `parallel`.
        plan: made of it.
        scheme: the preset's name.
        shipped: whether the data are the text that ships with the package.
    """
    told = {key.path: key.description for key in recipe_keys(CalibrationConfig)}
    lines = [
        f"# {scheme} of a {plan.architecture.model_type} model of {counted(plan.architecture.num_layers, 'layer')}.",
        "# `gs-dist plan` shows what it takes, `gs-dist quantize` runs it, `gs-dist recipe` lists every key.",
    ]
    if shipped:
        lines += ["", "# calibration.data are English novels that come with gs_dist: name text of your own domain."]
    for key, value in document.items():
        lines += ["", *_entry(key, value, told)]
    lines += ["", *_parallel(plan, told)]
    lines += ["", "# What most recipes ask for next; remove the # before a key.", *_next(told)]
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, told: Mapping[str, str]) -> Iterator[str]:
    if key in told:
        yield from _comment(told[key])
    if isinstance(value, Mapping):
        yield f"{key}:"
        for inner, entry in value.items():
            yield from _comment(told.get(f"{key}.{inner}", ""), indent="  ")
            yield f"  {inner}: {_flow(entry)}"
    else:
        yield f"{key}: {_flow(value)}"


def _parallel(plan: CalibrationPlan, told: Mapping[str, str]) -> Iterator[str]:
    peak = max(stage.memory.peak for stage in plan.stages)
    yield from _comment(
        f"As it fits: {counted(plan.num_workers, 'worker')} on {plan.device}, each with "
        f"{counted(plan.threads_per_worker, 'thread')} and at most {format_bytes(peak)} of "
        f"{format_bytes(plan.memory_per_worker)} that it may use. `auto` decides anew wherever the recipe runs."
    )
    values = {
        "pipeline_parallel_size": plan.pipeline_parallel_size,
        "data_parallel_size": plan.data_parallel_size,
        "memory_per_worker": "auto",
    }
    yield from _entry("parallel", values, told)


def _next(told: Mapping[str, str]) -> Iterator[str]:
    for key, value in _NEXT.items():
        yield from _comment(told[key])
        yield f"# {key}: {value}"


def _comment(text: str, indent: str = "") -> Iterator[str]:
    for line in textwrap.wrap(text, _WIDTH - len(indent) - 2):
        yield f"{indent}# {line}"


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=sys.maxsize)
    return text.removesuffix("...\n").strip()
