"""The last step of a run: from shards with manifests to a model directory.

No shard is rewritten: the merge checks that everything is there, then writes config.json, the tokenizer's
files and, last, the index that makes the directory a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gs_dist.checkpoint.companions import copy_companions
from gs_dist.checkpoint.dialects import Codec, codec_of
from gs_dist.checkpoint.dialects.base import Policies
from gs_dist.checkpoint.header import read_header
from gs_dist.checkpoint.manifest import LayerManifest, part_stem
from gs_dist.checkpoint.published_config import without_machine
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.checkpoint.shard_records import refuse_changed_shard
from gs_dist.checkpoint.weight_files import INDEX_FILE
from gs_dist.checkpoint.writer import StoredTensor, remove_leftovers, write_json
from gs_dist.errors import JobFailure, OutputError

__all__ = ["MergeRecord", "merge_checkpoint", "refuse_foreign_weights"]


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """What a merge made: `total_size` bytes of tensors; `dropped` source tensors that no decoder needs."""

    dialect: str
    total_size: int
    num_tensors: int
    files: tuple[str, ...]
    dropped: tuple[str, ...]


def merge_checkpoint(
    output: Path,
    dialect: str,
    reader: CheckpointReader,
    manifests: Iterable[LayerManifest],
    outer: LayerManifest,
    planned: Policies | None = None,
) -> MergeRecord:
    """Makes `output/<dialect>` a model directory.

    Args:
        output: the run's output directory.
        dialect: the dialect.
        reader: the source checkpoint.
        manifests: those of all decoder layers, in any order.
        outer: the manifest of embedding, final norm and head.
        planned: the recipe's policies by full name of linear. A linear that should have been quantised and
            stayed in float must then say why in its row of the summary.

    Raises:
        OutputError: a shard is missing or changed, or a foreign weight file lies in the directory.
        JobFailure: a source tensor that no shard accounts for, or a shard that does not hold what the
            policies call for; nothing has been written then.
    """
    directory = output / dialect
    architecture = reader.architecture
    layers = _by_layer(manifests, architecture.num_layers, dialect)
    parts = [*layers.values(), outer]
    policies: Policies = {name: policy for part in parts for name, policy in part.policies.items()}
    kv_cache = {layer: part.kv_cache for layer, part in layers.items()}
    _check_planned(planned or {}, policies, layers)
    for part in parts:
        _check_accounted(part, codec_of(dialect), policies, reader)
        _check_on_disk(directory, part, dialect)
    refuse_foreign_weights(output, dialect, architecture.num_layers)

    weight_map: dict[str, str] = {}
    for part in parts:
        record = part.shards[dialect]
        weight_map.update(dict.fromkeys(record.tensors, record.file))
    total_size = sum(_data_bytes(directory, part, dialect) for part in parts)

    remove_leftovers(directory)
    written = copy_companions(reader.companions(), directory)
    for name, content in codec_of(dialect).extra_files(policies, kv_cache, architecture).items():
        write_json(directory / name, content)
        written.append(name)
    source = without_machine(reader.config)
    if "dtype" not in source and "torch_dtype" not in source:
        source["torch_dtype"] = architecture.dtype
    write_json(directory / "config.json", codec_of(dialect).config(source, policies, kv_cache, architecture))
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX_FILE, index)
    return MergeRecord(
        dialect=dialect,
        total_size=total_size,
        num_tensors=len(weight_map),
        files=tuple(sorted([*written, "config.json", INDEX_FILE, *set(weight_map.values())])),
        dropped=reader.ignored,
    )


def _by_layer(manifests: Iterable[LayerManifest], num_layers: int, dialect: str) -> dict[int, LayerManifest]:
    found: dict[int, LayerManifest] = {}
    for manifest in manifests:
        if manifest.layer is None or manifest.layer in found or not 0 <= manifest.layer < num_layers:
            raise JobFailure(f"{manifest.stem}: comes twice, or is not one of the model's {num_layers} layers")
        if dialect not in manifest.shards:
            raise JobFailure(f"{manifest.stem}: has no shard in the dialect {dialect}")
        found[manifest.layer] = manifest
    missing = [layer for layer in range(num_layers) if layer not in found]
    if missing:
        raise JobFailure(f"{len(missing)} of {num_layers} layers are not finished, the first is layer {missing[0]}")
    return dict(sorted(found.items()))


def _check_planned(planned: Policies, actual: Policies, layers: Mapping[int, LayerManifest]) -> None:
    noted = {row.name for part in layers.values() for row in part.rows if row.notes}
    for name, policy in planned.items():
        wanted = policy is not None and policy.quantizes_linear and name != "lm_head"
        if wanted and name not in actual and name not in noted:
            raise JobFailure(f"{name}: the recipe quantises it, it stayed in float, and nothing says why")
        if name in actual and not wanted:
            raise JobFailure(f"{name}: the recipe leaves it alone, and it was quantised")


def _check_accounted(part: LayerManifest, codec: Codec, policies: Policies, reader: CheckpointReader) -> None:
    """A shard holds exactly what the architecture and the policies call for, in the source's float dtypes."""
    architecture = reader.architecture
    if part.layer is None:
        outer = {**architecture.outer_tensors(), **dict(architecture.carried)}
        expected = {name: StoredTensor(dtype="", shape=shape) for name, shape in outer.items()}
    else:
        expected = codec.expected_tensors(part.layer, policies, part.kv_cache, architecture)
    held = part.shards[codec.name]
    for name, stored in expected.items():
        wanted = stored if stored.dtype else replace(stored, dtype=reader.tensors[name].dtype)
        found = held.tensors.get(name)
        if found is None:
            raise JobFailure(
                f"{codec.name}/{held.file}: tensor {name} is unaccounted for: it is called for, and missing"
            )
        if found != wanted:
            raise JobFailure(
                f"{codec.name}/{held.file}: tensor {name} is {found.dtype} {found.shape}, called for is "
                f"{wanted.dtype} {wanted.shape}"
            )
    extra = [name for name in held.tensors if name not in expected]
    if extra:
        raise JobFailure(f"{codec.name}/{held.file}: holds {extra[0]}, which neither model nor policies call for")


def _data_bytes(directory: Path, part: LayerManifest, dialect: str) -> int:
    tensors, _ = read_header(directory / part.shards[dialect].file, part.shards[dialect].file)
    return sum(info.nbytes for info in tensors.values())


def _check_on_disk(directory: Path, part: LayerManifest, dialect: str) -> None:
    again = f"delete manifests/{part.stem}.json and submit the recipe again to have it done anew"
    refuse_changed_shard(directory, part.shards[dialect], again)


def refuse_foreign_weights(output: Path, dialect: str, num_layers: int) -> None:
    """Refuses weight files in a format's directory that no run of so many layers writes.

    Raises:
        OutputError: there is one; the message names it.
    """
    ours = {f"{part_stem(layer)}.safetensors" for layer in (None, *range(num_layers))}
    foreign = sorted(path.name for path in (output / dialect).glob("*.safetensors") if path.name not in ours)
    if foreign:
        raise OutputError(
            f"{dialect}/{foreign[0]}: is not of this run, and serving engines would load it too; move it away"
        )
