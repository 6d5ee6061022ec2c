"""What a model directory holds, taken down without trusting it: problems are collected, not raised."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.header import DTYPES, SPELLINGS, TensorInfo, read_header, read_json
from gs_dist.checkpoint.paths import contained_path
from gs_dist.checkpoint.problems import Note, Problem
from gs_dist.errors import CheckpointError, UserError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.families import read_architecture
from gs_dist.recipe.dialects import description_files

__all__ = ["CONFIG_FILE", "INDEX_FILE", "Inventory", "take_inventory"]

Array = npt.NDArray[Any]

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_CHUNK = 16 << 20  # bytes of a tensor in memory at a time
_MAX_LAYERS = 10_000  # some ten times what any model has; every layer's tensors are listed in memory


@dataclass(kw_only=True)
class Inventory:
    """Files, tensors and JSON content of a directory, as far as they could be read.

    `tensors` maps every tensor name found in a sound file to its header entry. `descriptions` maps a description
    file's name to its content. `architecture` is None where config.json does not tell it.
    """

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    architecture: DecoderArchitecture | None = None
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    descriptions: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def report(self, file: str, rule: str, found: object, expected: object, tensor: str = "") -> None:
        """Notes a problem."""
        self.problems.append(Problem(file=file, tensor=tensor, rule=rule, found=str(found), expected=str(expected)))

    def note(self, rule: str, text: str) -> None:
        """Notes what an engine's user must know."""
        self.notes.append(Note(rule=rule, text=text))

    def report_tensor(self, name: str, rule: str, found: object, expected: object) -> None:
        """Notes a problem of a tensor that is there, under the file that holds it."""
        self.report(self.tensors[name].file, rule, found, expected, name)

    @property
    def quantization_config(self) -> dict[str, Any]:
        """`quantization_config` of config.json, empty where it is missing or no object."""
        value = self.config.get("quantization_config")
        return value if isinstance(value, dict) else {}

    def chunks(self, name: str) -> Iterator[Array]:
        """A tensor's data as 2-dimensional blocks of whole rows of its last axis, 16 MiB at a time."""
        info = self.tensors[name]
        dtype = DTYPES[SPELLINGS[info.dtype]]
        columns = info.shape[-1] if info.shape else 1
        if not info.nbytes:
            return
        num_rows = math.prod(info.shape) // columns
        rows = max(1, _CHUNK // (columns * dtype.itemsize))
        with self.files[info.file].open("rb") as file:
            file.seek(info.offset)
            for start in range(0, num_rows, rows):
                count = min(rows, num_rows - start) * columns
                yield np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype).reshape(-1, columns)

    def read(self, name: str) -> Array:
        """A whole tensor."""
        blocks = list(self.chunks(name))
        info = self.tensors[name]
        dtype = DTYPES[SPELLINGS[info.dtype]]
        return np.concatenate(blocks).reshape(info.shape) if blocks else np.empty(info.shape, dtype=dtype)


def take_inventory(directory: Path) -> Inventory:
    """Reads config.json, index, description files and all headers.

    Raises:
        UserError: `directory` is not a directory.
    """
    if not directory.is_dir():
        raise UserError(f"{str(directory)!r} is not a directory: name the directory that holds config.json")
    inventory = Inventory(directory=directory)
    _read_config(inventory)
    for name in sorted(path.name for path in directory.glob("*.json")):
        if any(name.endswith(known) for known in description_files()):
            content = _json(inventory, name)
            if content is not None:
                inventory.descriptions[name] = _with_text_labels(inventory, name, content)
    _read_weights(inventory)
    architecture = inventory.architecture
    if architecture is not None:
        further = (info for info in inventory.tensors.values() if architecture.further_layer(info.name) is not None)
        inventory.architecture = replace(architecture, carried=tuple((info.name, info.shape) for info in further))
    return inventory


def _json(inventory: Inventory, name: str) -> dict[str, Any] | None:
    try:
        return read_json(inventory.directory / name, name)
    except CheckpointError as error:
        inventory.report(name, "json-valid", error, "a JSON object")
        return None


def _with_text_labels(inventory: Inventory, file: str, content: dict[str, Any]) -> dict[str, Any]:
    """The description with labels that are no text reported, and spelt as text from here on."""
    for key, label in content.items():
        if "." in key and not isinstance(label, str):
            inventory.report(file, "description-label", f"{label!r:.60}", "a word", key)
            content[key] = f"{label!r:.60}"
    return content


def _read_config(inventory: Inventory) -> None:
    if not (inventory.directory / CONFIG_FILE).is_file():
        inventory.report(CONFIG_FILE, "config-present", "no such file", "the model's config.json")
        return
    inventory.config = _json(inventory, CONFIG_FILE) or {}
    if not inventory.config:
        return
    model_type = inventory.config.get("model_type")
    if not isinstance(model_type, str):
        inventory.report(CONFIG_FILE, "config-model-type", f"model_type {model_type!r:.40}", "the model's type as text")
    plain = {key: value for key, value in inventory.config.items() if key != "quantization_config"}
    try:
        architecture = read_architecture(plain)
    except UserError as error:
        inventory.report(CONFIG_FILE, "config-values", error, "a Llama-like decoder's sizes")
        return
    if architecture.num_layers > _MAX_LAYERS:
        found = f"num_hidden_layers {architecture.num_layers}"
        inventory.report(CONFIG_FILE, "config-values", found, f"at most {_MAX_LAYERS}")
        return
    inventory.architecture = architecture


def _read_weights(inventory: Inventory) -> None:
    directory = inventory.directory
    on_disk = sorted(path.name for path in directory.glob("*.safetensors"))
    indices = sorted(path.name for path in directory.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        inventory.report(indices[1], "index-single", " and ".join(indices), f"{INDEX_FILE} alone")
    if INDEX_FILE in indices:
        index = _json(inventory, INDEX_FILE)
        weight_map = index.get("weight_map") if index else None
        if index is not None and not (isinstance(weight_map, dict) and weight_map):
            inventory.report(INDEX_FILE, "index-map", f"weight_map {type(weight_map).__name__}", "names to files")
        if isinstance(weight_map, dict) and index is not None:
            _read_indexed(inventory, index, weight_map, on_disk)
        return
    if indices:
        inventory.report(indices[0], "index-name", indices[0], f"{INDEX_FILE}, the only index that engines read")
    elif not on_disk:
        inventory.report(SINGLE_FILE, "weights-present", "no safetensors file", f"{SINGLE_FILE} or {INDEX_FILE}")
    elif on_disk != [SINGLE_FILE]:
        inventory.report(INDEX_FILE, "index-present", f"no index for {len(on_disk)} files", "an index")
    for name in on_disk:
        _read_file(inventory, name)


def _read_indexed(
    inventory: Inventory, index: Mapping[str, Any], weight_map: Mapping[str, Any], on_disk: list[str]
) -> None:
    listed = {file for file in weight_map.values() if isinstance(file, str)}
    for name in sorted(listed):
        _read_file(inventory, name)
    for name in on_disk:
        if name not in listed:
            inventory.report(name, "file-listed", f"not in {INDEX_FILE}", "every safetensors file in the index")
    sound = {info.file for info in inventory.tensors.values()}
    for tensor, file in weight_map.items():
        info = inventory.tensors.get(tensor)
        if not isinstance(file, str):
            inventory.report(INDEX_FILE, "index-map", f"{file!r:.100}", "a file's name", tensor)
        elif file in sound and (info is None or info.file != file):
            inventory.report(INDEX_FILE, "index-entry", f"{file}, which does not hold it", "the file that does", tensor)
    for tensor, info in inventory.tensors.items():
        if tensor not in weight_map:
            inventory.report(info.file, "index-entry", f"not in {INDEX_FILE}", "every tensor in the index", tensor)
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(info.nbytes for info in inventory.tensors.values())
    if stated != total and listed <= sound:
        inventory.report(INDEX_FILE, "index-total-size", stated, total)


def _read_file(inventory: Inventory, name: str) -> None:
    try:
        path = contained_path(inventory.directory, name)
    except CheckpointError as error:
        inventory.report(INDEX_FILE, "file-inside", error, "a file of this directory")
        return
    if not path.is_file():
        inventory.report(name, "file-present", "no such file", f"a file, since {INDEX_FILE} lists it")
        return
    stated = _stated_size(path)
    size = path.stat().st_size
    if stated is not None and size < stated:
        inventory.report(name, "file-truncated", f"{size} bytes", f"{stated} bytes by its header")
        return
    try:
        tensors, _ = read_header(path, name)
    except CheckpointError as error:
        inventory.report(name, "file-sound", error, "a well-formed safetensors file")
        return
    inventory.files[name] = path
    for tensor, info in tensors.items():
        if tensor in inventory.tensors:
            other = inventory.tensors[tensor].file
            inventory.report(name, "tensor-unique", f"also in {other}", "one file a tensor", tensor)
        inventory.tensors.setdefault(tensor, info)


def _stated_size(path: Path) -> int | None:
    """Bytes a safetensors file must have by its own header, or None where the header cannot be read at all."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                return 8 + int(length) if length < 100_000_000 else None
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + int(length) + max((int(end) for end in ends), default=0)
    except (OSError, struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
