"""`bits: auto`: what is chosen, that it fits, and that neither layout nor crash changes it."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import fingerprints_of, inline_group, plan_of, published_hashes, run_inline, small_recipe
from workers import InlineWorkerGroup

from gs_dist.checkpoint.layer_costs import read_costs
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import PlanError, WorkerLostError
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.sizes import stored_bytes
from gs_dist.results.costs import FLOAT
from gs_dist.results.summary import CalibrationSummary
from gs_dist.runtime.choice import chosen_policies
from gs_dist.runtime.stage_worker import Job, StageWorker
from gs_dist.runtime.workers import WorkerKey

W4 = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}
NUM_LAYERS = 4


def auto_recipe(directory: Path, output: str = "out", budget: Any = 0.25, **changes: Any) -> CalibrationConfig:
    settings = {"bits": "auto", "size_budget": budget, "ptq": W4, "num_layers": NUM_LAYERS}
    return small_recipe(directory, output, **{**settings, **changes})


def linear_bytes(config: CalibrationConfig, summary: CalibrationSummary) -> int:
    """Bytes of all linears as the summary's strategies say, counted from shapes."""
    reader = CheckpointReader(Path(config.model))
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in reader.architecture.linears(0)}
    bits = {"W4": W4, "W8": {"weight_quant_dtype": "int8"}, "NA": None}
    total = 0
    for row in summary.rows[:-1]:
        override = next(value for key, value in bits.items() if key in row.strategy)
        policy = None if override is None else config.policy_with({"group_size": 0, **ZERO, **override})
        total += stored_bytes(policy, shapes[row.name.split(".", 3)[3]], "float32")
    return total


ZERO = {"weight_quant_granularity": "per_channel"}


def least_and_full(config: CalibrationConfig) -> tuple[int, int]:
    architecture = CheckpointReader(Path(config.model)).architecture
    shapes = [(linear.out_features, linear.in_features) for linear in architecture.linears(0)]
    policy = config.policy_with(W4)
    least = sum(stored_bytes(policy, shape, "float32") for shape in shapes)
    return NUM_LAYERS * least, NUM_LAYERS * sum(4 * rows * columns for rows, columns in shapes)


def chosen(config: CalibrationConfig) -> dict[str, Any]:
    text = (Path(config.output) / "layer_policies.yaml").read_text()
    return dict(yaml.safe_load(text)["layer_policies"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], CalibrationSummary]:
    directory = tmp_path_factory.mktemp("auto")
    config = auto_recipe(directory)
    summary = run_inline(config)
    return directory, published_hashes(config), summary


Undisturbed = tuple[Path, dict[str, str], CalibrationSummary]


def test_the_choice_mixes_schemes_and_stays_within_the_budget(undisturbed: Undisturbed) -> None:
    """Linears of several schemes take no more than the budget together, and nearly all of it."""
    directory, _, summary = undisturbed
    config = auto_recipe(directory)
    _, full = least_and_full(config)
    taken = linear_bytes(config, summary)
    assert 0.9 * 0.25 * full < taken <= 0.25 * full
    assert len({row.strategy for row in summary.rows[:-1]}) > 1
    for layer in range(NUM_LAYERS):
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            rows = [r for r in summary.rows if r.layer == layer and r.name.endswith(fused)]
            assert len({row.strategy for row in rows}) == 1, "engines fuse these"


def test_the_pasted_choice_gives_the_same_bytes(undisturbed: Undisturbed) -> None:
    """A full run of the recipe with the printed layer_policies in it publishes the same files and config."""
    directory, expected, _ = undisturbed
    pasted = auto_recipe(
        directory, "out-pasted", bits="fixed", budget=None, layer_policies=chosen(auto_recipe(directory))
    )
    run_inline(pasted)
    assert published_hashes(pasted) == expected
    config = "compressed-tensors/config.json"
    assert (Path(pasted.output) / config).read_text() == (directory / "out" / config).read_text()


@pytest.mark.parametrize(("pp", "dp", "wave"), [(2, 1, "auto"), (1, 2, 1), (2, 2, 1)])
def test_the_choice_does_not_depend_on_the_layout(undisturbed: Undisturbed, pp: int, dp: int, wave: int | str) -> None:
    """Any number of stages, replicas and waves chooses and publishes the same."""
    directory, expected, _ = undisturbed
    layout = {"pipeline_parallel_size": pp, "data_parallel_size": dp, "layers_per_wave": wave}
    config = auto_recipe(directory, f"out-{pp}-{dp}-{wave}", parallel=layout)
    run_inline(config)
    assert chosen(config) == chosen(auto_recipe(directory))
    assert published_hashes(config) == expected


@pytest.mark.parametrize("solves_before", [2, NUM_LAYERS, NUM_LAYERS + 2])
def test_a_job_that_ends_half_way_goes_on_from_what_is_on_disk(undisturbed: Undisturbed, solves_before: int) -> None:
    """Ended while judging, between the phases or while solving: the next run repeats no layer, same bytes."""
    directory, expected, _ = undisturbed
    config = auto_recipe(directory, f"out-ended-{solves_before}", parallel={"max_restarts": 0})
    solves: list[WorkerKey] = []

    def dying(job: Job, min_replicas: int) -> InlineWorkerGroup:
        def loses(key: WorkerKey, method: str) -> bool:
            solves.extend([key] if method in ("judge", "solve") else [])
            return len(solves) > solves_before

        return InlineWorkerGroup(partial(StageWorker, job), num_stages=1, num_replicas=1, loses_worker_at=loses)

    with pytest.raises(WorkerLostError):
        run_inline(config, dying)
    groups: list[InlineWorkerGroup] = []

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        groups.append(inline_group(job, min_replicas))
        return groups[-1]

    run_inline(config, make_group)
    assert published_hashes(config) == expected
    again = sum(method in ("judge", "solve") for group in groups for _, method in group.calls)
    assert again == 2 * NUM_LAYERS - solves_before
    if solves_before >= NUM_LAYERS:
        assert not any(method == "step" for group in groups for _, method in group.calls), "no forward pass"


def test_a_finished_run_submitted_again_needs_no_worker(undisturbed: Undisturbed) -> None:
    """The costs that stay in the output give the choice again, without the statistics, which are gone."""
    directory, expected, _ = undisturbed
    config = auto_recipe(directory)

    def no_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        raise AssertionError("no worker is needed")

    assert not (Path(config.output) / "statistics").exists()
    summary = run_inline(config, no_group)
    assert published_hashes(config) == expected
    assert all(row.scheme_errors for row in summary.rows[:-1])


def test_kept_statistics_can_be_solved_under_a_budget(undisturbed: Undisturbed) -> None:
    """Another recipe's kept statistics give the choice and the bytes of a full run, with no forward pass."""
    directory, expected, _ = undisturbed
    kept = small_recipe(directory, "out-kept", ptq={"weight_quant_dtype": "int8"}, keep_statistics=True)
    run_inline(kept)
    config = auto_recipe(directory, "out-resolved")
    groups: list[InlineWorkerGroup] = []

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        groups.append(inline_group(job, min_replicas))
        return groups[-1]

    run_inline(config, make_group, statistics_from=kept.output)
    assert published_hashes(config) == expected
    assert not any(method == "step" for group in groups for _, method in group.calls)
    assert (Path(kept.output) / "statistics" / "layer-00000.safetensors").is_file()


def test_a_larger_budget_never_costs_accuracy(undisturbed: Undisturbed) -> None:
    """The summed error falls, or stays, as the budget grows from the least to nearly all in float."""
    directory, _, _ = undisturbed
    kept = small_recipe(directory, "out-kept-2", ptq=W4, keep_statistics=True)
    run_inline(kept)
    least, full = least_and_full(auto_recipe(directory))
    totals = []
    for number, budget in enumerate((least, least + 5000, full // 4, full // 3, full // 2, full - 1)):
        config = auto_recipe(directory, f"out-budget-{number}", budget=budget)
        summary = run_inline(config, statistics_from=kept.output)
        assert linear_bytes(config, summary) <= budget
        key = {"W4": "W4", "W8": "W8"}
        totals.append(
            sum(
                (row.scheme_errors or {})[next(k for k in key if k in row.strategy)]
                for row in summary.rows[:-1]
                if row.strategy != "NA"
            )
        )
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_linears_named_to_stay_in_float_stay(undisturbed: Undisturbed) -> None:
    """The blacklist and null policies hold, are part of the budget, and of the printed policies."""
    directory, _, _ = undisturbed
    pattern = r".*layers\.[01]\.mlp\.down_proj"
    config = auto_recipe(
        directory,
        "out-fixed",
        budget=0.5,
        ptq={"weight_quant_dtype": "int8", "opname_blacklist": ["o_proj"]},
        layer_policies={pattern: None},
    )
    summary = run_inline(config)
    _, full = least_and_full(config)
    for row in summary.rows[:-1]:
        if "o_proj" in row.name or (row.layer < 2 and "down_proj" in row.name):
            assert row.strategy == "NA"
            assert set(row.scheme_errors or {}) == {"W8", "W4"}, "they are judged all the same"
    assert linear_bytes(config, summary) <= 0.5 * full
    policies = chosen(config)
    assert policies[pattern] is None
    pasted = small_recipe(
        directory,
        "out-fixed-pasted",
        ptq={"weight_quant_dtype": "int8", "opname_blacklist": ["o_proj"]},
        layer_policies=policies,
    )
    run_inline(pasted)
    assert published_hashes(pasted) == published_hashes(config)


def test_a_budget_that_cannot_be_met_is_refused_with_the_least(tmp_path: Path) -> None:
    """The message gives the least budget, as a share and as bytes, and that budget is taken."""
    least, full = least_and_full(auto_recipe(tmp_path))
    with pytest.raises(PlanError, match=rf"{least} bytes .* set it to 0\.\d+ or more"):
        run_inline(auto_recipe(tmp_path, budget=0.05))
    with pytest.raises(PlanError, match=rf"set it to {least} or more"):
        run_inline(auto_recipe(tmp_path, budget=least - 1))
    with pytest.raises(PlanError, match=f"all linears take {full} bytes as they are"):
        run_inline(auto_recipe(tmp_path, budget=full))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_budget": None}, "bits is auto without size_budget"),
        ({"bits": "fixed"}, "size_budget is set while bits is fixed"),
        ({"ptq": {"weight_quant_dtype": "int8", "act_quant_dtype": "int8"}}, "weight-only schemes"),
        ({"ptq": {"weight_quant_dtype": "int8", "kvcache_quant_dtype": "int8"}}, "excludes W4"),
        ({"ptq": {"weight_quant_dtype": None}}, "set it to int8 or qint4x2"),
        ({"layer_policies": {".*o_proj": {"weight_quant_dtype": "int8"}}}, r"has one for \.\*o_proj"),
        ({"propagation": "quantized"}, "set propagation: original"),
        ({"on_bad_layer": "keep_float"}, "could exceed size_budget"),
        ({"gram": "off"}, "set gram: auto"),
        ({"size_budget": 1.5}, "a share between 0 and 1"),
    ],
)
def test_what_does_not_go_with_auto_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Each contradiction says which setting to change."""
    with pytest.raises(ValueError, match=message):
        auto_recipe(tmp_path, **changes)


def test_sensitivity_is_reported_without_changing_what_is_published(undisturbed: Undisturbed) -> None:
    """With `sensitivity: true` every linear has its costs in the summary, equal to those `auto` found; same bytes."""
    directory, _, auto = undisturbed
    plain = small_recipe(directory, "out-plain", ptq=W4)
    assert all(row.scheme_errors is None for row in run_inline(plain).rows)
    config = small_recipe(directory, "out-sensitivity", ptq=W4, sensitivity=True)
    summary = run_inline(config)
    assert published_hashes(config) == published_hashes(plain)
    assert [row.scheme_errors for row in summary.rows] == [row.scheme_errors for row in auto.rows]
    ranked = [row.scheme_errors["W4"] for row in summary.sorted_rows("sensitivity") if row.scheme_errors]
    assert ranked == sorted(ranked, reverse=True)
    for row in summary.rows[:-1]:
        assert row.scheme_errors is not None
        assert row.scheme_errors["W4"] == row.largest_error, "plain rounding is what was done"


def test_costs_of_another_recipe_do_not_count(undisturbed: Undisturbed) -> None:
    """Costs are read back only for the fingerprints that they were written with, and damage counts as absence."""
    directory, _, _ = undisturbed
    config = auto_recipe(directory)
    prints = fingerprints_of(config)
    found = read_costs(Path(config.output), 1, prints)
    assert found is not None
    assert {cost.scheme for cost in found.costs} == {"W8", "W4", FLOAT}
    assert read_costs(Path(config.output), 1, dataclasses.replace(prints, data="other")) is None
    assert read_costs(Path(config.output), NUM_LAYERS, prints) is None


@pytest.mark.parametrize("ceiling", ["max_relative_error", "max_token_error"])
def test_no_linear_gets_bits_that_take_it_past_a_ceiling(undisturbed: Undisturbed, ceiling: str) -> None:
    """As far as the budget can do without them; else they are chosen, and it is said."""
    directory, _, _ = undisturbed
    output = Path(auto_recipe(directory).output)
    judged = [read_costs(output, layer, fingerprints_of(auto_recipe(directory))) for layer in range(NUM_LAYERS)]
    costs = {layer: of_layer for layer, of_layer in enumerate(judged) if of_layer is not None}
    found = [cost for of_layer in costs.values() for cost in of_layer.costs]
    figure = "relative_error" if ceiling == "max_relative_error" else "token_error"
    errors = {(cost.name, cost.scheme): getattr(cost, figure) or 0.0 for cost in found}
    told: list[str] = []

    def chosen_errors(most: float | None) -> list[float]:
        config = auto_recipe(directory, **{"max_relative_error": None, "max_token_error": None, ceiling: most})
        plan, _ = chosen_policies(config, plan_of(config), costs, told.append)
        schemes = {4: "W4", 8: "W8"}
        policies = [(name, policy) for name, policy in plan.policies.items() if policy and name != "lm_head"]
        return [errors[name, schemes[policy.weight_format.bits]] for name, policy in policies]

    worst = max(chosen_errors(None))
    assert told == []
    assert max(chosen_errors(0.999 * worst)) <= 0.999 * worst
    assert ["those bits are not offered to them" in line for line in told] == [True]
    assert max(chosen_errors(1e-9)) > 1e-9
    assert "size_budget leaves no other choice" in told[-1]
