"""The choice that `bits: auto` makes: from what schemes cost each linear to the policies of the job."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from gs_dist.checkpoint.kept_statistics import holds_statistics
from gs_dist.checkpoint.layer_costs import read_judgement
from gs_dist.checkpoint.lineage import checksums
from gs_dist.checkpoint.output_lock import LAYER_POLICIES
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_record import version_differences
from gs_dist.checkpoint.writer import write_bytes
from gs_dist.errors import DamagedError
from gs_dist.planning.bits import override_of
from gs_dist.planning.plan import CalibrationPlan
from gs_dist.progress import Progress
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.pattern import compiled
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.costs import FLOAT, LayerCosts, SchemeCost
from gs_dist.results.quantized import LinearSummary
from gs_dist.runtime.job import Job
from gs_dist.runtime.software import Software
from gs_dist.seal import sealed_text
from gs_dist.solvers.sensitivity import choose_schemes, fits, layer_patterns, within_ceilings
from gs_dist.wording import counted

__all__ = ["choose", "chosen_policies", "judged_before", "render_layer_policies", "with_scheme_errors"]

_SIMPLE_KEY = 1000  # characters; YAML takes 1024 at most without a question mark


def judged_before(
    job: Job, finished: Collection[int], reader: CheckpointReader, progress: Progress
) -> dict[int, LayerCosts]:
    """What was judged before a crash, unless the layer is still to be solved and its statistics are gone.

    Args:
        job: with `bits: auto`.
        finished: layers that are published.
        reader: of the float checkpoint; its tensors are held against those that were judged.
        progress: told of what is judged again, and why.
    """
    output, made_with = Path(job.config.output), Software.here().made_with
    judged: dict[int, LayerCosts] = {}
    for layer in range(job.plan.architecture.num_layers):
        try:
            found = read_judgement(output, layer)
        except DamagedError as error:
            progress.message(f"{error}: layer {layer} is judged again")
            continue
        solvable = layer in finished or job.statistics_from is not None or holds_statistics(output, layer)
        if (
            found is not None
            and solvable
            and found.fingerprints == job.fingerprints
            and not version_differences(found.made_with, made_with)
            and not found.lineage.changed(checksums(reader.read_layer(layer)))
        ):
            judged[layer] = found.costs
    return judged


def choose(job: Job, judged: Mapping[int, LayerCosts], progress: Progress) -> Job:
    """Chooses under the budget, and writes the choice down; the job that solves it, from the statistics judged on.

    Args:
        job: with `bits: auto`.
        judged: costs of every layer.
        progress: told of the choice.
    """
    output = job.config.output
    plan, layer_policies = chosen_policies(job.config, job.plan, judged, progress.message)
    text = render_layer_policies(layer_policies, job.fingerprints.recipe)
    write_bytes(Path(output) / LAYER_POLICIES, sealed_text(text).encode())
    counts = Counter(
        policy.weight_format.bits if policy else 16 for name, policy in plan.policies.items() if name != "lm_head"
    )
    progress.message(f"chosen: {counted(counts[4], 'linear')} of 4 bits, {counts[8]} of 8, {counts[16]} in float")
    return dataclasses.replace(job, plan=plan, statistics_from=job.statistics_from or output)


def chosen_policies(
    config: CalibrationConfig,
    plan: CalibrationPlan,
    costs: Mapping[int, LayerCosts],
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[CalibrationPlan, dict[str, dict[str, Any] | None]]:
    """The plan with the policies of least total error within the size budget, and these as layer policies.

    A scheme that would take a linear past `max_relative_error` or `max_token_error` is not chosen for it, unless the
    budget leaves nothing else: solvers may do better than the plain rounding that was judged.

    Args:
        config: a recipe with `bits: auto`.
        plan: made of it; linears without a policy stay in float.
        costs: of every decoder layer.
        tell: told what was out of the question, and what was chosen all the same.

    Raises:
        UserError: the budget is too small.
    """
    assert plan.size_budget is not None
    free = {name for name, policy in plan.policies.items() if policy is not None}
    candidates = [_candidate(cost, free) for layer in sorted(costs) for cost in costs[layer].costs]
    offered = [cost for cost in candidates if cost.scheme == FLOAT or cost.name in free]
    chosen = choose_schemes(_sound(offered, config, plan.size_budget, tell), plan.size_budget)
    schemes = {name: scheme for name, scheme in chosen.items() if name in free}
    overrides = {name: override_of(_weight_policy(plan, name, scheme)) for name, scheme in schemes.items()}
    policies: dict[str, QuantPolicy | None] = dict.fromkeys(plan.policies)
    policies |= {name: config.policy_with(override) for name, override in overrides.items()}
    layer_policies: dict[str, dict[str, Any] | None] = dict(config.layer_policies)
    for pattern in layer_patterns(schemes):
        layer_policies[pattern] = next(o for name, o in overrides.items() if compiled(pattern).match(name))
    return dataclasses.replace(plan, policies=policies, size_budget=None), layer_policies


def _sound(
    offered: list[SchemeCost], config: CalibrationConfig, budget: int, tell: Callable[[str], None]
) -> list[SchemeCost]:
    """What is offered, without what would end above the recipe's ceilings where the budget can do without it."""
    sound = within_ceilings(
        offered, max_relative_error=config.max_relative_error, max_token_error=config.max_token_error
    )
    kept = {(cost.name, cost.scheme) for cost in sound}
    lost = [cost for cost in offered if (cost.name, cost.scheme) not in kept]
    if not lost:
        return offered
    worst = max(lost, key=lambda cost: cost.largest_error)
    of_which = (
        f"{counted(len({cost.name for cost in lost}), 'linear')} would lose more than max_relative_error or "
        f"max_token_error allows with fewer bits, {worst.name} the most ({worst.largest_error:.3g} with {worst.scheme})"
    )
    if fits(sound, budget):
        tell(f"{of_which}: those bits are not offered to them")
        return sound
    tell(f"{of_which}, and size_budget leaves no other choice: raise it if the job is refused")
    return offered


def _candidate(cost: SchemeCost, free: set[str]) -> SchemeCost:
    """A linear that stays in float binds none of those that read the same input."""
    return cost if cost.name in free else dataclasses.replace(cost, group=cost.name)


def _weight_policy(plan: CalibrationPlan, name: str, scheme: str) -> QuantPolicy | None:
    within = re.sub(r"^model\.layers\.\d+\.", "", name)
    return None if scheme == FLOAT else plan.schemes[within][scheme]


def render_layer_policies(layer_policies: Mapping[str, Mapping[str, Any] | None], fingerprint: str) -> str:
    """A choice as YAML to paste into a recipe, one line a pattern, in place of `layer_policies` and `bits`.

    Args:
        layer_policies: pattern to what is laid over `ptq`, None for a linear that stays.
        fingerprint: of the recipe that was asked to choose.
    """
    lines = [
        f"# Chosen by bits: auto for recipe {fingerprint[:12]}. With bits: fixed it gives the same model.",
        "layer_policies:",
    ]
    for pattern, override in layer_policies.items():
        key = yaml.safe_dump(pattern, default_style="'", width=1 << 30).strip()
        value = "null"
        if override is not None:
            value = yaml.safe_dump(dict(override), default_flow_style=True, sort_keys=False, width=1 << 30).strip()
        lines.append(f"  {key}: {value}" if len(key) <= _SIMPLE_KEY else f"  ? {key}\n  : {value}")
    return "\n".join(lines) + "\n"


def with_scheme_errors(row: LinearSummary, costs: LayerCosts | None) -> LinearSummary:
    """A row with what each scheme would cost its linear, where that was found out."""
    found = {c.scheme: c.largest_error for c in (costs.costs if costs else ()) if c.name == row.name}
    found.pop(FLOAT, None)
    return dataclasses.replace(row, scheme_errors=found) if found else row
