"""A node of a real cluster on other versions than the coordinator: told before anything is run."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from faults import LIMIT, Submission, fault_cluster, save_recipe, wait_until
from runs import small_recipe

import gs_dist

pytestmark = pytest.mark.ray


def other_gs_dist(directory: Path) -> None:
    """A whole copy of the package, of another version."""
    copy = directory / "gs_dist"
    shutil.copytree(Path(gs_dist.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    init = copy / "__init__.py"
    init.write_text(re.sub(r'^__version__ = ".*"$', '__version__ = "0.0.9"', init.read_text(), flags=re.MULTILINE))


def other_numpy(directory: Path) -> None:
    """What an installer leaves of a version."""
    left = directory / "numpy-1.20.0.dist-info"
    left.mkdir()
    (left / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.20.0\n")


def no_runtime(directory: Path) -> None:
    """A package so old that it has none of the modules that a worker is made of."""
    (directory / "gs_dist").mkdir()
    (directory / "gs_dist" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    # Where the tests run on an editable installation, that would supply the modules all the same.
    others = "[f for f in sys.meta_path if not getattr(f, '__name__', '').startswith('_Editable')]"
    (directory / "sitecustomize.py").write_text(f"import sys\n\nsys.meta_path[:] = {others}\n")


@pytest.mark.parametrize(
    ("install", "told"),
    [
        (other_gs_dist, f"gs-dist 0.0.9, and the coordinator gs-dist {gs_dist.__version__}"),
        pytest.param(
            other_numpy, f"numpy 1.20.0, and the coordinator numpy {numpy.__version__}", marks=pytest.mark.slow
        ),
        pytest.param(no_runtime, "No module named 'gs_dist.runtime'): install gs-dist ", marks=pytest.mark.slow),
    ],
    ids=["gs-dist", "numpy", "no runtime"],
)
def test_a_node_with_another_version_is_refused_before_anything_runs(
    tmp_path: Path, install: Callable[[Path], None], told: str
) -> None:
    """Exit code 2, both versions in one message, and nothing that looks like a result."""
    site = tmp_path / "site"
    site.mkdir()
    install(site)
    config = small_recipe(tmp_path, num_layers=2, parallel={"data_parallel_size": 2, "timeout": 120.0})
    with fault_cluster(secrets.token_hex(8), num_nodes=1) as cluster:
        cluster.add_node({"PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])})
        recipe = save_recipe(config, tmp_path / "recipe.yaml")
        job = Submission.start(recipe, tmp_path / "log", cluster.mark, cluster.address)
        try:
            wait_until("the job goes on", lambda: job.ended, LIMIT)
        finally:
            job.kill_group()
    assert job.process.returncode == 2, job.said()
    assert told in job.said().splitlines()[-1]
    assert not list(Path(config.output).glob("manifests/layer-*"))
    assert not (Path(config.output) / "done").exists()
