"""Statistics that a job keeps in its output, layer by layer, so that another recipe can be solved from them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gs_dist.checkpoint.array_file import read_arrays, read_texts, write_arrays
from gs_dist.checkpoint.lineage import Lineage
from gs_dist.checkpoint.manifest import (
    Fingerprints,
    part_stem,
)
from gs_dist.checkpoint.sealed_json import read_sealed_json, write_sealed_json
from gs_dist.checkpoint.writer import make_directory
from gs_dist.errors import DamagedError, OutputError
from gs_dist.model.statistics import HISTOGRAM_BINS, InputStatistics, LayerStatistics

__all__ = [
    "STATISTICS",
    "StatisticsOrigin",
    "StatisticsRecord",
    "forget_statistics",
    "holds_statistics",
    "read_origin",
    "read_statistics",
    "read_statistics_record",
    "remove_statistics",
    "write_origin",
    "write_statistics",
]

STATISTICS = "statistics"
_KEEP = "run the job with --keep-statistics first"


@dataclass(frozen=True, kw_only=True)
class StatisticsRecord:
    """What a layer's kept statistics are of: which layer, the fingerprint of the samples, the source tensors."""

    layer: int
    data: str
    lineage: Lineage


def write_statistics(output: Path, statistics: LayerStatistics, of: StatisticsRecord) -> None:
    """Keeps a layer's merged statistics, `statistics/layer-00017.safetensors`, for another recipe to be solved from."""
    arrays = {f"{name}/{key}": array for name, seen in statistics.items() for key, array in seen.to_arrays().items()}
    make_directory(output / STATISTICS)
    write_arrays(_statistics_path(output, of.layer), arrays, {"of": json.dumps(dataclasses.asdict(of))})


def _statistics_path(output: Path, layer: int) -> Path:
    return output / STATISTICS / f"{part_stem(layer)}.safetensors"


def holds_statistics(output: Path, layer: int) -> bool:
    """Whether a layer's statistics are on disk."""
    return _statistics_path(output, layer).is_file()


def forget_statistics(output: Path, layer: int) -> None:
    """Deletes those of one layer."""
    _statistics_path(output, layer).unlink(missing_ok=True)


def read_statistics_record(output: Path, layer: int) -> StatisticsRecord:
    """What kept statistics are of.

    Raises:
        OutputError: the job kept none of the layer.
        DamagedError: they do not say so.
    """
    texts = read_texts(_statistics_path(output, layer), _KEEP)
    try:
        content = json.loads(texts["of"])
        return StatisticsRecord(**{**content, "lineage": Lineage(**content["lineage"])})
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(
            f"{STATISTICS}/{part_stem(layer)}.safetensors: does not tell what it is of; {_KEEP}"
        ) from error


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
    write_sealed_json(make_directory(output / STATISTICS) / "origin.json", dataclasses.asdict(origin))


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
    try:
        return StatisticsOrigin(**read_sealed_json(path, f"{STATISTICS}/origin.json"))
    except (DamagedError, TypeError) as error:
        raise DamagedError(f"{STATISTICS}/origin.json is damaged ({error}): run the job again") from error


def read_statistics(output: Path, layer: int) -> LayerStatistics:
    """What `write_statistics` kept.

    Raises:
        OutputError: the job kept no statistics of the layer, or another version did.
        DamagedError: the file does not hold what was written.
    """
    path = _statistics_path(output, layer)
    arrays, _ = read_arrays(path, _KEEP)
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
