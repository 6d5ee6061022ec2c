"""Whether a directory is what was published: its files and values against provenance.json, and a run's manifests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gs_dist.checkpoint.inventory import INDEX_FILE, Inventory
from gs_dist.checkpoint.layout import Layout
from gs_dist.checkpoint.manifest import MANIFESTS, read_manifest
from gs_dist.checkpoint.output_lock import DONE, LAYER_POLICIES
from gs_dist.checkpoint.part_manifest import finished_parts, read_part
from gs_dist.checkpoint.paths import contained_path
from gs_dist.checkpoint.provenance import (
    HASHING_THREADS,
    PROVENANCE_FILE,
    Provenance,
    ScaleRange,
    file_sha256,
    read_provenance,
)
from gs_dist.checkpoint.sealed_json import read_sealed_json
from gs_dist.checkpoint.stored_linear import code_tensors, stored_scales
from gs_dist.errors import CheckpointError, DamagedError, OutputError
from gs_dist.results.summary import read_summary, table_sha256
from gs_dist.seal import unsealed_text
from gs_dist.wording import counted

__all__ = ["verify"]

# What a job calls its shards: a directory of such files came with a provenance.json.
_OURS = re.compile(r"(layer-\d{5}|outer)\.safetensors")
_CLOSE = 1e-6  # relative; both are the same float32, told in decimals


def verify(inventory: Inventory, layout: Layout, sound: set[str]) -> str | None:
    """Compares what is there with what a job noted; each file is read once.

    Args:
        inventory: problems go to it.
        layout: expected tensors and kinds of linears.
        sound: tensors whose form and values are right.

    Returns:
        In words what the directory was verified by; None where nothing vouches for it.
    """
    provenance = _provenance(inventory)
    manifests = _manifest_hashes(inventory)
    _check_run(inventory)
    noted: dict[str, Mapping[str, str]] = dict(manifests)
    if provenance is not None:
        noted[PROVENANCE_FILE] = provenance.shards
    hashes = _by_file(noted)
    _compare_shards(inventory, hashes)
    for file in sorted(inventory.files):
        if provenance is not None and file not in provenance.shards:
            inventory.report(file, "shard-noted", "a file of weights", f"one that {PROVENANCE_FILE} names")
    if provenance is None:
        return f"weights by the run's {MANIFESTS}, other files by nothing" if hashes else None
    _compare_files(inventory, provenance)
    _compare_rows(inventory, layout, provenance, sound)
    files = counted(len(provenance.shards) + len(provenance.files), "file")
    return f"{files} and {counted(len(provenance.linears), 'linear')} by {PROVENANCE_FILE}"


def _provenance(inventory: Inventory) -> Provenance | None:
    """What the directory was published with; its absence is a fault where a job wrote the directory."""
    try:
        provenance = read_provenance(inventory.directory)
    except OutputError as error:
        inventory.report(PROVENANCE_FILE, "provenance-valid", error, "the file as a job wrote it")
        return None
    ours = [name for name in inventory.files if _OURS.fullmatch(name)]
    in_run = (inventory.directory.resolve().parent / MANIFESTS).is_dir()
    if provenance is None and ours and not in_run:
        found = f"no such file beside {ours[0]}"
        inventory.report(PROVENANCE_FILE, "provenance-present", found, "the file that a job writes beside its shards")
    return provenance


def _by_file(noted: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """File to what notes it and the hash that is noted."""
    found: dict[str, dict[str, str]] = {}
    for source, hashes in noted.items():
        for file, sha256 in hashes.items():
            found.setdefault(file, {})[source] = sha256
    return found


def _compare_shards(inventory: Inventory, hashes: Mapping[str, Mapping[str, str]]) -> None:
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        found_of = {file: pool.submit(file_sha256, inventory.files[file]) for file in hashes if file in inventory.files}
    for file, sources in hashes.items():
        path = inventory.files.get(file)
        if path is None:
            reported = any(p.file == file and p.rule.startswith("file-") for p in inventory.problems)
            if PROVENANCE_FILE in sources and not reported:
                inventory.report(file, "shard-present", "no such file", f"a shard, {PROVENANCE_FILE} names it")
            continue  # of a manifest: another dialect's, or a file that was reported already
        found = found_of[file].result()
        for source, sha256 in sources.items():
            if sha256 != found:
                inventory.report(file, "shard-hash", f"sha256 {found[:12]}...", f"{sha256[:12]}... of {source}")


def _compare_files(inventory: Inventory, provenance: Provenance) -> None:
    """config.json, index, description, tokenizer and whatever else came with the weights."""
    for file, sha256 in provenance.files.items():
        try:
            path = contained_path(inventory.directory, file)
        except CheckpointError as error:
            inventory.report(PROVENANCE_FILE, "provenance-valid", error, "names of files of this directory")
            continue
        if not path.is_file():
            known = file == INDEX_FILE and any(p.file == file for p in inventory.problems)
            if not known:
                inventory.report(file, "file-noted", "no such file", f"a file, {PROVENANCE_FILE} names it")
            continue
        found = file_sha256(path)
        if found != sha256:
            inventory.report(file, "file-hash", f"sha256 {found[:12]}...", f"{sha256[:12]}... of {PROVENANCE_FILE}")


def _compare_rows(inventory: Inventory, layout: Layout, provenance: Provenance, sound: set[str]) -> None:
    """Every linear has a row; one that is in float has no scales in it, and another's scales are those of the row."""
    if not provenance.linears and not provenance.schemes:
        expected = "a row for each linear, or its scheme"
        inventory.report(PROVENANCE_FILE, "provenance-rows", "no linear", expected)
        return
    for name, kind in layout.kinds.items():
        row = provenance.linears.get(name)
        scheme = provenance.schemes.get(name)
        if row is None and scheme is None:
            inventory.report(PROVENANCE_FILE, "provenance-rows", "no row", "a row for each linear", name)
        elif (row.low is None if row is not None else scheme == "FLOAT") is not (kind == "FLOAT"):
            told = "float" if kind != "FLOAT" else "quantised"
            file = _file_of(inventory, name)
            inventory.report(file, "provenance-rows", kind, f"{told}, by its row in {PROVENANCE_FILE}", name)
        elif row is not None and row.low is not None:
            for scales in sound.intersection((f"{name}.weight_scale", f"{name}.scales")):
                _compare_scales(inventory, scales, row)


def _file_of(inventory: Inventory, name: str) -> str:
    held = map(inventory.tensors.get, code_tensors(name))
    return next((info.file for info in held if info is not None), PROVENANCE_FILE)


def _compare_scales(inventory: Inventory, name: str, row: ScaleRange) -> None:
    scales = stored_scales(inventory, name)
    found, noted = np.array([scales.min(), scales.max()], np.float64), np.array([row.low, row.high])
    if (np.abs(found - noted) > _CLOSE * noted).any():
        expected = f"{row.low:.6g} to {row.high:.6g} by {PROVENANCE_FILE}"
        inventory.report_tensor(name, "provenance-scale", f"{found[0]:.6g} to {found[1]:.6g}", expected)


def _manifest_hashes(inventory: Inventory) -> dict[str, dict[str, str]]:
    """Manifest to file and hash of the shard it vouches for here; faults of manifests are reported."""
    run = inventory.directory.resolve().parent
    hashes: dict[str, dict[str, str]] = {}
    if parts := finished_parts(run):
        return _part_hashes(inventory, run, parts)
    for layer, label in _manifests(inventory) if (run / MANIFESTS).is_dir() else ():
        try:
            manifest = read_manifest(run, layer)
        except OutputError as error:
            inventory.report(label, "manifest-valid", error, "a manifest")
            continue
        if manifest is None:
            inventory.report(label, "manifest-present", "no such file", "a manifest for every shard")
            continue
        record = manifest.shards.get(inventory.directory.resolve().name)
        if record is not None:
            hashes[label] = {record.file: record.sha256}
    return hashes


def _check_run(inventory: Inventory) -> None:
    """What else the run that the directory lies in keeps: each file against its checksum."""
    run = inventory.directory.resolve().parent
    if not (run / MANIFESTS).is_dir() or finished_parts(run):
        return
    finished = (run / DONE).is_file()
    for name, is_whole in _RUN_FILES.items():
        label = f"../{name}"
        if not (run / name).is_file():
            if finished and name in _ALWAYS:
                inventory.report(label, "run-file-present", "no such file", "a file that a finished job has")
            continue
        try:
            is_whole(run / name)
        except (OutputError, OSError, ValueError) as error:
            inventory.report(label, "run-file-whole", f"{error!s:.300}", "the file as a job wrote it")


def _whole_table(path: Path) -> None:
    try:
        noted = table_sha256(path.parent)
    except OutputError:
        return  # summary.json is reported itself
    if file_sha256(path) != noted:
        raise DamagedError(f"{path.name}: is not the one that summary.json was written with")


def _whole_text(path: Path) -> None:
    unsealed_text(path.read_text(encoding="utf-8"), path.name)


_RUN_FILES: Mapping[str, Callable[[Path], object]] = {
    DONE: lambda path: read_sealed_json(path, path.name),
    "summary.json": lambda path: read_summary(path.parent),
    "summary.parquet": _whole_table,
    "recipe.yaml": _whole_text,
    LAYER_POLICIES: _whole_text,
}
_ALWAYS = ("summary.json", "summary.parquet", "recipe.yaml")


def _part_hashes(inventory: Inventory, run: Path, parts: list[int]) -> dict[str, dict[str, str]]:
    """The same of a conversion."""
    hashes: dict[str, dict[str, str]] = {}
    for number in parts:
        label = f"{MANIFESTS}/part-{number:05d}.json"
        try:
            manifest = read_part(run, number)
        except OutputError as error:
            inventory.report(label, "manifest-valid", error, "a manifest")
            continue
        record = None if manifest is None else manifest.shards.get(inventory.directory.resolve().name)
        if record is not None:
            hashes[label] = {record.file: record.sha256}
    return hashes


def _manifests(inventory: Inventory) -> Iterator[tuple[int | None, str]]:
    architecture = inventory.architecture
    for layer in (None, *range(architecture.num_layers if architecture else 0)):
        yield layer, f"{MANIFESTS}/{'outer' if layer is None else f'layer-{layer:05d}'}.json"
