"""Directories damaged in ways that nobody listed: each is told, or is one of those that `docs/checks.md` lists.

Nothing vouches for the directories here: what is told is told from the files alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import dialects
import numpy as np
import pytest
from checkpoints import save_safetensors
from hypothesis import given, note, settings
from hypothesis import strategies as st

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.recipe.dialects import DIALECTS

pytestmark = pytest.mark.seconds
INDEX = "model.safetensors.index.json"
SPECS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"policy": dialects.W8A8_ASYMMETRIC, "zero_point": 3},
    "compressed-tensors, packed": {"policy": dialects.W4A16_GROUPS, "hidden_size": 128, "intermediate_size": 128},
    "gptq": {"policy": dialects.W4A16_GROUPS, "hidden_size": 128, "intermediate_size": 128},
    "ascend": {"policy": dialects.W8A8_ASYMMETRIC, "model_type": "qwen2", "zero_point": 3},
    "golden-stick": {"policy": dialects.W8A8_ASYMMETRIC, "model_type": "qwen2", "zero_point": 3},
}
_ROOT = tempfile.TemporaryDirectory()
PRISTINE: dict[str, Path] = {}


def dialect_of(spec: str) -> str:
    return spec.partition(",")[0]


def pristine(spec: str) -> Path:
    if spec not in PRISTINE:
        PRISTINE[spec] = Path(_ROOT.name) / spec
        dialects.save_model(PRISTINE[spec], codec_of(dialect_of(spec)), num_hidden_layers=1, **SPECS[spec])
    return PRISTINE[spec]


# What is done to a tensor; each keeps the file well formed, and the index's total size right where it can.
def _not_a_number(array: np.ndarray, at: int) -> np.ndarray:
    array.reshape(-1)[at] = np.nan
    return array


def _negative(array: np.ndarray, at: int) -> np.ndarray:
    array.reshape(-1)[at] = -np.abs(array.reshape(-1)[at]) - 1
    return array


def _nothing(array: np.ndarray, at: int) -> np.ndarray:
    return np.zeros_like(array)


def _wider(array: np.ndarray, at: int) -> np.ndarray:
    return np.concatenate([array, array], axis=-1)


def _flatter(array: np.ndarray, at: int) -> np.ndarray:
    return array.reshape(1, -1) if array.shape != (1, array.size) else array.reshape(-1)


def _other_dtype(array: np.ndarray, at: int) -> np.ndarray:
    return array.astype(np.uint8 if array.dtype != np.uint8 else np.int8)


def _bits(array: np.ndarray, at: int) -> np.ndarray:
    octets = array.reshape(-1).view(np.uint8)
    octets[at % octets.size] ^= 1 << (at % 8)
    return array


TENSOR_CHANGES = (_not_a_number, _negative, _nothing, _wider, _flatter, _other_dtype, _bits)
JSON_CHANGES = ("drop", "null", "number", "text", "list", "renamed")
FILE_CHANGES = ("gone", "cut", "longer", "copied")


@st.composite
def mutations(draw: st.DrawFn, spec: str) -> tuple[str, ...]:
    """A change as text: what kind, where, how."""
    directory = pristine(spec)
    kind = draw(st.sampled_from(["tensor", "tensor", "tensor", "json", "json", "index", "name", "file"]))
    if kind in ("tensor", "name"):
        names = sorted(CheckpointReader(directory, quantized=True).tensors)
        change = draw(st.sampled_from([change.__name__ for change in TENSOR_CHANGES])) if kind == "tensor" else ""
        return kind, draw(st.sampled_from(names)), change, str(draw(st.integers(0, 63)))
    if kind == "json":
        file = draw(st.sampled_from(["config.json", DIALECTS[dialect_of(spec)].describing_file]))
        return (
            kind,
            file,
            draw(st.sampled_from(_paths(json.loads((directory / file).read_text())))),
            draw(st.sampled_from(JSON_CHANGES)),
        )
    if kind == "index":
        entries = sorted(json.loads((directory / INDEX).read_text())["weight_map"])
        return kind, draw(st.sampled_from(entries)), draw(st.sampled_from(("drop", "elsewhere"))), ""
    files = sorted(path.name for path in directory.iterdir() if path.suffix in (".safetensors", ".json"))
    return kind, draw(st.sampled_from(files)), draw(st.sampled_from(FILE_CHANGES)), ""


def _paths(value: Any, path: tuple[str, ...] = ()) -> list[str]:
    found = ["\0".join(path)] if path else []
    if isinstance(value, dict):
        for key, child in value.items():
            found += _paths(child, (*path, key))
    return found


def apply(directory: Path, mutation: tuple[str, ...]) -> bool:
    """Changes the directory; False where the change leaves it as it was."""
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    kind, place, how, at = mutation
    if kind in ("tensor", "name"):
        _change_tensor(directory, place, how, int(at))
    elif kind == "json":
        _change_json(directory / place, how.split("\0"), at)
    elif kind == "index":
        index = json.loads((directory / INDEX).read_text())
        other = next(file for file in sorted(set(index["weight_map"].values())) if file != index["weight_map"][place])
        index["weight_map"].pop(place) if how == "drop" else index["weight_map"].update({place: other})
        (directory / INDEX).write_text(json.dumps(index))
    else:
        _change_file(directory / place, how)
    return {path.name: path.read_bytes() for path in directory.iterdir()} != before


def _change_tensor(directory: Path, name: str, how: str, at: int) -> None:
    reader = CheckpointReader(directory, quantized=True)
    file = reader.tensors[name].file
    names = [other for other, info in reader.tensors.items() if info.file == file]
    tensors = {other: array.copy() for other, array in reader.read(names).items()}
    if how:
        change = next(change for change in TENSOR_CHANGES if change.__name__ == how)
        if how == "_not_a_number" and tensors[name].dtype.kind in "iu":
            how, change = "_nothing", _nothing
        with np.errstate(all="ignore"):
            tensors[name] = np.ascontiguousarray(change(tensors[name], at % max(1, tensors[name].size)))
    else:
        tensors[f"{name}s"] = tensors.pop(name)
    save_safetensors(directory / file, tensors)
    index = json.loads((directory / INDEX).read_text())
    kept = {other: held for other, held in index["weight_map"].items() if held != file}
    index["weight_map"] = {**kept, **dict.fromkeys(tensors, file)}
    held = [array.nbytes for array in tensors.values()]
    others = sum(info.nbytes for info in reader.tensors.values() if info.file != file)
    index["metadata"]["total_size"] = others + sum(held)
    (directory / INDEX).write_text(json.dumps(index))


def _change_json(path: Path, keys: list[str], how: str) -> None:
    content = json.loads(path.read_text())
    parent = content
    for key in keys[:-1]:
        parent = parent[key]
    last, values = keys[-1], {"null": None, "number": 7, "text": "x", "list": ["x"]}
    if how == "drop":
        del parent[last]
    elif how == "renamed":
        parent[f"{last}_"] = parent.pop(last)
    else:
        parent[last] = values[how]
    path.write_text(json.dumps(content))


def _change_file(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "copied":
        path.with_name(f"a{path.name}").write_bytes(data)
    else:
        path.write_bytes(data[:-3] if how == "cut" else data + b"\0\0\0")


# What `docs/checks.md` lists under "What files alone do not tell".
UNREAD_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
FREE_KEYS = {
    "config.json": {
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "hidden_act",
        "max_position_embeddings",
        "model_type",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "global_compression_ratio",
        "output_activations",
        "quantization_status",
    },
    "quant_model_description.json": {"group_size", "metadata", "optional"},
    "quantization_description.json": set(),
}
# Keys whose absence means what was written.
DEFAULTS = {"format", "num_bits", "type", "strategy", "dynamic", "symmetric", "kv_cache_scheme"}
DEFAULTS |= {"checkpoint_format", "lm_head"}


def undetectable(mutation: tuple[str, ...]) -> bool:
    """Whether the page lists the change."""
    kind, place, how, at = mutation
    if kind == "tensor":  # any code, float or scale may be what a solver found; relations between tensors tell of some
        return how in ("_bits", "_negative", "_nothing", "_not_a_number")
    if kind == "file":
        return place in UNREAD_FILES or (how == "copied" and place == "config.json")
    key = how.split("\0")[-1]
    if kind == "json":
        if key.startswith("group_") and at == "renamed":  # the label of a group of linears is anybody's
            return True
        return key in FREE_KEYS[place] or (key in DEFAULTS and at in ("drop", "null", "renamed"))
    return False


@pytest.mark.parametrize("spec", SPECS)
def test_a_damaged_directory_is_told_of(spec: str) -> None:
    """A hundred changes of tensors, names, JSON keys, index entries and files a dialect; none makes the check fail."""
    counts = {"told": 0, "listed": 0}

    @settings(max_examples=130, deadline=None, derandomize=True, database=None)
    @given(mutations(spec))
    def holds(mutation: tuple[str, ...]) -> None:
        with tempfile.TemporaryDirectory() as root:
            directory = Path(shutil.copytree(pristine(spec), Path(root) / "model"))
            if not apply(directory, mutation):
                return
            report = check(directory)
            note(f"{mutation}")
            if report.problems or report.notes:
                counts["told"] += 1
            else:
                assert undetectable(mutation), f"not told: {mutation}"
                counts["listed"] += 1

    holds()
    print(f"{spec}: {counts['told']} of {sum(counts.values())} changes told, {counts['listed']} are on the page's list")
    assert sum(counts.values()) >= 100, counts
    assert counts["told"] > 50, counts
