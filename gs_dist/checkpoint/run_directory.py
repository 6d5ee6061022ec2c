"""The output directory of a job: who may write to it, what is finished in it, and when it is done.

A dead job leaves finished layers and no lock; `done` is written last, when everything else was checked.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gs_dist.checkpoint.array_file import read_arrays
from gs_dist.checkpoint.dialects import published_dialect
from gs_dist.checkpoint.header import read_json
from gs_dist.checkpoint.layer_costs import SENSITIVITY
from gs_dist.checkpoint.manifest import (
    MANIFESTS,
    Fingerprints,
    LayerManifest,
    MadeWith,
    part_stem,
    publish_outer,
    read_manifest,
    shard_faults,
)
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.provenance import write_provenance
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.run_record import (
    RunRecord,
    read_record,
    recipe_differences,
    version_differences,
    write_record,
)
from gs_dist.checkpoint.solved_layer import SOLVED, remove_solved
from gs_dist.checkpoint.weight_files import INDEX_FILE
from gs_dist.checkpoint.writer import make_directory, remove_leftovers, write_json, write_safetensors
from gs_dist.errors import CheckpointError, OutputError
from gs_dist.model.statistics import HISTOGRAM_BINS, InputStatistics, LayerStatistics
from gs_dist.recipe.dialects import DIALECTS
from gs_dist.recipe.policy import QuantPolicy

__all__ = [
    "LAYER_POLICIES",
    "LOCK",
    "RunDirectory",
    "StatisticsOrigin",
    "find_models",
    "holds_statistics",
    "locked",
    "read_origin",
    "read_statistics",
    "remove_statistics",
    "write_origin",
    "write_statistics",
]

DONE = "done"
LOCK = ".lock"
STATISTICS = "statistics"
LAYER_POLICIES = "layer_policies.yaml"
_FILES = ("recipe.yaml", LAYER_POLICIES, "summary.json", "summary.parquet")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other jobs out of an output while the block runs; the lock goes with the process that holds it.

    An output that is still empty at the end is removed again.

    Raises:
        OutputError: another job is at work here, something else lies here, or the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make_directory(path)
        _refuse_foreign(path)  # before anything is written here
        descriptor = _take_lock(path)
    except OSError as error:
        raise OutputError(
            f"output {str(path)!r} cannot be written ({error.strerror}); set output to a directory that can be made "
            "and written"
        ) from error
    try:
        yield
    finally:
        _remove_empty(path)
        os.close(descriptor)


def _take_lock(path: Path) -> int:
    """Descriptor of the lock that is held."""
    while True:
        descriptor = os.open(path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError(
                f"output {str(path)!r} is in use by another job: wait for it, or set output to another directory"
            ) from error
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a lock that its holder removed meanwhile


def _remove_empty(path: Path) -> None:
    with suppress(OSError):
        if [entry.name for entry in path.iterdir()] == [LOCK]:
            (path / LOCK).unlink()
            path.rmdir()


def _refuse_foreign(path: Path) -> None:
    ours = {*DIALECTS, MANIFESTS, STATISTICS, SENSITIVITY, SOLVED, DONE, LOCK, *_FILES}
    names = sorted(entry.name for entry in path.iterdir())
    foreign = [name for name in names if name not in ours and not name.startswith(".gs-dist-")]
    if foreign:
        raise OutputError(
            f"output {str(path)!r} holds {foreign[0]!r}, which is not of a job: set output to an empty directory"
        )


class RunDirectory:
    """The output of one job.

    Args:
        path: the directory; made where it does not exist.
        dialects: the dialects the job writes.
        fingerprints: what the job works on; layers finished from something else are refused.
        recipe: what of the recipe decides the bytes; None where it is not known.
        made_with: the software of the job, whose layers are not mixed with another's; None where it is not known.
    """

    def __init__(
        self,
        path: Path,
        *,
        dialects: tuple[str, ...],
        fingerprints: Fingerprints,
        recipe: Mapping[str, Any] | None = None,
        made_with: MadeWith | None = None,
    ) -> None:
        self.path = path
        self._dialects = dialects
        self._fingerprints = fingerprints
        self._recipe = recipe
        self._made_with = made_with

    def refuse_other_run(self) -> None:
        """Refuses at once what `prepare` would refuse later; reads manifests and no shard.

        Raises:
            OutputError: the directory holds another run, one of other software, or something else.
        """
        if not self.path.is_dir():
            return
        _refuse_foreign(self.path)
        for path in sorted((self.path / MANIFESTS).glob("layer-*.json")):
            number = path.stem.removeprefix("layer-")
            manifest = read_manifest(self.path, int(number)) if number.isdecimal() else None
            if manifest is not None:
                self._refuse_other(manifest)
        self._refuse_other_statistics()

    def prepare(self, num_layers: int) -> dict[int, LayerManifest]:
        """Clears what dead writers left, and returns the finished layers, their shards verified by hash.

        A layer whose shard is missing or changed counts as unfinished and is done again.

        Raises:
            OutputError: the directory holds a run of another recipe, model, data or software, or something else.
        """
        self.refuse_other_run()
        (self.path / DONE).unlink(missing_ok=True)
        for directory in (
            self.path,
            *(self.path / name for name in (*self._dialects, MANIFESTS, STATISTICS, SENSITIVITY, SOLVED)),
        ):
            if directory.is_dir():
                remove_leftovers(directory)
        if self._recipe is not None:
            record = RunRecord(
                num_layers=num_layers,
                dialects=self._dialects,
                recipe=self._recipe,
                fingerprints=self._fingerprints,
                made_with=self._made_with,
            )
            write_record(self.path, record)
        finished = {}
        for layer in range(num_layers):
            manifest = read_manifest(self.path, layer)
            if manifest is None:
                continue
            self._refuse_other(manifest)
            if set(manifest.shards) >= set(self._dialects) and not shard_faults(self.path, manifest):
                finished[layer] = manifest
        return finished

    def _refuse_other(self, manifest: LayerManifest) -> None:
        """Refuses to add to a layer that was made from something else, or with other versions."""
        names = {"recipe": "the recipe", "source": "the model", "data": "the calibration data"}
        theirs, ours = manifest.fingerprints, self._fingerprints
        different = [label for key, label in names.items() if getattr(theirs, key) != getattr(ours, key)]
        if different:
            record, told = read_record(self.path), ""
            if self._recipe is not None and record is not None and record.fingerprints.recipe == theirs.recipe:
                told = "; ".join(recipe_differences(record.recipe, self._recipe))
            raise OutputError(
                f"output {str(self.path)!r} holds a run in which {' and '.join(different)} differed"
                f"{f' ({told})' if told else ''}: restore what it was, or set output to another directory"
            )
        if self._made_with is not None:
            self._refuse_versions(manifest.made_with, f"layer {manifest.layer}")

    def _refuse_other_statistics(self) -> None:
        """What was judged before any layer was published is of the software of the run's start."""
        record = read_record(self.path)
        if self._made_with is None or record is None or record.made_with is None:
            return
        if record.fingerprints == self._fingerprints and any((self.path / SENSITIVITY).glob("layer-*.json")):
            self._refuse_versions(record.made_with, "what layers were judged on")

    def _refuse_versions(self, theirs: MadeWith, what: str) -> None:
        assert self._made_with is not None
        differing = version_differences(theirs, self._made_with)
        if differing:
            raise OutputError(
                f"output {str(self.path)!r} holds {what} made with other software ({'; '.join(differing)}), and one "
                "model of two versions would be of neither: install what it was made with to go on, or set output to "
                "another directory"
            )

    def merge(
        self,
        reader: CheckpointReader,
        finished: Mapping[int, LayerManifest],
        policies: Mapping[str, QuantPolicy | None],
        *,
        recipe: Mapping[str, Any],
        versions: Mapping[str, str],
    ) -> None:
        """Makes each dialect's directory a model: carries the outer tensors over, writes config, index and provenance.

        Args:
            reader: the source checkpoint.
            finished: manifests of all layers.
            policies: what the recipe asked for, by full name of linear.
            recipe: what of it decides the bytes, for `provenance.json`.
            versions: package to version, for the same.

        Raises:
            JobFailure: a tensor of the source is unaccounted for.
        """
        outer = read_manifest(self.path, None)
        if outer is None or outer.fingerprints != self._fingerprints or shard_faults(self.path, outer):
            made_with = self._made_with or MadeWith()
            outer = publish_outer(self.path, reader, self._dialects, self._fingerprints, made_with)
        for name in self._dialects:
            merged = merge_checkpoint(self.path, name, reader, finished.values(), outer, policies)
            parts = (*finished.values(), outer)
            write_provenance(self.path / name, parts, recipe=recipe, versions=versions, files=merged.files)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Writes `done`: the job is complete and what it published was checked."""
        remove_solved(self.path)
        write_json(self.path / DONE, facts)


def write_statistics(output: Path, layer: int, statistics: LayerStatistics) -> None:
    """Keeps a layer's merged statistics, `statistics/layer-00017.safetensors`, for another recipe to be solved from."""
    arrays = {f"{name}/{key}": array for name, seen in statistics.items() for key, array in seen.to_arrays().items()}
    write_safetensors(make_directory(output / STATISTICS) / f"{part_stem(layer)}.safetensors", arrays)


def holds_statistics(output: Path, layer: int) -> bool:
    """Whether a layer's statistics are on disk."""
    return (output / STATISTICS / f"{part_stem(layer)}.safetensors").is_file()


def remove_statistics(output: Path) -> None:
    """Deletes statistics that were kept for the job itself; those that `write_origin` declared stay."""
    if not (output / STATISTICS / "origin.json").is_file():
        shutil.rmtree(output / STATISTICS, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class StatisticsOrigin:
    """What kept statistics are of: fingerprints of checkpoint and samples, calibration settings, and versions."""

    source: str
    data: str
    calibration: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, fingerprints: Fingerprints, calibration: Mapping[str, Any], versions: Mapping[str, str]
    ) -> StatisticsOrigin:
        """Of a job with these fingerprints and `CalibrationConfig.fingerprint_fields()["calibration"]`."""
        return cls(source=fingerprints.source, data=fingerprints.data, calibration=calibration, versions=versions)


def write_origin(output: Path, origin: StatisticsOrigin) -> None:
    """Writes `statistics/origin.json`, once all layers' statistics are there."""
    write_json(make_directory(output / STATISTICS) / "origin.json", dataclasses.asdict(origin))


def read_origin(output: Path) -> StatisticsOrigin:
    """What `write_origin` wrote.

    Raises:
        OutputError: the job kept no statistics, or is not done.
    """
    path = output / STATISTICS / "origin.json"
    if not path.is_file():
        raise OutputError(
            f"{str(output)!r} holds no kept statistics: run `gs-dist quantize --keep-statistics` to the end first"
        )
    content = read_json(path, f"{STATISTICS}/origin.json")
    try:
        return StatisticsOrigin(**content)
    except TypeError as error:
        raise OutputError(f"{STATISTICS}/origin.json is damaged ({error}): run the job again") from error


def read_statistics(output: Path, layer: int) -> LayerStatistics:
    """What `write_statistics` kept.

    Raises:
        OutputError: the job kept no statistics of the layer, or another version did.
    """
    path = output / STATISTICS / f"{part_stem(layer)}.safetensors"
    arrays, _ = read_arrays(path, "run the job with --keep-statistics first")
    fields: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for full_name, array in arrays.items():
        name, key = full_name.split("/")
        fields.setdefault(name, {})[key] = array
        if key == "histogram" and array.shape[1:] != (2, HISTOGRAM_BINS):
            raise OutputError(
                f"{STATISTICS}/{path.name}: the histogram of {name} has {array.shape[-1]} bins, and this version of "
                f"gs_dist takes {HISTOGRAM_BINS}: run the job anew with --keep-statistics, into another output"
            )
    return {name: InputStatistics.from_arrays(arrays) for name, arrays in fields.items()}


def find_models(directory: Path, dialects: Sequence[str] = ()) -> dict[str, Path]:
    """Dialect to model directory, given a job's output or a model directory itself.

    Args:
        directory: where to look.
        dialects: those that are wanted; all that are there where none is named.

    Raises:
        CheckpointError: there is no finished model, or none in a dialect that is wanted.
    """
    found = {name: directory / name for name in DIALECTS if (directory / name / INDEX_FILE).is_file()}
    itself = published_dialect(directory) if not found and (directory / INDEX_FILE).is_file() else None
    if itself is not None:
        found = {itself: directory}
    missing = [name for name in dialects if name not in found]
    if found and missing:
        raise CheckpointError(
            f"{str(directory)!r} holds no finished model as {' or '.join(missing)}: choose from {', '.join(found)}"
        )
    if found:
        return {name: path for name, path in found.items() if not dialects or name in dialects}
    raise CheckpointError(
        f"{str(directory)!r} holds no finished model: give the output of a job that is done, or a model directory in it"
    )
