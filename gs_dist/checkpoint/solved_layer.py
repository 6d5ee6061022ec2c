"""A solved layer on disk, before any dialect: what later layers see under quantised propagation.

Dialects are made for engines and may drop what only the solver knows; this file gives a `QuantizedLayer`
back exactly. It lies in `solved/` of the output while the job runs, and goes when the job is done.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gs_dist.checkpoint.array_file import read_arrays, read_texts, write_arrays
from gs_dist.checkpoint.lineage import Lineage
from gs_dist.checkpoint.manifest import MANIFESTS, part_stem, read_manifest
from gs_dist.checkpoint.writer import make_directory
from gs_dist.errors import DamagedError, OutputError
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedKVCache, QuantizedLayer, QuantizedLinear
from gs_dist.seal import SEAL

__all__ = ["SOLVED", "read_solved", "remove_solved", "solved_is_whole", "write_solved"]

_AGAIN = "submit the same recipe again to have the layer done again"

SOLVED = "solved"
_ARRAYS = ("codes", "scale", "zero_point", "group_index", "bias", "smooth_scale", "smooth_shift")


def write_solved(output: Path, layer: QuantizedLayer, lineage: Lineage) -> str:
    """Writes `solved/layer-00017.safetensors`; its checksum. Summary rows are left to the manifest."""
    arrays: dict[str, npt.NDArray[Any]] = {f"tensors/{name}": array for name, array in layer.tensors.items()}
    settings: dict[str, Any] = {}
    for name, linear in layer.linears.items():
        present = {key: getattr(linear, key) for key in _ARRAYS if getattr(linear, key) is not None}
        arrays |= {f"linears/{name}/{key}": array for key, array in present.items()}
        settings[name] = {
            "policy": linear.policy.model_dump(mode="json"),
            "input_scale": linear.input_scale,
            "input_zero_point": linear.input_zero_point,
        }
    if layer.kv_cache is not None:
        scales = {"key_scale": layer.kv_cache.key_scale, "value_scale": layer.kv_cache.value_scale}
        arrays |= {f"kv_cache/{key}": scale for key, scale in scales.items() if scale is not None}
    texts = {
        "linears": json.dumps(settings),
        "kv_cache": json.dumps(layer.kv_cache is not None),
        "lineage": json.dumps(dataclasses.asdict(lineage)),
    }
    return write_arrays(make_directory(output / SOLVED) / f"{part_stem(layer.layer)}.safetensors", arrays, texts)


def read_solved(output: Path, layer: int) -> tuple[QuantizedLayer, Lineage]:
    """Inverse of `write_solved`, without rows.

    Raises:
        OutputError: the layer was not solved under quantised propagation.
        DamagedError: it is not what its manifest says was solved.
    """
    path = _path(output, layer)
    arrays, texts = read_arrays(path, _AGAIN)
    manifest = read_manifest(output, layer)
    if manifest is None or manifest.solved != read_texts(path, _AGAIN)[SEAL]:
        raise DamagedError(f"{SOLVED}/{path.name}: is not what {MANIFESTS}/{part_stem(layer)}.json tells of; {_AGAIN}")
    linears = {
        name: QuantizedLinear(
            policy=QuantPolicy.model_validate_json(json.dumps(found["policy"])),
            input_scale=found["input_scale"],
            input_zero_point=found["input_zero_point"],
            **{key: arrays[f"linears/{name}/{key}"] for key in _ARRAYS if f"linears/{name}/{key}" in arrays},
        )
        for name, found in json.loads(texts["linears"]).items()
    }
    cache = None
    if json.loads(texts["kv_cache"]):
        cache = QuantizedKVCache(
            key_scale=arrays.get("kv_cache/key_scale"), value_scale=arrays.get("kv_cache/value_scale")
        )
    prefix = "tensors/"
    tensors = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    solved = QuantizedLayer(layer=layer, linears=linears, tensors=tensors, kv_cache=cache)
    return solved, Lineage(**json.loads(texts["lineage"]))


def solved_is_whole(output: Path, layer: int) -> bool:
    """Whether a layer's file is there and as it was written; it is read in full."""
    try:
        read_solved(output, layer)
    except OutputError:
        return False
    return True


def _path(output: Path, layer: int) -> Path:
    return output / SOLVED / f"{part_stem(layer)}.safetensors"


def remove_solved(output: Path) -> None:
    """Deletes `solved/`: the job is done."""
    shutil.rmtree(output / SOLVED, ignore_errors=True)
