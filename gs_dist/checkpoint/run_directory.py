"""The output directory of a job: who may write to it, what is finished in it, and when it is done.

A dead job leaves finished layers and no lock; `done` is written last, when everything else was checked.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gs_dist.checkpoint.array_file import read_arrays
from gs_dist.checkpoint.formats import FORMATS
from gs_dist.checkpoint.header import read_json
from gs_dist.checkpoint.layer_costs import SENSITIVITY
from gs_dist.checkpoint.manifest import (
    MANIFESTS,
    Fingerprints,
    LayerManifest,
    check_fingerprints,
    part_stem,
    publish_outer,
    read_manifest,
    shard_faults,
)
from gs_dist.checkpoint.merge import merge_checkpoint
from gs_dist.checkpoint.provenance import write_provenance
from gs_dist.checkpoint.reader import INDEX_FILE, CheckpointReader
from gs_dist.checkpoint.solved_layer import SOLVED, remove_solved
from gs_dist.checkpoint.writer import make_directory, remove_leftovers, write_json, write_safetensors
from gs_dist.errors import CheckpointError, OutputError
from gs_dist.policy import QuantPolicy
from gs_dist.statistics import HISTOGRAM_BINS, InputStatistics, LayerStatistics

__all__ = [
    "LAYER_POLICIES",
    "RunDirectory",
    "StatisticsOrigin",
    "find_models",
    "holds_statistics",
    "published_format",
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
# Files by which a model directory of a format is known.
_MARKERS = {"ascend": "quant_model_description.json", "golden-stick": "quantization_description.json"}


class RunDirectory:
    """The output of one job.

    Args:
        path: the directory; made where it does not exist.
        formats: the dialects the job writes.
        fingerprints: what the job works on; layers finished from something else are refused.
    """

    def __init__(self, path: Path, *, formats: tuple[str, ...], fingerprints: Fingerprints) -> None:
        self.path = path
        self._formats = formats
        self._fingerprints = fingerprints

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other jobs out while the block runs; the lock goes with the process that holds it.

        Raises:
            OutputError: another job is at work here, something else lies here, or the directory cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            make_directory(self.path)
            self._refuse_foreign()  # before anything is written here
            descriptor = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(
                f"output {str(self.path)!r} cannot be written ({error.strerror}); set output to a directory "
                "that can be made and written"
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"output {str(self.path)!r} is in use by another job: wait for it, or set output to "
                    "another directory"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def refuse_unusable(self) -> None:
        """Refuses at once what `prepare` would refuse later; reads manifests and no shard.

        Raises:
            OutputError: the directory is in use, cannot be written, or holds another run or something else.
        """
        with self.locked():
            for path in sorted((self.path / MANIFESTS).glob("layer-*.json")):
                number = path.stem.removeprefix("layer-")
                manifest = read_manifest(self.path, int(number)) if number.isdecimal() else None
                if manifest is not None:
                    check_fingerprints(manifest, self._fingerprints)

    def prepare(self, num_layers: int) -> dict[int, LayerManifest]:
        """Clears what dead writers left, and returns the finished layers, their shards verified by hash.

        A layer whose shard is missing or changed counts as unfinished and is done again.

        Raises:
            OutputError: the directory holds a run of another recipe, model or data, or something else.
        """
        self._refuse_foreign()
        (self.path / DONE).unlink(missing_ok=True)
        for directory in (
            self.path,
            *(self.path / name for name in (*self._formats, MANIFESTS, STATISTICS, SENSITIVITY, SOLVED)),
        ):
            if directory.is_dir():
                remove_leftovers(directory)
        finished = {}
        for layer in range(num_layers):
            manifest = read_manifest(self.path, layer)
            if manifest is None:
                continue
            check_fingerprints(manifest, self._fingerprints)
            if set(manifest.shards) >= set(self._formats) and not shard_faults(self.path, manifest):
                finished[layer] = manifest
        return finished

    def _refuse_foreign(self) -> None:
        ours = {*FORMATS, MANIFESTS, STATISTICS, SENSITIVITY, SOLVED, DONE, LOCK, *_FILES}
        names = sorted(path.name for path in self.path.iterdir())
        foreign = [name for name in names if name not in ours and not name.startswith(".gs-dist-")]
        if foreign:
            raise OutputError(
                f"output {str(self.path)!r} holds {foreign[0]!r}, which is not of a job: set output to an "
                "empty directory"
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
        """Makes each format's directory a model: carries the outer tensors over, writes config, index and provenance.

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
            outer = publish_outer(self.path, reader, self._formats, self._fingerprints)
        for name in self._formats:
            merge_checkpoint(self.path, name, reader, finished.values(), outer, policies)
            write_provenance(self.path / name, (*finished.values(), outer), recipe=recipe, versions=versions)

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
    """What kept statistics are of: fingerprints of checkpoint and samples, and the calibration settings."""

    source: str
    data: str
    calibration: Mapping[str, Any]

    @classmethod
    def of(cls, fingerprints: Fingerprints, calibration: Mapping[str, Any]) -> StatisticsOrigin:
        """Of a job with these fingerprints and `CalibrationConfig.fingerprint_fields()["calibration"]`."""
        return cls(source=fingerprints.source, data=fingerprints.data, calibration=calibration)


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


def published_format(directory: Path) -> str | None:
    """The format that a job published a model directory in; None for one of floats.

    Raises:
        CheckpointError: config.json is damaged.
    """
    for name, marker in _MARKERS.items():
        if (directory / marker).is_file():
            return name
    if not (directory / "config.json").is_file():
        return None
    config = read_json(directory / "config.json", "config.json")
    return "compressed-tensors" if config.get("quantization_config") is not None else None


def find_models(directory: Path, formats: Sequence[str] = ()) -> dict[str, Path]:
    """Format to model directory, given a job's output or a model directory itself.

    Args:
        directory: where to look.
        formats: those that are wanted; all that are there where none is named.

    Raises:
        CheckpointError: there is no finished model, or none in a format that is wanted.
    """
    found = {name: directory / name for name in FORMATS if (directory / name / INDEX_FILE).is_file()}
    itself = published_format(directory) if not found and (directory / INDEX_FILE).is_file() else None
    if itself is not None:
        found = {itself: directory}
    missing = [name for name in formats if name not in found]
    if found and missing:
        raise CheckpointError(
            f"{str(directory)!r} holds no finished model as {' or '.join(missing)}: choose from {', '.join(found)}"
        )
    if found:
        return {name: path for name, path in found.items() if not formats or name in formats}
    raise CheckpointError(
        f"{str(directory)!r} holds no finished model: give the output of a job that is done, or a model directory in it"
    )
