"""Whatever happens to a job's output, it ends in the right bytes or in a refusal that names what changed.

Kills at any write, damage to any file, another model, other samples, another recipe, another version, submitted again
and again, in any order. Workers live in this process and layers run in NumPy; everything around them is the real thing.
`GS_DIST_SEQUENCES` sets how many sequences `pytest -m slow` tries.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from checkpoints import tiny_checkpoint
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from numpy_network import NumpyDevice, NumpyNetwork
from runs import run_inline, save_samples, small_recipe

from gs_dist.checkpoint import writer
from gs_dist.checkpoint.check import check_all
from gs_dist.checkpoint.header import read_header
from gs_dist.checkpoint.run_directory import RunDirectory
from gs_dist.errors import UserError
from gs_dist.recipe.config import CalibrationConfig
from gs_dist.runtime import software, stage_pass, stage_worker

NUM_LAYERS = 3
W4 = {"weight_quant_dtype": "qint4x2", "weight_quant_granularity": "per_group", "group_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"ptq": {"weight_quant_dtype": "int8"}},
    "stages": {"ptq": {"weight_quant_dtype": "int8"}, "parallel": {"pipeline_parallel_size": 2, "layers_per_wave": 1}},
    "replicas": {"ptq": {"weight_quant_dtype": "int8"}, "parallel": {"data_parallel_size": 2}},
    "quantized": {"ptq": {"weight_quant_dtype": "int8"}, "propagation": "quantized"},
    "bits": {"ptq": W4, "bits": "auto", "size_budget": 0.3},
    "kept": {"ptq": {"weight_quant_dtype": "int8"}, "keep_statistics": True},
}
TENSORS = (
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{name}.weight"
        for layer in range(NUM_LAYERS)
        for name in ("mlp.up_proj", "self_attn.q_proj")
    ),
    "model.norm.weight",
)
NAMED = {
    "model": ("model", "changed since", "checkpoint"),
    "samples": ("calibration data", "samples", "statistics"),
    "recipe": ("the recipe",),
    "version": ("other software",),
}


class Killed(BaseException):
    """The process is gone; nothing is cleaned up any more."""


@dataclass
class Clock:
    """Counts what is published, and kills at a given count."""

    left: int | None = None
    dead: bool = False

    def tick(self) -> None:
        if self.left is None:
            return
        self.left -= 1
        if self.left < 0:
            self.dead = True
            raise Killed


@contextmanager
def stage(clock: Clock, version: str) -> Iterator[None]:
    """Layers run in NumPy, every publication ticks, and the software says it is of a version."""
    replace, rename, withdraw, here = os.replace, Path.rename, RunDirectory.withdraw, software.Software.here()
    of_version = dataclasses.replace(here, versions={**here.versions, "gs-dist": version})

    def replaced(*args: Any) -> None:
        clock.tick()
        replace(*args)

    def renamed(before: Path, after: Path) -> Path:
        clock.tick()
        return rename(before, after)

    def withdrawn(self: RunDirectory) -> None:
        if not clock.dead:
            withdraw(self)

    with ExitStack() as patches:
        for target, name, new in (
            (writer.os, "replace", replaced),
            (Path, "rename", renamed),
            (RunDirectory, "withdraw", withdrawn),
            (writer.os, "fsync", lambda descriptor: None),  # a kill of the process loses nothing that was written
            (stage_pass, "DecoderNetwork", NumpyNetwork),
            (stage_worker, "open_device", lambda kind, **settings: NumpyDevice()),
            (software.Software, "here", classmethod(lambda cls: of_version)),
        ):
            patches.enter_context(mock.patch.object(target, name, new))
        yield


@dataclass
class World:
    """Model, samples, recipe and version as they are now, and one output."""

    directory: Path
    kind: str
    model: dict[str, int] = field(default_factory=dict)  # tensor to how often it was changed
    samples: int = 0
    recipe: int = 0
    version: int = 0
    changed: set[str] = field(default_factory=set)  # what differed since the output was empty
    damaged: bool = False

    def config(self, output: str = "out") -> CalibrationConfig:
        few = {"num_samples": 6, "micro_batch_size": 2, "reduction_blocks": 2}
        changes: dict[str, Any] = {"calibration": few, **KINDS[self.kind]}
        if self.recipe:
            changes["max_relative_error"] = 0.5 + 0.01 * self.recipe
        return small_recipe(self.directory, output, **changes)

    def write_model(self) -> None:
        path = self.directory / "model/model.safetensors"
        shutil.copy(self.directory / "original.safetensors", path)
        for name, count in self.model.items():
            _scale(path, name, 1 + 0.25 * count)

    def write_samples(self) -> None:
        save_samples(self.directory / "samples.parquet", 128, seed=self.samples)

    @property
    def state(self) -> tuple[Any, ...]:
        return self.kind, tuple(sorted((k, v) for k, v in self.model.items() if v)), self.samples, self.recipe

    def submit(self, kill_at: int | None = None) -> str:
        """`done`, `killed`, or what was refused."""
        clock = Clock(kill_at)
        with stage(clock, f"1.{self.version}"):
            try:
                run_inline(self.config())
            except Killed:
                return "killed"
            except UserError as error:
                return str(error)
        return "done"


def _scale(path: Path, name: str, factor: float) -> None:
    info = read_header(path, path.name)[0][name]
    data = bytearray(path.read_bytes())
    values = np.frombuffer(data, np.float32, count=int(np.prod(info.shape)), offset=info.offset)
    data[info.offset : info.offset + info.nbytes] = (values * np.float32(factor)).tobytes()
    path.write_bytes(bytes(data))


def published(output: Path) -> dict[str, bytes]:
    """All that a loader reads, by relative name."""
    files = sorted(p for p in output.glob("compressed-tensors/*") if p.suffix in (".safetensors", ".json"))
    return {path.name: path.read_bytes() for path in files if path.name != "provenance.json"}


_expected: dict[tuple[Any, ...], dict[str, bytes]] = {}


def expected(world: World) -> dict[str, bytes]:
    """What an undisturbed run of the same gives."""
    if world.state not in _expected:
        with tempfile.TemporaryDirectory(dir=world.directory) as directory, stage(Clock(), "1.0"):
            config = world.config().model_copy(update={"output": str(Path(directory) / "out")})
            run_inline(config)
            _expected[world.state] = published(Path(directory) / "out")
    return _expected[world.state]


Action = tuple[str, Mapping[str, Any]]
ACTIONS: st.SearchStrategy[Action] = st.one_of(
    st.tuples(st.just("submit"), st.fixed_dictionaries({"kill_at": st.none() | st.integers(0, 40)})),
    st.tuples(
        st.just("damage"),
        st.fixed_dictionaries(
            {
                "file": st.floats(0, 1, exclude_max=True),
                "how": st.sampled_from(["flip", "flip", "cut", "empty", "delete", "exchange"]),
                "place": st.floats(0, 1, exclude_max=True),
                "bit": st.integers(0, 7),
            }
        ),
    ),
    st.tuples(
        st.just("model"), st.fixed_dictionaries({"tensor": st.sampled_from(TENSORS), "count": st.integers(0, 1)})
    ),
    st.tuples(st.just("samples"), st.fixed_dictionaries({"samples": st.integers(0, 1)})),
    st.tuples(st.just("recipe"), st.fixed_dictionaries({"recipe": st.integers(0, 1)})),
    st.tuples(st.just("version"), st.fixed_dictionaries({"version": st.integers(0, 1)})),
)


def damage(world: World, file: float, how: str, place: float, bit: int) -> None:
    """Does something to one of the output's files, if there is one."""
    output = world.directory / "out"
    files = (
        sorted(path for path in output.rglob("*") if path.is_file() and path.name != ".lock") if output.exists() else []
    )
    if not files:
        return
    world.damaged = True
    path = files[int(file * len(files))]
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "exchange":
        others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path and p.suffix == path.suffix)
        if others:
            other = others[int(place * len(others))]
            path.write_bytes(other.read_bytes())
            other.write_bytes(bytes(data))
    elif how == "cut":
        path.write_bytes(bytes(data[: int(place * len(data))]))
    elif how == "empty" or not data:
        path.write_bytes(b"")
    else:
        data[int(place * len(data))] ^= 1 << bit
        path.write_bytes(bytes(data))


def act(world: World, action: Action) -> None:
    name, arguments = action
    if name == "submit":
        look_at(world, world.submit(**arguments))
    elif name == "damage":
        damage(world, **arguments)
    elif name == "model":
        if world.model.get(arguments["tensor"], 0) != arguments["count"]:
            world.model[arguments["tensor"]] = arguments["count"]
            world.write_model()
            world.changed.add("model")
    elif getattr(world, name) != arguments[name]:
        setattr(world, name, arguments[name])
        world.changed.add(name)
        if name == "samples":
            world.write_samples()


def look_at(world: World, outcome: str) -> None:
    """The right bytes and `done`, or nothing that looks finished and a message that names what changed."""
    output = world.directory / "out"
    event(outcome if outcome in ("done", "killed") else f"refused: {' '.join(outcome.split()[-8:])}")
    if outcome == "done":
        assert (output / "done").exists()
        assert published(output) == expected(world)
        assert all(report.clean for report in check_all(output).values())
        return
    if outcome == "killed":
        if (output / "compressed-tensors" / "config.json").exists():
            assert published(output) == expected(world), "what a loader finds has been judged, `done` or not"
        return
    words = {word for what in world.changed for word in NAMED[what]}
    if world.damaged:
        words |= {"/", ".json", "damaged"}
    assert any(word in outcome for word in words), f"{outcome!r} after {world.changed or 'nothing'} changed"


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    """In memory where there is such a place: a sequence writes some hundred files."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="gs-dist-test-") as directory:
        path = Path(directory)
        tiny_checkpoint(path / "model", num_layers=NUM_LAYERS)
        shutil.copy(path / "model/model.safetensors", path / "original.safetensors")
        yield path


def run_sequence(ground: Path, kind: str, actions: list[Action]) -> None:
    shutil.rmtree(ground / "out", ignore_errors=True)
    world = World(ground, kind)
    world.write_model()
    world.write_samples()
    for action in actions:
        act(world, action)
    for _ in range(2):
        outcome = world.submit()
        look_at(world, outcome)
    if not world.changed and not world.damaged:
        assert outcome == "done"


SEQUENCES = st.tuples(st.sampled_from(sorted(KINDS)), st.lists(ACTIONS, min_size=1, max_size=8))
COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@settings(max_examples=100, derandomize=True, phases=[Phase.generate], **COMMON)
@given(SEQUENCES)
def test_any_sequence_ends_in_the_right_bytes_or_in_a_refusal_that_names_what_changed(
    ground: Path, sequence: tuple[str, list[Action]]
) -> None:
    """A hundred sequences, the same ones every time."""
    run_sequence(ground, *sequence)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("GS_DIST_SEQUENCES", "2000")), **COMMON)
@given(SEQUENCES)
def test_many_sequences_end_so(ground: Path, sequence: tuple[str, list[Action]]) -> None:
    """Two thousand and more, other ones every time; what fails is made as short as it can be."""
    run_sequence(ground, *sequence)
