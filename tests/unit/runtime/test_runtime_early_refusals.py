"""What a job is refused for before it reads a sample or starts a worker, and what a solve alone needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from runs import small_recipe

from gs_dist.checkpoint.kept_statistics import StatisticsOrigin
from gs_dist.checkpoint.output_lock import locked
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import ClusterError, OutputError, PlanError, UserError
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.progress import SilentProgress
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.runtime.coordinator import quantize
from gs_dist.runtime.planned import plan_job
from gs_dist.runtime.software import Software
from gs_dist.runtime.statistics_origin import software_note

HERE = ClusterFacts(num_cpus=4, num_npus=0, memory_bytes=8 << 30)


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize("address", [None, "192.0.2.1:6379"])
def test_a_pattern_that_matches_nothing_is_refused_before_the_samples(tmp_path: Path, address: str | None) -> None:
    """Neither data nor output nor cluster is looked at; none of them exists."""
    config = small_recipe(tmp_path, num_layers=1, layer_policies={".*nope": None})
    (tmp_path / "samples.parquet").unlink()
    with pytest.raises(UserError, match=r"'\.\*nope' matches no linear"):
        quantize(config, address=address, progress=Heard())
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_here_is_refused_before_the_samples(tmp_path: Path) -> None:
    """As above."""
    config = small_recipe(tmp_path, num_layers=1, parallel={"device": "ascend"})
    (tmp_path / "samples.parquet").unlink()
    with pytest.raises(ClusterError, match="this machine has no Ascend card"):
        quantize(config, progress=Heard())


def test_an_output_in_use_is_refused_before_the_samples(tmp_path: Path) -> None:
    """A second job waits for nothing: neither for its samples nor for a cluster."""
    config = small_recipe(tmp_path, num_layers=1)
    heard = Heard()
    with locked(tmp_path / "out"), pytest.raises(OutputError, match="is in use by another job"):
        quantize(config, progress=heard)
    assert heard.messages == []


def solving(tmp_path: Path, **changes: object) -> tuple[CalibrationConfig, CheckpointReader]:
    calibration = {"data": "none", "num_samples": 512, "sequence_length": 128, "micro_batch_size": 64}
    config = CalibrationConfig.model_validate(
        {
            "model": str(tmp_path),
            "output": "o",
            "calibration": calibration,
            "ptq": {"act_quant_dtype": "int8"},
            **changes,
        }
    )
    return config, CheckpointReader(tiny_checkpoint(tmp_path / "m", num_layers=4))


def test_a_solve_is_planned_without_a_model_that_runs(tmp_path: Path) -> None:
    """No card is needed for device: ascend, and memory is that of one layer and its statistics."""
    config, reader = solving(tmp_path, parallel={"device": "ascend", "pipeline_parallel_size": 1})
    plan = plan_job(config, reader, HERE, statistics_at_hand=True).plan
    assert plan.device == "cpu"
    (stage,) = plan.stages
    layer = sum(info.nbytes for info in reader.layer_tensors(0).values())
    assert (stage.memory.items["weights"], stage.memory.items["activations"]) == (layer, 0)
    whole = plan_job(
        config.model_copy(update={"parallel": config.parallel.model_copy(update={"device": "cpu"})}),
        reader,
        HERE,
        statistics_at_hand=False,
    ).plan
    assert stage.memory.items["statistics"] < whole.stages[0].memory.items["statistics"] / 4
    assert stage.memory.peak < whole.stages[0].memory.peak
    assert plan.config == config
    assert plan.operations.forward == plan.operations.statistics == plan.states_moved == plan.statistics_moved == 0


def test_what_calibration_has_no_room_for_may_still_be_solved(tmp_path: Path) -> None:
    """Hidden states that do not fit do not exist where nothing runs; with a probe the model runs after all."""
    parallel = {"device": "cpu", "pipeline_parallel_size": 1, "data_parallel_size": 1, "memory_per_worker": "748MiB"}
    config, reader = solving(tmp_path, parallel=parallel)
    with pytest.raises(PlanError):
        plan_job(config, reader, HERE, statistics_at_hand=False)
    plan_job(config, reader, HERE, statistics_at_hand=True)
    probed = config.model_copy(update={"max_perplexity_increase": 0.5})
    with pytest.raises(PlanError):
        plan_job(probed, reader, HERE, statistics_at_hand=True)


def test_statistics_of_another_version_are_told_of() -> None:
    """They may be solved from; what differs is named, and nothing is said of those of this version."""
    here = Software.here().made_with.versions
    of = StatisticsOrigin(source="s", data="d", calibration={}, versions=here)
    assert software_note("out", of) is None
    other = dataclasses.replace(of, versions={**here, "numpy": "1.20.0"})
    note = software_note("out", other)
    assert note is not None
    assert f"kept in 'out' are of other software (numpy was 1.20.0, is {here['numpy']})" in note
