"""The command line: what it prints, and whose turn the exit code says it is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import dialects
import pytest
import yaml
from checkpoints import header_only_checkpoint, tiny_checkpoint
from pydantic import BaseModel
from typer.testing import CliRunner, Result

from gs_dist import __version__
from gs_dist.checkpoint.dialects.ascend.codec import AscendCodec
from gs_dist.checkpoint.dialects.compressed_tensors.codec import CompressedTensorsCodec
from gs_dist.checkpoint.job_end import note_refusal
from gs_dist.checkpoint.manifest import Fingerprints
from gs_dist.checkpoint.run_directory import RunDirectory
from gs_dist.errors import ClusterError, LayerError
from gs_dist.numbers.table import WEIGHT_FORMATS
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.recipe.sections import CalibrationData, ParallelConfig
from gs_dist.results.quantized import LinearSummary
from gs_dist.results.summary import (
    CalibrationSummary,
    FloatComparison,
    PerplexitySummary,
    read_summary,
    write_summary,
)
from gs_dist.seal import sealed_text
from gs_dist.terminal.cli import app


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe for a tiny model that lies beside it."""
    tiny_checkpoint(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tmp_path}/model\noutput: {tmp_path}/out\n"
        "calibration: {data: none.parquet, num_samples: 8, sequence_length: 32}\n"
        "ptq: {opname_blacklist: [lm_head]}\nparallel: {device: cpu}\n"
    )
    return path


def run(*args: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200", **environment})


def a_summary() -> CalibrationSummary:
    rows = [
        LinearSummary(
            layer=i,
            name=f"model.layers.{i}.mlp.up_proj",
            strategy="W8-perchannel",
            relative_error=error,
            error_source="gram",
            scale_min=0.1,
            scale_max=0.2,
            num_tokens=64,
        )
        for i, error in enumerate((0.01, 0.03, 0.02))
    ]
    return CalibrationSummary(
        model="tiny",
        formats=("compressed-tensors",),
        propagation="original",
        num_samples=2,
        num_tokens=64,
        seconds=1.0,
        versions={},
        fingerprints={},
        rows=tuple(rows),
        stages=(),
    )


COMPARISON = FloatComparison(
    loss_increase=0.04879, standard_error=0.00213, mean_kl=0.0234, kl_99th_percentile=0.31, equal_top1=0.9137
)
FIGURES = """  loss increase ± paired standard error, nats:     +0.04879 ± 0.00213
  KL divergence from the float model, mean, nats:  0.02340
  KL divergence, 99th percentile, nats:            0.31000
  most likely token the same:                      91.37%
"""


class Runtime:
    """Stands where the runtime's modules are, so that no cluster is started."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.error: BaseException | None = None

    def quantize(self, config: CalibrationConfig, **options: Any) -> CalibrationSummary:
        self.calls.append((config, options))
        options["progress"].message("starting 1 workers")
        if self.error is not None:
            raise self.error
        return a_summary()

    def evaluate(self, directory: str, data: CalibrationData, **options: Any) -> Any:
        self.calls.append(((directory, data), options))
        if self.error is not None:
            raise self.error
        return tuple(
            PerplexitySummary(
                format=name,
                perplexity=perplexity,
                float_perplexity=None if options["model"] is None else 30.0,
                num_samples=4,
                sequence_length=data.sequence_length,
                num_tokens=2044,
                data=("a.parquet",),
                data_fingerprint="ab" * 32,
                comparison=None if options["model"] is None else COMPARISON,
                engine=options["engine"],
            )
            for name, perplexity in (("ascend", 33.0), ("compressed-tensors", 31.5))
            if name in (options["dialects"] or (name,))
        )


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    for name in ("coordinator", "evaluate"):
        module = ModuleType(f"gs_dist.runtime.{name}")
        module.__dict__.update(quantize=fake.quantize, evaluate=fake.evaluate)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        import gs_dist.runtime

        monkeypatch.setattr(gs_dist.runtime, name, module, raising=False)
    return fake


def test_the_version_is_printed() -> None:
    """`--version` is for bug reports."""
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"gs-dist {__version__}\n")


def test_plan_shows_stages_memory_and_totals(recipe: Path) -> None:
    """Without data or weights read, the job is laid out."""
    result = run("plan", recipe, "parallel.pipeline_parallel_size=2", "parallel.data_parallel_size=1")
    assert result.exit_code == 0
    for part in ("stage", "layers", "peak", "runtime", "weights", "activations", "statistics", "solver workspace"):
        assert part in result.stdout
    assert "model model: llama, 2 layers, float32; 14 of 15 linears are quantised" in result.stdout
    assert "workers: 2 stages x 1 replica on cpu" in result.stdout
    assert "samples: 8 x 32 tokens in 1 micro-batch of 8, 1 reduction block" in result.stdout


def test_plan_prints_the_effective_policy_of_each_kind_of_linear(recipe: Path) -> None:
    """Nulls are filled by what they come out as, linears of one policy stand together, and the text is a recipe's."""
    result = run(
        "plan",
        recipe,
        "--policies",
        "ptq={act_quant_dtype: int8, outliers_suppression: smooth}",
        "layer_policies={'.*layers\\.1\\.mlp\\.down_proj': null, '.*layers\\.0\\.mlp\\.down_proj': "
        "{act_quant_granularity: per_token}}",
    )
    assert result.exit_code == 0, result.output
    blocks = [part.strip("\n") for part in re.split(r"(?m)^(?=self_attn|mlp)", result.stdout)[1:]]
    heads = [block.partition("\n")[0] for block in blocks]
    assert heads[0].endswith("mlp.gate_proj (every layer), mlp.up_proj (every layer):")
    assert heads[1:] == ["mlp.down_proj (layer 0):", "mlp.down_proj (layer 1):"]
    static, dynamic = (yaml.safe_load(block.partition("\n")[2]) for block in blocks[:2])
    assert "# SmoothQuant-wclip-W8-perchannel-A8-pertensor" in blocks[0]
    assert static["algo_args"] == {
        "alpha": [0.5, 0.65, 0.8, 0.9],
        "weight_clip_ratio": pytest.approx([1 - i / 20 for i in range(10)]),
    }
    assert (static["weight_clip"], dynamic["weight_clip"]) == (True, False)
    assert dynamic["algo_args"] == {"alpha": 0.5}
    assert QuantPolicy.model_validate(static).effective() == static
    assert blocks[2].startswith("mlp.down_proj (layer 1):\n  as they are\n")


@pytest.fixture
def large(tmp_path: Path, recipe: Path) -> tuple[object, ...]:
    """`plan` of a 70B model on sixteen cards, from files without data, and on a machine that has no card."""
    header_only_checkpoint(tmp_path / "large", "llama-3-70b")
    settings = ["parallel.device=ascend", "parallel.pipeline_parallel_size=8", "parallel.data_parallel_size=2"]
    return ("plan", recipe, f"model={tmp_path}/large", "calibration.sequence_length=2048", *settings)


NODES = ("--npus-per-node", 8, "--cpus-per-node", 160, "--memory-per-node")


def test_plan_of_a_70b_model_needs_headers_only(large: tuple[object, ...]) -> None:
    """What cards need is planned; of their nodes, of which nothing is said, it says that it is not."""
    result = run(*large)
    assert result.exit_code == 0
    assert "0-79, 10 each" in result.stdout, "stages that differ in their layers alone share a row"
    assert "Memory of an Ascend card" in result.stdout
    assert "Memory of a worker's host" in result.stdout
    assert "8 stages x 2 replicas on ascend, at most 60.0 GiB of a card each\n" in result.stdout
    assert "NOT PLANNED: host memory and cores of the nodes are unknown. These waves would take " in result.stdout
    assert " GiB of host memory a worker, " in result.stdout
    assert " for 8 workers a node. " in result.stdout
    assert " threads and at most" not in result.stdout


def test_plan_for_nodes_that_do_not_run_yet(large: tuple[object, ...]) -> None:
    """With the nodes' sizes, threads and host memory are planned, and what does not fit is refused."""
    result = run(*large, "--nodes", 2, *NODES, "768GiB")
    assert result.exit_code == 0
    assert "20 threads and at most 60.0 GiB of a card and 76.8 GiB of host memory each\n" in result.stdout
    assert "NOT PLANNED" not in result.stdout
    assert "room for" not in result.stdout
    refused = run(*large, "--nodes", 2, *NODES, "32GiB")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "of host memory a worker and the cluster has 3.2 GiB for each" in refused.stderr


def test_plan_tells_what_decides_the_time(large: tuple[object, ...]) -> None:
    """Of one of sixteen workers, half of whose layers are run once more for a second wave."""
    result = run(*large, "--nodes", 2, *NODES, "768GiB", "parallel.layers_per_wave=5")
    patterns = (
        r"forward (\S+), statistics (\S+), solve (\S+)\n",
        r"worker: (\S+) in passes on its card, (\S+) in solves on",
    )
    (total,), (worker,) = (re.findall(pattern, result.stdout) for pattern in patterns)
    forward, observed, solve = map(float, total)
    passes, solves = map(float, worker)
    assert passes == pytest.approx((1.5 * forward + observed) / 16, rel=0.02)
    assert solves == pytest.approx(solve / 16, rel=0.02)


def test_plan_for_fewer_nodes_than_the_job_asks_for(large: tuple[object, ...]) -> None:
    """A replica may be missing; where not even the least number fits, the plan is refused."""
    one = run(*large, *NODES, "768GiB")
    assert one.exit_code == 0
    assert (
        "note: the cluster has room for 8 of 16 workers (8 stages x 2 replicas): a job starts with fewer" in one.stdout
    )
    refused = run(*large, *NODES, "768GiB", "parallel.min_data_parallel_size=2")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "has room for 8 of 16 workers (8 stages x 2 replicas), and needs it for 16 at least" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nodes", 2), "lacks --npus-per-node and --cpus-per-node and --memory-per-node: "),
        ((*NODES, "768"), "gs-dist: --memory-per-node: '768' is not a size: "),
        ((*NODES, "768GiB", "--address", "auto"), "gs-dist: --address asks a cluster that runs "),
    ],
)
def test_a_cluster_is_described_in_full_or_asked(
    large: tuple[object, ...], options: tuple[object, ...], message: str
) -> None:
    """One message says what is missing or too much."""
    result = run(*large, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("gs-dist: ") == 1


def test_plan_asks_a_cluster_that_runs(
    large: tuple[object, ...], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cluster holds is planned for as if it were described; it may still grow, so that a job would wait."""
    facts = {"10.0.0.1:6379": ClusterFacts(num_cpus=320, num_npus=16, memory_bytes=1536 << 30, num_nodes=2)}
    facts["auto"] = ClusterFacts(num_cpus=160, num_npus=4, memory_bytes=768 << 30)

    @contextlib.contextmanager
    def cluster(address: str, num_cpus: int | None, **told: object) -> Iterator[ClusterFacts]:
        assert num_cpus is None
        yield facts[address]

    module = ModuleType("gs_dist.runtime.cluster")
    module.__dict__.update(cluster=cluster)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    result = run(*large, "--address", "10.0.0.1:6379")
    assert result.exit_code == 0
    assert result.stdout == run(*large, "--nodes", 2, *NODES, "768GiB").stdout
    small = run(*large, "--address", "auto")
    assert small.exit_code == 0
    assert "has room for 4 of 16 workers (8 stages x 2 replicas): a job waits up to 600 s for more" in small.stdout


def test_a_plan_that_cannot_fit_is_the_users_turn(recipe: Path) -> None:
    """Exit code 2, and the message names the setting."""
    result = run("plan", recipe, "parallel.memory_per_worker=64MiB", "parallel.pipeline_parallel_size=1")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("gs-dist: stage 0 of 1 (layers 0 to 1, ")
    assert "\n  parallel.memory_per_worker: " in result.stderr


def test_a_bad_recipe_is_told_in_full(recipe: Path) -> None:
    """Every problem of recipe and overrides comes at once, on stderr."""
    result = run("plan", recipe, "paralel.x=1", "calibration.num_samples=0")
    assert result.exit_code == 2
    assert result.stderr == (
        "gs-dist: recipe recipe.yaml has 2 problems:\n"
        "  calibration.num_samples: found 0; write at least 1\n"
        "  paralel: found an unknown key; write parallel if that is meant\n"
    )


@pytest.mark.parametrize("args", [(), ("plan",), ("plam",), ("summary", "x", "--sort", "size"), ("evaluate", "x")])
def test_a_wrong_command_line_is_the_users_turn(args: tuple[str, ...]) -> None:
    """Usage errors have exit code 2 as well."""
    assert run(*args).exit_code == 2


def test_a_missing_model_is_named(recipe: Path) -> None:
    """The checkpoint's own message reaches the user."""
    result = run("plan", recipe, "model=nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def test_quantize_runs_the_recipe_and_shows_the_summary(recipe: Path, tmp_path: Path, runtime: Runtime) -> None:
    """Overrides and options reach the job; progress goes to stderr, the summary to stdout."""
    result = run("quantize", recipe, "calibration.num_samples=4", "--address", "auto", "--keep-statistics")
    assert result.exit_code == 0
    ((config, options),) = runtime.calls
    assert (config.calibration.num_samples, config.keep_statistics, options["address"]) == (4, True, "auto")
    assert result.stderr == "starting 1 workers\n"
    assert "model.layers.1.mlp.up_proj" in result.stdout
    assert f"model: {tmp_path}/out/compressed-tensors" in result.stdout


def test_a_users_mistake_found_by_the_job_has_exit_code_2(recipe: Path, runtime: Runtime) -> None:
    """Whoever finds it, the message is the same."""
    runtime.error = ClusterError("no Ray cluster answers at 'x'")
    result = run("quantize", recipe)
    assert result.exit_code == 2
    assert result.stderr.endswith("gs-dist: no Ray cluster answers at 'x'\n")


def test_a_failed_job_has_exit_code_1_and_names_the_layer(recipe: Path, runtime: Runtime) -> None:
    """One line, no traceback."""
    runtime.error = LayerError("model.layers.3.mlp.up_proj: the scale is not finite\nfurther lines")
    result = run("quantize", recipe)
    assert result.exit_code == 1
    assert result.stderr.endswith("gs-dist: model.layers.3.mlp.up_proj: the scale is not finite\n")


def test_an_unexpected_error_has_exit_code_1_and_one_line(recipe: Path, runtime: Runtime) -> None:
    """Its kind is told, and where to find more."""
    runtime.error = KeyError("q_proj")
    result = run("quantize", recipe)
    assert result.exit_code == 1
    assert result.stderr.endswith("gs-dist: KeyError: 'q_proj' (--debug shows where)\n")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("how", ["before", "behind", "environment"])
def test_debug_shows_where_an_error_came_from(recipe: Path, runtime: Runtime, how: str) -> None:
    """The traceback is for whoever asks."""
    runtime.error = KeyError("q_proj")
    commands = {"before": ("--debug", "quantize", recipe), "behind": ("quantize", recipe, "--debug")}
    result = run(*commands[how]) if how in commands else run("quantize", recipe, GS_DIST_DEBUG="1")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_an_error_that_ray_wraps_is_told_by_its_cause(recipe: Path, runtime: Runtime) -> None:
    """A worker's mistake of the user's is still the user's turn."""
    wrapped = RuntimeError("a page of a worker's traceback")
    wrapped.cause = ClusterError("set model to a directory that all nodes see")  # type: ignore[attr-defined]  # as Ray does
    runtime.error = wrapped
    result = run("quantize", recipe)
    assert result.exit_code == 2
    assert result.stderr.endswith("gs-dist: set model to a directory that all nodes see\n")


def test_an_interrupt_says_how_to_go_on(recipe: Path, runtime: Runtime) -> None:
    """Ctrl-C is no crash."""
    runtime.error = KeyboardInterrupt()
    result = run("quantize", recipe)
    assert result.exit_code == 130
    assert "run the same command again to go on" in result.stderr


def test_the_summary_is_shown_again(tmp_path: Path) -> None:
    """Sorted and limited as asked."""
    write_summary(tmp_path, a_summary())
    result = run("summary", tmp_path, "--sort", "error", "--limit", "2")
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if "up_proj" in line]
    assert ["layers.1." in lines[0], "layers.2." in lines[1], len(lines)] == [True, True, 2]
    assert "1 more linears are not shown" in result.stdout


def test_the_summary_comes_as_json_for_programs(tmp_path: Path) -> None:
    """`--json` prints the file, and the model directory leads to its run."""
    write_summary(tmp_path, a_summary())
    (tmp_path / "compressed-tensors").mkdir()
    result = run("summary", tmp_path / "compressed-tensors", "--json")
    assert result.exit_code == 0
    assert CalibrationSummary.from_json(result.stdout) == a_summary()


def test_a_directory_without_summary_is_the_users_turn(tmp_path: Path) -> None:
    """The message says what to name."""
    result = run("summary", tmp_path)
    assert result.exit_code == 2
    assert "name the output directory of a finished job" in result.stderr


def test_evaluate_shows_both_perplexities_and_records_them(tmp_path: Path, runtime: Runtime) -> None:
    """Side by side, each format's kept in the run's summary and on its own card."""
    formats = ("ascend", "compressed-tensors")
    write_summary(tmp_path, replace(a_summary(), formats=formats))
    # Model and output of one base name, as in models/tiny and runs/tiny.
    recipe = "model: tiny\noutput: tiny\ncalibration: {data: c.parquet}\n"
    (tmp_path / "recipe.yaml").write_text(sealed_text(recipe))
    dialects.save_model(tmp_path / "ascend", AscendCodec(), dialects.W8A8)
    dialects.save_model(tmp_path / "compressed-tensors", CompressedTensorsCodec(), dialects.W8A8)
    assert run("report", tmp_path).exit_code == 0
    data = ["--data", "a.parquet", "--data", "b.parquet", "--num-samples", "4", "--no-packing"]
    result = run("evaluate", tmp_path, *data, "--model", tmp_path / "float")
    assert result.exit_code == 0
    assert result.stdout == (
        "over 4 samples of 512 tokens of a.parquet (2044 predicted tokens, data abababababab)\n"
        "perplexity of the float model:              30.0000\n"
        "perplexity of the ascend model:             33.0000  (+10.00%)\n"
        "perplexity of the compressed-tensors model: 31.5000  (+5.00%)\n"
        f"the ascend model beside the float model:\n{FIGURES}"
        f"the compressed-tensors model beside the float model:\n{FIGURES}"
    )
    (((directory, samples), options),) = runtime.calls
    assert directory == str(tmp_path)
    assert samples == CalibrationData(
        data=("a.parquet", "b.parquet"), num_samples=4, sequence_length=512, packing=False
    )
    assert options["model"] == f"{tmp_path}/float"
    assert options["memory_per_worker"] is None
    assert options["dialects"] == ()
    kept = {found.format: found.perplexity for found in read_summary(tmp_path).evaluations}
    assert kept == {"ascend": 33.0, "compressed-tensors": 31.5}
    cards = [(tmp_path / name / "README.md").read_text() for name in formats]
    assert ["33.0000" in card for card in cards] == [True, False]
    assert ["31.5000" in card for card in cards] == [False, True]
    assert all("| most likely token the same | 91.37% |" in card for card in cards)
    assert "model: tiny\noutput: tiny\n" in cards[0]
    assert '<td>ascend</td><td class="n">33</td>' in (tmp_path / "report.html").read_text()
    run("evaluate", tmp_path, "--data", "a.parquet", "--format", "ascend")
    assert runtime.calls[-1][1]["dialects"] == ("ascend",)


def test_evaluate_prints_json(tmp_path: Path, runtime: Runtime) -> None:
    """Nothing else on standard output; with the engine whose steps were taken."""
    result = run("evaluate", tmp_path, "--data", "a", "--model", tmp_path, "--as", "vllm-ascend", "--json")
    ascend, other = json.loads(result.stdout)
    assert (ascend["format"], ascend["perplexity"], ascend["engine"]) == ("ascend", 33.0, "vllm-ascend")
    assert other["comparison"] == {
        "loss_increase": 0.04879,
        "standard_error": 0.00213,
        "mean_kl": 0.0234,
        "kl_99th_percentile": 0.31,
        "equal_top1": 0.9137,
    }


def test_evaluation_data_are_checked_like_a_recipes(tmp_path: Path, runtime: Runtime) -> None:
    """The same messages for the same settings."""
    result = run("evaluate", tmp_path, "--data", "a", "--num-samples", "0")
    assert result.exit_code == 2
    assert "num_samples: found 0; write at least 1" in result.stderr
    assert runtime.calls == []


def test_the_memory_of_an_evaluation_is_a_size(tmp_path: Path, runtime: Runtime) -> None:
    """Read like that of a recipe; what is not a size is refused."""
    run("evaluate", tmp_path, "--data", "a", "--memory-per-worker", "2GiB")
    (((_, _), options),) = runtime.calls
    assert options["memory_per_worker"] == 2 << 30
    result = run("evaluate", tmp_path, "--data", "a", "--memory-per-worker", "much")
    assert result.exit_code == 2
    assert "--memory-per-worker: 'much' is not a size: write a size such as 60GiB" in result.stderr


def test_check_says_what_a_directory_is(tmp_path: Path) -> None:
    """A clean one is described on stdout, with exit code 0."""
    dialects.save_model(tmp_path, CompressedTensorsCodec(), dialects.W8A8)
    result = run("check", tmp_path, "--for", "transformers")
    assert result.exit_code == 0
    assert result.stdout.endswith(" for transformers: no rule broken, but not verified: see above\n")


def test_check_says_why_a_directory_would_not_load(tmp_path: Path) -> None:
    """A broken one is the user's turn, and so is an unknown engine."""
    dialects.save_model(tmp_path, CompressedTensorsCodec(), dialects.W8A8)
    (tmp_path / "model-00001.safetensors").unlink()
    result = run("check", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "model-00001.safetensors" in result.stderr
    unknown = run("check", tmp_path, "--for", "abacus")
    assert unknown.exit_code == 2
    assert "known engines are" in unknown.stderr


def test_the_installed_command_ends_with_the_exit_code(tmp_path: Path) -> None:
    """The process a job starter sees: code 2, a message on stderr, nothing on stdout, no Ray or MindSpore loaded."""
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(sorted({'ray', 'mindspore', 'pyarrow', 'scipy'} & set(sys.modules))))\n"
        "from gs_dist.terminal.cli import main\n"
        f"sys.argv = ['gs-dist', 'plan', {str(tmp_path / 'none.yaml')!r}]\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ)
    )
    assert (ended.returncode, ended.stdout) == (2, "[]\n")
    assert ended.stderr == (
        f"gs-dist: recipe {tmp_path}/none.yaml cannot be read: No such file or directory; name a YAML file\n"
    )


def test_every_key_of_a_recipe_is_explained() -> None:
    """By the models that check recipes: path, values, default and a line of what it does; a key or section alone."""
    result = run("recipe")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    told = dict(line.split(": ", 1) for line in lines[::2])
    assert all(line.startswith("    ") and line.endswith(".") for line in lines[1::2])
    assert told["parallel.max_in_flight"] == "a whole number or auto; default auto"
    assert told["ptq.algo_args.damp_percent"] == "a number from 0.0 to 1.0; default 0.01"
    assert told["format"].endswith(
        "one or more of compressed-tensors, ascend, golden-stick, gptq; default [compressed-tensors]"
    )
    assert told["ptq.weight_quant_dtype"] == f"{', '.join(WEIGHT_FORMATS)} or null; default int8"
    assert told["model"] == "text; required"
    section = [line for line in run("recipe", "parallel").stdout.splitlines() if not line.startswith(" ")]
    assert [line.split(":")[0] for line in section] == [f"parallel.{name}" for name in ParallelConfig.model_fields]
    one = run("recipe", "calibration.packing")
    assert one.stdout.startswith("calibration.packing: true or false; default true\n    Joins rows")
    wrong = run("recipe", "paralel")
    assert (wrong.exit_code, wrong.stderr) == (2, "gs-dist: no recipe has a key 'paralel': do you mean parallel?\n")


def _sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [f.annotation for f in model.model_fields.values() if isinstance(f.annotation, type)]
    return [model, *(s for kind in inner if issubclass(kind, BaseModel) for s in _sections(kind))]


@pytest.mark.parametrize("section", _sections(CalibrationConfig), ids=lambda section: section.__name__)
def test_every_field_of_a_recipe_has_a_description(section: type[BaseModel]) -> None:
    """A key without one could not be explained to whoever writes a recipe."""
    assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_each_format_of_a_job_is_checked(tmp_path: Path) -> None:
    """One report after another, and the exit code of the worst."""
    (tmp_path / "manifests").mkdir()
    dialects.save_model(tmp_path / "ascend", AscendCodec(), dialects.W8A8_DYNAMIC)
    dialects.save_model(tmp_path / "compressed-tensors", CompressedTensorsCodec(), dialects.W8A8_DYNAMIC)
    result = run("check", tmp_path)
    assert result.exit_code == 2
    first, second = result.stderr.split("\n\n")
    assert first.endswith("ascend checkpoint: 3 problems found")
    assert second.endswith("compressed-tensors checkpoint: 3 problems found\n")
    assert "[manifest-present]" in first


def test_the_summary_of_a_refused_job_says_that_there_is_no_model(tmp_path: Path) -> None:
    """Its figures are of use, and must not be taken for a model's; the reason is told as `check` tells it."""
    write_summary(tmp_path, a_summary())
    assert run("summary", tmp_path).stderr == ""
    note_refusal(tmp_path, (), "compressed-tensors: perplexity 56.37")
    result = run("summary", tmp_path)
    assert result.exit_code == 0
    assert "no model was published of this: the job was refused: compressed-tensors: perplexity 56.37" in result.stderr


def test_a_job_that_is_not_finished_is_no_broken_model(tmp_path: Path) -> None:
    """Check says how far it got, and how to go on."""
    fields = CalibrationConfig.model_validate({"model": "m", "output": "o", "calibration": {"data": "c"}})
    prints = Fingerprints(recipe="r", source="s", data="d")
    run_directory = RunDirectory(
        tmp_path, dialects=("ascend",), fingerprints=prints, recipe=fields.fingerprint_fields()
    )
    run_directory.prepare(30)
    (tmp_path / "manifests" / "layer-00000.json").touch()
    result = run("check", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"gs-dist: the job in {str(tmp_path)!r} is unfinished; 1 of 30 layers are published; submit the same again "
        "to go on\n"
    )
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".lock").touch()
    assert "is unfinished; 0 layers are published; submit" in run("check", tmp_path / "begun").stderr
    (tmp_path / "compressed-tensors").mkdir()
    (tmp_path / "compressed-tensors" / "config.json").touch()
    assert "published, and there is no model as ascend yet; submit" in run("check", tmp_path).stderr


def test_a_reader_that_has_enough_is_no_failure(tmp_path: Path) -> None:
    """`gs-dist summary DIR | head -1` ends with exit code 0 and without a word, tables included."""
    write_summary(tmp_path, a_summary())
    reading, writing = os.pipe()
    os.close(reading)
    program = (
        f"import sys; from gs_dist.terminal.cli import main; sys.argv = ['gs-dist', 'summary', {str(tmp_path)!r}]; "
        "main()"
    )
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_plan_looks_at_data_that_are_there(tmp_path: Path, recipe: str) -> None:
    """Data on this machine are read and counted, and refused as a job would refuse them; without them, that is told."""
    absent = run("plan", recipe)
    assert absent.exit_code == 0
    assert "there are no calibration data here at none.parquet" in absent.stdout
    data = tmp_path / "c.jsonl"
    data.write_text('{"input_ids": [1, 2, 3, 4]}\n' * 64)
    enough = run("plan", recipe, f"calibration.data={data}")
    assert enough.exit_code == 0
    assert "note: calibration.column is auto: input_ids is read (lists of integers)" in enough.stdout
    short = run("plan", recipe, f"calibration.data={data}", "calibration.num_samples=9")
    assert short.exit_code == 2
    assert "8 samples of 32 tokens in column input_ids, while calibration.num_samples asks for 9" in short.stderr
    remote = run("plan", recipe, "calibration.data=s3://bucket/c.parquet")
    assert "the calibration data are not on this machine, and were not looked at" in remote.stdout
