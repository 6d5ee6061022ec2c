"""How fast a job calibrates and solves, as a ratio to this machine's own matrix products.

    python jobs/benchmark.py RECIPE [key.path=value ...] [--repeat 3] [--peer PYTHON]

Runs the recipe (output in a temporary directory) and, before and after it, float32 matrix products of the
sizes of the model on as many processes and threads as the job has workers. Prints the floating-point
operations that the job needs over its wall time from workers up to last layer solved, as a share of the
products' rate; and each worker's peak memory against the plan. With --peer, an interpreter that has llm-compressor
quantises the same model on the same tokens in turn, and wall, CPU and memory of both are told; a recipe with
`mode: convert` runs beside its `model_free_ptq`, and beside `cp` of the same files. Only ratios within one run mean
anything.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conversion_peer import compare_conversion
from peer import compare

from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import UserError
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import CalibrationPlan, make_plan
from gs_dist.progress import SilentProgress
from gs_dist.recipe.config import CalibrationConfig, load_recipe
from gs_dist.terminal.conversion import asks_for_conversion, read_conversion

PRODUCT_ROWS = 2048  # tokens of a micro-batch, where the recipe leaves them open
PRODUCT_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run: seconds from workers up to the last layer solved, and the matrix-product rate around it, per second."""

    seconds: float
    operations: int
    product_rate: float
    busy_seconds: float
    memory: tuple[tuple[str, int, int], ...]  # worker, planned, measured

    @property
    def share(self) -> float:
        """Operations per second over the rate of plain matrix products."""
        return self.operations / self.seconds / self.product_rate


def _product_rate(kind: str, columns: int, rows: int, threads: int, results: multiprocessing.Queue[float]) -> None:
    import numpy as np

    values = np.random.default_rng(0).standard_normal
    left = values((PRODUCT_ROWS, columns)).astype(np.float32)
    right = values((columns, rows)).astype(np.float32)
    if kind == "mindspore":
        import mindspore as ms

        from gs_dist.calibration.device import open_device

        open_device("cpu", threads=threads)
        a, b = ms.Tensor(left), ms.Tensor(right)

        def product() -> object:
            return ms.ops.matmul(a, b).asnumpy()
    else:

        def product() -> object:
            return left @ right

    product()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < PRODUCT_SECONDS:
        product()
        count += 1
    results.put(2.0 * PRODUCT_ROWS * columns * rows * count / (time.perf_counter() - began))


def product_rate(plan: CalibrationPlan) -> float:
    """Floating-point operations per second of float32 products on all workers' processes at once.

    The better of NumPy's BLAS and MindSpore's product, so that the ratio flatters neither.
    """
    import os

    sizes = (plan.architecture.hidden_size, plan.architecture.layers[0].mlp.widest)
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(plan.threads_per_worker)
    spawn = multiprocessing.get_context("spawn")
    rates = []
    for kind in ("numpy", "mindspore"):
        results: multiprocessing.Queue[float] = spawn.Queue()
        arguments = (kind, *sizes, plan.threads_per_worker, results)
        workers = [spawn.Process(target=_product_rate, args=arguments) for _ in range(plan.num_workers)]
        for worker in workers:
            worker.start()
        rates.append(sum(results.get() for _ in workers))
        for worker in workers:
            worker.join()
    return max(rates)


def measure(config: CalibrationConfig) -> Measurement:
    """Runs the recipe once, into a temporary directory."""
    from gs_dist.runtime import coordinator

    reader = CheckpointReader(Path(config.model))
    plan = make_plan(config, reader.architecture, reader.tensors, ClusterFacts.of_this_machine())
    before = product_rate(plan)
    with tempfile.TemporaryDirectory() as directory:
        placed = config.model_copy(update={"output": str(Path(directory) / "run")})
        summary = coordinator.quantize(placed, progress=SilentProgress())
    after = product_rate(plan)
    walls = [stage.seconds / max(1e-9, 1.0 - stage.idle_share) for stage in summary.stages]
    return Measurement(
        seconds=max(walls),
        operations=plan.operations.total,
        product_rate=(before + after) / 2,
        busy_seconds=sum(stage.seconds for stage in summary.stages),
        memory=tuple(
            (f"stage {s.stage} replica {s.replica}", s.peak_memory_planned, s.peak_memory_measured or 0)
            for s in summary.stages
        ),
    )


def _conversion(arguments: argparse.Namespace) -> list[str]:
    if arguments.peer is None:
        raise UserError("a conversion is measured beside a peer: give --peer PYTHON, one that has llm-compressor")
    recipe = Path(arguments.recipe)
    config = read_conversion(recipe, [*arguments.overrides, "output=out"], {})
    return compare_conversion(recipe, arguments.overrides, config, arguments.peer, arguments.repeat)


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of a job as a ratio to this machine's matrix products.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--repeat", type=int, default=3, help="runs; the median is reported")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with llm-compressor: compare whole processes")
    arguments = parser.parse_args()
    try:
        if asks_for_conversion(Path(arguments.recipe), arguments.overrides):
            print("\n".join(_conversion(arguments)))
            return 0
        config = load_recipe(Path(arguments.recipe), arguments.overrides)
        if arguments.peer is not None:
            print("\n".join(compare(arguments.recipe, arguments.overrides, config, arguments.peer, arguments.repeat)))
            return 0
        runs = [measure(config) for _ in range(arguments.repeat)]
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    for number, run in enumerate(runs, start=1):
        print(
            f"run {number}: {run.operations / 1e12:.2f} Tflop needed in {run.seconds:.1f} s; plain products "
            f"{run.product_rate / 1e9:.0f} Gflop/s; ratio {run.share:.2f}"
        )
    print(f"median ratio to this machine's matrix products: {statistics.median(run.share for run in runs):.2f}")
    for worker, planned, measured in runs[-1].memory:
        mib = 1 << 20
        print(
            f"{worker}: peak memory planned {planned / mib:.0f} MiB, measured {measured / mib:.0f} MiB "
            f"({measured / planned - 1:+.1%})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
