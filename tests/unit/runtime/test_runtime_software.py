"""Workers on other software or another CPU than the coordinator's are told of."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from runs import fingerprints_of, plan_of, published_hashes, run_inline, small_recipe
from workers import InlineWorkerGroup

from gs_dist import __version__
from gs_dist.errors import CheckpointError, ClusterError
from gs_dist.progress import SilentProgress
from gs_dist.runtime.attempt import run_attempt
from gs_dist.runtime.replanning import FixedPlan
from gs_dist.runtime.software import Software, check_versions, kernel_note
from gs_dist.runtime.stage_times import StageTimes
from gs_dist.runtime.stage_worker import Job, StageWorker
from gs_dist.runtime.tasks import SOLVE
from gs_dist.runtime.workers import WorkerKey

FIRST, SECOND = WorkerKey(0, 0), WorkerKey(1, 0)


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


class _OldNumpy(StageWorker):
    def software(self) -> Software:
        mine = super().software()
        return replace(mine, versions={**mine.versions, "numpy": "1.20.0"}, node="node-b")


class _OtherKernel(StageWorker):
    def software(self) -> Software:
        return replace(super().software(), kernel="x86_64 Zen")


def test_this_process_tells_what_it_runs_on() -> None:
    """The versions are those of the imported libraries, the kernel begins with the machine's architecture."""
    here = Software.here()
    assert set(here.versions) == {"gs-dist", "python", "mindspore", "numpy", "scipy"}
    assert here.versions["numpy"] == numpy.__version__
    assert here.versions["gs-dist"] == __version__
    assert platform.python_version().startswith(here.versions["python"] + ".")
    assert here.kernel.startswith(platform.machine())


def test_equal_software_is_nothing_to_tell() -> None:
    """The machine's name may differ."""
    here = Software.here()
    check_versions(here, {FIRST: here, SECOND: replace(here, node="elsewhere")})
    assert kernel_note({FIRST: here, SECOND: here}) is None


def test_every_differing_version_is_named_a_missing_library_too() -> None:
    """One message holds all of a worker's differences, and what to do."""
    here = Software.here()
    versions = {name: version for name, version in here.versions.items() if name != "scipy"} | {"python": "3.9"}
    with pytest.raises(ClusterError, match=r"stage 1 of replica 0 .*python 3\.9, .*scipy \(none\).* install the same"):
        check_versions(here, {FIRST: here, SECOND: replace(here, versions=versions)})


def test_a_worker_of_another_version_ends_a_job_before_anything_runs(tmp_path: Path) -> None:
    """Worker, node and both versions are named, and no micro-batch was run."""
    config = small_recipe(tmp_path, num_layers=2, parallel={"data_parallel_size": 2})
    groups: list[InlineWorkerGroup] = []

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        def make(stage: int, replica: int) -> StageWorker:
            return (_OldNumpy if replica else StageWorker)(job, stage, replica)

        groups.append(InlineWorkerGroup(make, num_stages=1, num_replicas=2))
        return groups[-1]

    says = rf"stage 0 of replica 1 \(node node-b\) has numpy 1\.20\.0, and the coordinator numpy {numpy.__version__}: "
    with pytest.raises(ClusterError, match=says + "install .*runtime_env"):
        run_inline(config, make_group)
    assert len(groups) == 1, "it is no loss that starting again would mend"
    assert {method for _, method in groups[0].calls} == {"software"}


class _OtherModel(StageWorker):
    def source(self) -> str:
        return "0123456789abcdef"


def test_a_worker_that_reads_another_checkpoint_ends_a_job_before_anything_runs(tmp_path: Path) -> None:
    """Files of the same shapes under the same path on one node would be published as a part of the model."""
    config = small_recipe(tmp_path, num_layers=2, parallel={"pipeline_parallel_size": 2})
    groups: list[InlineWorkerGroup] = []

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        def make(stage: int, replica: int) -> StageWorker:
            return (_OtherModel if stage else StageWorker)(job, stage, replica)

        groups.append(InlineWorkerGroup(make, num_stages=2, num_replicas=1))
        return groups[-1]

    with pytest.raises(
        CheckpointError, match=r"stage 1 of replica 0 \(node .*\) reads another.*0123456789ab, and .*`model`"
    ):
        run_inline(config, make_group)
    assert {method for _, method in groups[0].calls} == {"software", "source"}


def test_another_cpu_kernel_is_a_note_and_the_job_goes_on(tmp_path: Path) -> None:
    """What the promise of equal bytes does not cover is said once an attempt."""
    config = small_recipe(tmp_path, num_layers=1, parallel={"data_parallel_size": 2})
    prints = fingerprints_of(config)

    def make_group(job: Job, min_replicas: int) -> InlineWorkerGroup:
        def make(stage: int, replica: int) -> StageWorker:
            return (_OtherKernel if replica else StageWorker)(job, stage, replica)

        return InlineWorkerGroup(make, num_stages=1, num_replicas=2)

    progress = Heard()
    Path(config.output).mkdir()
    job = Job(config=config, plan=plan_of(config), fingerprints=prints)
    run_attempt(job, SOLVE, {}, make_group, FixedPlan(), progress, StageTimes(), lambda layer: None)
    notes = [message for message in progress.messages if "published bytes may depend" in message]
    assert len(notes) == 1
    assert "stage 0 of replica 1 has x86_64 Zen" in notes[0]
    assert len(published_hashes(config)) == 1
