"""The last step of a conversion: from files with manifests to model directories, checked on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gs_dist.checkpoint.check import check_forms
from gs_dist.checkpoint.companions import copy_companions
from gs_dist.checkpoint.manifest import MANIFESTS
from gs_dist.checkpoint.part_manifest import PartManifest, read_part
from gs_dist.checkpoint.provenance import write_conversion_provenance
from gs_dist.checkpoint.published_config import without_quantization
from gs_dist.checkpoint.shard_records import refuse_changed_shard
from gs_dist.checkpoint.weight_files import CONFIG_FILE, INDEX_FILE
from gs_dist.checkpoint.writer import StoredTensor, write_json
from gs_dist.conversion.account import rows_of
from gs_dist.conversion.dialects import WRITERS
from gs_dist.conversion.dialects.base import Assigned
from gs_dist.conversion.parts import labels_of
from gs_dist.conversion.plan import ConversionPlan
from gs_dist.conversion.schemes import FLOAT
from gs_dist.conversion.worker import ConversionTask
from gs_dist.errors import DamagedError, JobFailure, OutputError, RefusedError

__all__ = ["publish_model", "refuse_other_run"]


def refuse_other_run(task: ConversionTask, num_parts: int) -> None:
    """Refuses an output that holds parts of another recipe, model or version.

    Raises:
        OutputError: it does; the message says what differs.
    """
    if any((task.output / MANIFESTS).glob("layer-*.json")):
        raise OutputError(f"output {str(task.output)!r} holds a calibration: set output to another directory")
    for number in range(1, num_parts + 1):
        try:
            manifest = read_part(task.output, number)
        except DamagedError:  # done anew
            continue
        if manifest is None:
            continue
        theirs = {**manifest.fingerprints, **manifest.made_with}
        ours = {**task.fingerprints, **task.made_with}
        names = {"recipe": "the scheme, layer_policies or format", "source": "the model"}
        differing = [names.get(key, key) for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
        if differing:
            raise OutputError(
                f"output {str(task.output)!r} holds a conversion in which {' and '.join(differing)} differed: restore "
                "what it was, or set output to another directory"
            )


def publish_model(
    plan: ConversionPlan, task: ConversionTask, finished: Mapping[int, PartManifest], dialect: str
) -> Path:
    """Makes `output/<dialect>` a model directory, provenance.json last.

    Raises:
        JobFailure: a tensor of the source is unaccounted for, or a file does not hold what the plan calls for; nothing
            has been written then.
        OutputError: a file is missing or changed, or foreign weights lie in the directory.
    """
    directory = task.output / dialect
    _check_accounted(plan)
    weight_map: dict[str, str] = {}
    total_size = 0
    for part in plan.parts:
        manifest = finished.get(part.number)
        if manifest is None:
            raise JobFailure(f"part {part.number} of {len(plan.parts)} is not finished")
        expected = part.tensors(dialect, plan.catalogue.dtype)
        _check_file(directory, manifest, dialect, expected)
        weight_map.update(dict.fromkeys(expected, part.file))
        total_size += sum(stored.nbytes for stored in expected.values())
    _refuse_foreign(directory, set(weight_map.values()))
    linears = _assigned(plan)
    writer = WRITERS[dialect]
    written = copy_companions(plan.companions, directory)
    contents = {
        **writer.describe(labels_of(plan.parts, dialect, plan.catalogue.dtype), linears),
        CONFIG_FILE: writer.config(without_quantization(plan.source.config), linears),
        INDEX_FILE: {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    }
    for name, content in contents.items():
        write_json(directory / name, content)
    write_conversion_provenance(
        directory,
        finished.values(),
        rows_of(plan, finished.values()),
        recipe=plan.config.fingerprint_fields(),
        schemes=_by_scheme(plan),
        files=[*written, *contents],
    )
    _check_published(directory)
    return directory


def _check_published(directory: Path) -> None:
    """Nothing counts as done of which description and headers, looked at apart from the writer, disagree."""
    report = check_forms(directory)
    if not report.clean:
        raise RefusedError(f"{directory.name}: what was published breaks the rules of its format:\n{report.render()}")


def _by_scheme(plan: ConversionPlan) -> dict[str, list[str]]:
    schemes: dict[str, list[str]] = {}
    for name, scheme in plan.assignment.schemes.items():
        schemes.setdefault(FLOAT if scheme is None else scheme.name, []).append(name)
    return schemes


def _assigned(plan: ConversionPlan) -> list[Assigned]:
    return [
        Assigned(
            name=linear.name,
            rows=linear.rows,
            columns=weight.columns,
            scheme=plan.assignment.schemes[linear.name],
            expert=weight.expert,
        )
        for weight in plan.catalogue.weights
        for linear in weight.linears
    ]


def _check_accounted(plan: ConversionPlan) -> None:
    used = {info.name for part in plan.parts for piece in part.pieces for info in piece.source}
    missing = [name for name in plan.source.tensors if name not in used]
    if missing:
        raise JobFailure(f"tensor {missing[0]} of the source is unaccounted for, as are {len(missing) - 1} more")
    read = sum(info.nbytes for info in plan.source.tensors.values())
    if plan.read_bytes != read:
        raise JobFailure(f"{plan.read_bytes} bytes went into the parts, and the source has {read}")


def _check_file(directory: Path, manifest: PartManifest, dialect: str, expected: Mapping[str, StoredTensor]) -> None:
    record = manifest.shards[dialect]
    label = f"{dialect}/{record.file}"
    again = f"delete manifests/part-{manifest.number:05d}.json and run the command again to have it done anew"
    if dict(record.tensors) != dict(expected):
        raise JobFailure(f"{label}: does not hold the tensors that the plan calls for; {again}")
    refuse_changed_shard(directory, record, again)


def _refuse_foreign(directory: Path, ours: set[str]) -> None:
    foreign = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in ours)
    if foreign:
        raise OutputError(
            f"{directory.name}/{foreign[0]}: is not of this job, and serving engines would load it too; move it away"
        )
