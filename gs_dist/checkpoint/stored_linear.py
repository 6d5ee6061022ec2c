"""Weights of published linears turned back by the form of their tensors alone, apart from what writes them.

Forms are those that `described_layout` expects; between them, dtypes and shapes tell which one it is.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gs_dist.checkpoint.inventory import Inventory

__all__ = ["code_tensors", "has_shape", "linear_bits", "restored_weight", "stored_scales"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

_E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def code_tensors(name: str) -> tuple[str, ...]:
    """Names under which dialects keep the codes of a linear, or its floats."""
    return f"{name}.weight", f"{name}.weight_packed", f"{name}.qweight"


def has_shape(inventory: Inventory, name: str, rows: int, columns: int) -> bool:
    """Whether a linear with codes and scales may be one of (rows, columns)."""
    codes = next(inventory.tensors[tensor] for tensor in code_tensors(name) if tensor in inventory.tensors)
    scales = inventory.tensors[f"{name}.weight_scale"]
    height, width = codes.shape
    if codes.dtype == "int32":
        return height == rows and width in (-(-columns // 8), -(-columns // 4))
    if codes.dtype == "uint8":
        return (height, 2 * width) == (rows, columns)
    pairs = codes.dtype == "int8" and scales.shape[0] == 2 * height
    return (2 * height if pairs else height, width) == (rows, columns)


def linear_bits(inventory: Inventory, name: str, columns: int) -> int:
    """Bits of a code of a linear with so many input channels."""
    packed = inventory.tensors.get(f"{name}.weight_packed") or inventory.tensors[f"{name}.weight"]
    scales = inventory.tensors[f"{name}.weight_scale"]
    if packed.dtype == "int32":
        return 4 if packed.shape[1] * 8 == columns else 8
    return 4 if packed.dtype == "uint8" or scales.shape[0] == 2 * packed.shape[0] else 8


def stored_scales(inventory: Inventory, name: str) -> Float32:
    """A tensor of scales in float32; bytes are exponents of two, plus 127, and a scale of the whole divides."""
    stored, whole = inventory.read(name), name.removesuffix("weight_scale") + "weight_global_scale"
    if whole in inventory.tensors:
        return np.asarray(stored.astype(np.float32) / inventory.read(whole), dtype=np.float32)
    return (
        np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
        if stored.dtype == np.uint8
        else stored.astype(np.float32)
    )


def restored_weight(inventory: Inventory, name: str, columns: int) -> Float32:
    """The weight (out, in) that codes and scales of a sound linear with so many input channels stand for."""
    packed = f"{name}.weight_packed" in inventory.tensors
    stored = inventory.read(f"{name}.weight_packed" if packed else f"{name}.weight")
    steps = stored_scales(inventory, f"{name}.weight_scale")
    values = _values(stored, len(steps), columns)
    if len(steps) != len(values) or columns % steps.shape[1]:  # blocks, those at the edges cut short
        side = 128
        return np.asarray(values * np.kron(steps, np.ones((side, side), np.float32))[: len(values), :columns])
    grouped = values.reshape(*steps.shape, -1)
    grouped *= steps[:, :, None]
    return values


def _values(stored: Array, num_scales: int, columns: int) -> Float32:
    if stored.dtype == np.int32:
        per_word = 8 if stored.shape[1] * 8 == columns else 4
        bits = 32 // per_word
        shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
        codes = (stored.view(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
        values = codes.reshape(len(stored), -1)[:, :columns].astype(np.float32)
        return np.asarray(values - np.float32(1 << (bits - 1)))
    if stored.dtype == np.uint8:
        return np.asarray(np.stack([_E2M1[stored & 15], _E2M1[stored >> 4]], axis=2).reshape(len(stored), -1))
    if stored.dtype == np.int8 and num_scales == 2 * len(stored):
        pairs = np.stack([(stored << 4) >> 4, stored >> 4], axis=1)  # the arithmetic shift extends the sign
        return np.asarray(pairs.reshape(-1, columns), dtype=np.float32)
    return stored.astype(np.float32)
