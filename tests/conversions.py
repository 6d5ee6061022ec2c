"""What tests of conversions share: converting a directory in this process, and decoding the result independently.

Decoders here are written from the formats' pages in plain NumPy, apart from the package.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from checkpoints import save_checkpoint

from gs_dist.conversion.config import ConversionConfig
from gs_dist.conversion.job import convert
from gs_dist.conversion.plan import plan_conversion
from gs_dist.progress import SilentProgress

Array = npt.NDArray[Any]

_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}


def run_conversion(model: Path, output: Path, **settings: Any) -> dict[str, Path]:
    """Converts in this process; format to model directory."""
    settings = {"workers": 1, **settings}
    config = ConversionConfig.model_validate({"model": str(model), "output": str(output), **settings})
    return convert(plan_conversion(config), SilentProgress())


def read_tensors(directory: Path) -> dict[str, Array]:
    """All tensors that the index of a model directory lists, by a reader of the test's own."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors: dict[str, Array] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= read_file(directory / file)
    assert set(tensors) == set(index["weight_map"])
    return tensors


def read_file(path: Path) -> dict[str, Array]:
    """Tensors of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = np.frombuffer(data[begin:end], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def unpacked_int32(words: Array, bits: int, columns: int) -> Array:
    """compressed-tensors' packed integers, a value at a time."""
    per_word = 32 // bits
    shifts = np.arange(per_word, dtype=np.uint32) * bits
    values = (words.view(np.uint32)[:, :, None] >> shifts) & ((1 << bits) - 1)
    return values.reshape(len(words), -1)[:, :columns].astype(np.int64) - (1 << (bits - 1))


def paired_rows(packed: Array) -> Array:
    """ModelSlim's int4: the lower half of a byte is an even row, the upper the odd one after it."""
    octets = packed.view(np.uint8).astype(np.int64)
    codes = np.empty((2 * len(packed), packed.shape[1]), dtype=np.int64)
    codes[0::2], codes[1::2] = octets & 15, octets >> 4
    return np.where(codes > 7, codes - 16, codes)


def within_half_a_step(decoded: Array, original: Array, step: Array) -> bool:
    """Whether every value is within half a step of the original, up to the rounding of the step itself.

    A step rounded down to bfloat16 takes the largest value of a channel past the top code, by 2^-8 of 127.5 codes.
    """
    slack = step * (0.5 + 0.51)
    error = np.abs(decoded - original)
    inner = np.abs(original) < np.abs(original).max(axis=-1, keepdims=True) * 0.99
    return bool((error[inner] <= np.broadcast_to(step * 0.5001, error.shape)[inner]).all() and (error <= slack).all())


FAMILIES = Path(__file__).parent / "data" / "family_checkpoints.json"
FLOATS = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}


def family_names() -> list[str]:
    """Families whose tensors are known."""
    return [name for name in json.loads(FAMILIES.read_text()) if name != "made_with"]


def family_checkpoint(directory: Path, family: str, seed: int = 0, shards: int = 2) -> tuple[Path, dict[str, Array]]:
    """A directory with the config and the tensor names that transformers writes for a family, and its random values."""
    entry = json.loads(FAMILIES.read_text())[family]
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for name, (dtype, shape) in entry["tensors"].items():
        values = rng.standard_normal(shape) * rng.uniform(0.005, 0.05, (*shape[:-1], 1) if len(shape) > 1 else ())
        tensors[name] = np.asarray(values).astype(_DTYPES[dtype])
    return save_checkpoint(directory, entry["config"], tensors, shards=shards), tensors


def expert_matrices(tensors: dict[str, Array], *, interleaved: bool, by_inputs: bool) -> dict[str, Array]:
    """Weight (out, in) by full name of every linear, fused experts taken apart as their model's code does."""
    found = {}
    for name, values in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight" and values.ndim == 2:
            found[stem] = values
        elif values.ndim == 3 and leaf in ("gate_up_proj", "down_proj"):
            for number, stored in enumerate(values):
                matrix = stored.T if by_inputs else stored
                if leaf == "down_proj":
                    found[f"{stem}.{number}.down_proj"] = matrix
                    continue
                half = len(matrix) // 2
                gate, up = (matrix[0::2], matrix[1::2]) if interleaved else (matrix[:half], matrix[half:])
                found[f"{stem}.{number}.gate_proj"], found[f"{stem}.{number}.up_proj"] = gate, up
    return found
